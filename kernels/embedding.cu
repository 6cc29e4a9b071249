// Rows of the token table to the residual stream, and rows of the residual stream to the head.
#include "dense.cuh"
#include "mma.cuh"

constexpr int THREADS = 256;
enum Format { BF16 = 0, F16 = 1, F32 = 2 };

// grid T, block THREADS: the table as the checkpoint has it, [V, d] of `format`. The first kernel of a step
// and never launched dependently, so that all that came before the step is done when any later kernel of it
// starts.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const int* __restrict__ tokens, const void* __restrict__ table, float* __restrict__ out, int d,
          int format) {
    const size_t from = (size_t)tokens[blockIdx.x] * d;
    out += (size_t)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        if (format == BF16)
            out[i] = __uint_as_float((unsigned)static_cast<const unsigned short*>(table)[from + i] << 16);
        else if (format == F16) out[i] = __half2float(static_cast<const __half*>(table)[from + i]);
        else out[i] = static_cast<const float*>(table)[from + i];
    }
}

// The same out of a tied head's tiles (dense.cuh).
extern "C" __global__ void __launch_bounds__(THREADS)
    embed_tiled(const int* __restrict__ tokens, const unsigned char* __restrict__ tiles,
                const float* __restrict__ row_scale, float* __restrict__ out, int d, int planes) {
    const int token = tokens[blockIdx.x];
    const float scale = row_scale[token];
    out += (size_t)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        const unsigned char* at = tiles + dense_offset(token, i, (d + DENSE_K - 1) / DENSE_K, planes);
        float value = __half2float(*reinterpret_cast<const __half*>(at));
        if (planes == 2) value += __half2float(*reinterpret_cast<const __half*>(at + DENSE_PLANE));
        out[i] = value * scale;
    }
}

// grid R, block THREADS: the wanted rows of the residual stream.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows(const int* __restrict__ rows, const float* __restrict__ x, float* __restrict__ out, int d) {
    dependents_may_start();
    wait_for_predecessor();
    x += (size_t)rows[blockIdx.x] * d, out += (size_t)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += THREADS) out[i] = x[i];
}
