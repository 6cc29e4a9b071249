// RMSNorm of the residual stream: float32 to fp16 times a power of two.
#include "mma.cuh"
#include "norm.cuh"

// grid T, block THREADS. A row's result depends on nothing but the row. factor: 2^-exponent of the output. weight may
// be null (ones). rows: what each row was divided by, float32 [T], or null.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* x, const float* __restrict__ weight, __half* __restrict__ y, int d,
             float eps, float factor, float* __restrict__ rows) {
    __shared__ float squares[THREADS / 32];
    dependents_may_start();
    wait_for_predecessor();
    const float length = norm_row<THREADS>(x + (size_t)blockIdx.x * d, weight, y + (size_t)blockIdx.x * d, d, eps,
                                           factor, squares);
    if (rows && threadIdx.x == 0) rows[blockIdx.x] = length;
}
