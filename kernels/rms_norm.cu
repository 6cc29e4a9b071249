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
    if (!padded) y += (size_t)blockIdx.x * d;
    const float length = norm_row<THREADS>(x + (size_t)blockIdx.x * d, weight, y, d, eps, factor, squares,
                                           [&](int i, uint2 four) {
        if (padded) {
            unsigned* const words = reinterpret_cast<unsigned*>(y);
            words[ordered_word(4 * i, blockIdx.x, padded, interleaved, blockIdx.x % 8)] = four.x;
            words[ordered_word(4 * i + 2, blockIdx.x, padded, interleaved, blockIdx.x % 8)] = four.y;
        } else reinterpret_cast<uint2*>(y)[i] = four;
    });
    if (rows && threadIdx.x == 0) rows[blockIdx.x] = length;
}
