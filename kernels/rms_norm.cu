// RMSNorm of the residual stream: float32 to fp16 times a power of two.
#include "mma.cuh"
#include "norm.cuh"
#include "order.cuh"

// grid T, block THREADS. A row's result depends on nothing but the row. factor: 2^-exponent of the output. weight may
// be null (ones). rows: what each row was divided by, float32 [T], or null. padded: 0, or y is ordered (order.cuh).
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* x, const float* __restrict__ weight, __half* __restrict__ y, int d,
             float eps, float factor, float* __restrict__ rows, int padded, int interleaved) {
    __shared__ float squares[THREADS / 32];
    dependents_may_start();
    wait_for_predecessor();
    x += (size_t)blockIdx.x * d;
    if (!padded) y += (size_t)blockIdx.x * d;
    squares[threadIdx.x / 32] = warp_squares<THREADS>(x, d);
    __syncthreads();
    const float length = row_length<THREADS / 32>(squares, 1, d, eps), scale = factor / length;
    const int quads = d % 4 ? 0 : d / 4;
    if (rows && threadIdx.x == 0) rows[blockIdx.x] = length;
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        const float4 w = weight ? reinterpret_cast<const float4*>(weight)[i] : make_float4(1, 1, 1, 1);
        const uint2 four = normed(reinterpret_cast<const float4*>(x)[i], scale, w);
        if (padded) {
            unsigned* const words = reinterpret_cast<unsigned*>(y);
            words[ordered_word(4 * i, blockIdx.x, padded, interleaved, blockIdx.x % 8)] = four.x;
            words[ordered_word(4 * i + 2, blockIdx.x, padded, interleaved, blockIdx.x % 8)] = four.y;
        } else reinterpret_cast<uint2*>(y)[i] = four;
    }
    for (int i = 4 * quads + threadIdx.x; i < d; i += THREADS)
        y[i] = __float2half_rn(x[i] * scale * (weight ? weight[i] : 1.0f));
}
