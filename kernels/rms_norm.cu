// RMSNorm of the residual stream: float32 to fp16 times a power of two.
#include "mma.cuh"
#include "norm.cuh"
#include "order.cuh"

// grid T, block THREADS. A row's result depends on nothing but the row. factor: 2^-exponent of the output. weight may
// be null (ones). rows: what each row was divided by, float32 [T], or null. ORDERED (-D): y is ordered (order.cuh).
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* x, const float* __restrict__ weight, __half* __restrict__ y, int d,
             float eps, float factor, float* __restrict__ rows, int padded, int interleaved) {
    __shared__ float squares[THREADS / 32];
    constexpr int EARLY = 2;  // of a thread's weights, those that are read before the predecessor is done
    const int quads = d % 4 ? 0 : d / 4;
    auto weights = [&](int i) {
        return weight && i < quads ? reinterpret_cast<const float4*>(weight)[i] : make_float4(1, 1, 1, 1);
    };
    dependents_may_start();
    float4 early[EARLY];
#pragma unroll
    for (int n = 0; n < EARLY; n++) early[n] = weights(threadIdx.x + n * THREADS);
    wait_for_predecessor();
    x += (size_t)blockIdx.x * d;
    if (!ORDERED) y += (size_t)blockIdx.x * d;
    float own[1];
    warp_squares<THREADS>(own, {x}, d);
    squares[threadIdx.x / 32] = own[0];
    __syncthreads();
    const float length = row_length<THREADS / 32>(squares, 1, d, eps), scale = factor / length;
    if (rows && threadIdx.x == 0) rows[blockIdx.x] = length;
    auto put = [&](int i, float4 w) {
        if (i >= quads) return;
        const uint2 four = normed(reinterpret_cast<const float4*>(x)[i], scale, w);
        if (ORDERED) {
            unsigned* const words = reinterpret_cast<unsigned*>(y);
            words[ordered_word(4 * i, blockIdx.x, padded, interleaved, blockIdx.x % 8)] = four.x;
            words[ordered_word(4 * i + 2, blockIdx.x, padded, interleaved, blockIdx.x % 8)] = four.y;
        } else reinterpret_cast<uint2*>(y)[i] = four;
    };
#pragma unroll
    for (int n = 0; n < EARLY; n++) put(threadIdx.x + n * THREADS, early[n]);
#pragma unroll 1
    for (int i = threadIdx.x + EARLY * THREADS; i < quads; i += THREADS) put(i, weights(i));
    if (!ORDERED)
#pragma unroll 1
        for (int i = 4 * quads + threadIdx.x; i < d; i += THREADS)
            y[i] = __float2half_rn(x[i] * scale * (weight ? weight[i] : 1.0f));
}
