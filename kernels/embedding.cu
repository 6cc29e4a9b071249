// Rows of the token table to the residual stream, its wanted rows to the head, and the head's logits capped.
#include "dense.cuh"
#include "table.cuh"

constexpr int THREADS = 256;

// grid T, block THREADS: the table as the checkpoint has it, [V, d] of `format`, times scale. The first kernel of a
// step and never launched dependently, so that all that came before the step is done when any later kernel of it starts.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const int* __restrict__ tokens, const void* __restrict__ table, float* __restrict__ out, int d,
          int format, float scale) {
    const size_t from = (size_t)tokens[blockIdx.x] * d;
    out += (size_t)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += THREADS) out[i] = table_value(table, from + i, format) * scale;
}

// The same out of a tied head's tiles (dense.cuh).
extern "C" __global__ void __launch_bounds__(THREADS)
    embed_tiled(const int* __restrict__ tokens, const unsigned char* __restrict__ tiles,
                const float* __restrict__ row_scale, float* __restrict__ out, int d, int planes,
                float scale) {
    const int token = tokens[blockIdx.x];
    const float own_scale = row_scale[token];
    out += (size_t)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += THREADS) {
        const unsigned char* at = tiles + dense_offset(token, i, (d + DENSE_K - 1) / DENSE_K, planes);
        float value = __half2float(*reinterpret_cast<const __half*>(at));
        if (planes == 2) value += __half2float(*reinterpret_cast<const __half*>(at + DENSE_PLANE));
        out[i] = value * own_scale * scale;
    }
}

// grid R, block THREADS: the wanted rows of the residual stream.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_rows(const int* __restrict__ rows, const float* x, float* __restrict__ out, int d) {
    dependents_may_start();
    wait_for_predecessor();
    x += (size_t)rows[blockIdx.x] * d, out += (size_t)blockIdx.x * d;
    for (int i = threadIdx.x; i < d; i += THREADS) out[i] = x[i];
}

// grid (R, any), block THREADS, in place: cap * tanh(y / cap) of logits [R, columns].
extern "C" __global__ void __launch_bounds__(THREADS) softcap(float* logits, int columns, float cap) {
    dependents_may_start();
    wait_for_predecessor();
    logits += (size_t)blockIdx.x * columns;
    for (int i = blockIdx.y * THREADS + threadIdx.x; i < columns; i += gridDim.y * THREADS)
        logits[i] = cap * tanhf(logits[i] / cap);
}
