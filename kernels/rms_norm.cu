// RMSNorm of the residual stream (Zhang and Sennrich 2019): float32 to fp16 times a power of two.
#include "mma.cuh"

constexpr int THREADS = 256;

// grid T, block THREADS. A row's result depends on nothing but the row. factor: 2^-exponent of the output.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const float* __restrict__ x, const float* __restrict__ weight, __half* __restrict__ y, int d,
             float eps, float factor) {
    __shared__ float partial[THREADS / 32];
    dependents_may_start();
    wait_for_predecessor();
    x += (size_t)blockIdx.x * d, y += (size_t)blockIdx.x * d;
    const int quads = d % 4 ? 0 : d / 4;  // rows of other sizes are not aligned to 16 bytes
    float squares = 0;
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        const float4 v = reinterpret_cast<const float4*>(x)[i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (int i = 4 * quads + threadIdx.x; i < d; i += THREADS) squares += x[i] * x[i];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) total += partial[i];
    const float scale = factor / sqrtf(total / d + eps);
    for (int i = threadIdx.x; i < quads; i += THREADS) {
        const float4 v = reinterpret_cast<const float4*>(x)[i],
                     w = reinterpret_cast<const float4*>(weight)[i];
        const uint2 packed = make_uint2(as_bits(__floats2half2_rn(v.x * scale * w.x, v.y * scale * w.y)),
                                        as_bits(__floats2half2_rn(v.z * scale * w.z, v.w * scale * w.w)));
        reinterpret_cast<uint2*>(y)[i] = packed;
    }
    for (int i = 4 * quads + threadIdx.x; i < d; i += THREADS)
        y[i] = __float2half_rn(x[i] * scale * weight[i]);
}
