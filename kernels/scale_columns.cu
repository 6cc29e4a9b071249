// What stands between linears whose parts differ: a pre_quant_scale, and the product of a gated pair of two formats.
#include "activation.cuh"
#include "mma.cuh"

// y[t][k] = x[t][k] * scale[k] * factor, fp16; one block per token.
extern "C" __global__ void scale_columns(const __half* x, const float* scale, __half* y, int K, float factor) {
    dependents_may_start();
    wait_for_predecessor();
    const size_t start = (size_t)blockIdx.x * K;
    for (int k = threadIdx.x; k < K; k += blockDim.x)
        y[start + k] = __float2half_rn(__half2float(x[start + k]) * (scale[k] * factor));
}

// y[t][n] = activation(gate[t][n], up[t][n]) * out_factor, with gate and up, times in_factor, side by side in x [T][2N].
extern "C" __global__ void multiply_halves(const __half* x, __half* y, int N, int activation, float in_factor,
                                           float out_factor) {
    dependents_may_start();
    wait_for_predecessor();
    for (int n = threadIdx.x; n < N; n += blockDim.x) {
        const float gate = __half2float(x[(size_t)blockIdx.x * 2 * N + n]) * in_factor;
        const float up = __half2float(x[(size_t)blockIdx.x * 2 * N + N + n]) * in_factor;
        y[(size_t)blockIdx.x * N + n] = __float2half_rn(gated_product(gate, up, activation) * out_factor);
    }
}
