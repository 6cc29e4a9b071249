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
    // A thread's next quad is THREADS / 32 times 128 columns on: that many pairs of slabs.
    const size_t first = ordered_word(4 * threadIdx.x, blockIdx.x, padded, interleaved, blockIdx.x % 8);
    auto put = [&](int n, float4 w) {  // quad n of the thread
        const int i = threadIdx.x + n * THREADS;
        if (i >= quads) return;
        const uint2 four = normed(reinterpret_cast<const float4*>(x)[i], scale, w);
        if (ORDERED) {
            unsigned* const word = reinterpret_cast<unsigned*>(y) + (size_t)n * (THREADS / 32 * 2 * 32) * padded;
            word[first] = four.x, word[first ^ 4] = four.y;  // an even pair and the next: chunks that differ in one bit
        } else reinterpret_cast<uint2*>(y)[i] = four;
    };
#pragma unroll
    for (int n = 0; n < EARLY; n++) put(n, early[n]);
#pragma unroll 1
    for (int n = EARLY; n * THREADS < quads; n++) put(n, weights(threadIdx.x + n * THREADS));
    if (!ORDERED)
#pragma unroll 1
        for (int i = 4 * quads + threadIdx.x; i < d; i += THREADS)
            y[i] = __float2half_rn(x[i] * scale * (weight ? weight[i] : 1.0f));
}
