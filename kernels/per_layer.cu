// Gemma 4's per-layer embeddings: what a token's own vectors, one for each layer, add to the residual stream.
#include "table.cuh"
#include "norm.cuh"

constexpr int THREADS = 256;

// grid (T, layers), block THREADS: inputs fp16 [T, layers * width] (times the exponent behind out_factor) =
// (norm(projected / sqrt(d)) + table[token] * table_scale) / sqrt(2), norm over width. `projected`, fp16 [T, layers *
// width], times `factor` and its row's float of `rows` is the projection / sqrt(d). The table [V, layers * width] lies
// in host memory: a row of it crosses the bus, at decode without the host's doing.
extern "C" __global__ void __launch_bounds__(THREADS)
    per_layer_inputs(const __half* projected, const float* rows, float factor,
                     const int* __restrict__ tokens, const void* __restrict__ table, int format, float table_scale,
                     const float* __restrict__ weight, float eps, float out_factor, int width,
                     __half* __restrict__ inputs) {
    __shared__ float partial[THREADS / 32];
    dependents_may_start();
    wait_for_predecessor();
    const size_t row = (size_t)gridDim.y * width, column = (size_t)blockIdx.y * width;
    const size_t looked_up = tokens[blockIdx.x] * row + column;
    projected += blockIdx.x * row + column, inputs += blockIdx.x * row + column;
    factor *= rows[blockIdx.x];
    float squares = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += THREADS) {
        const float value = __half2float(projected[i]) * factor;
        squares = fmaf(value, value, squares);
    }
    const float total = block_sum<THREADS / 32>(squares, partial);
    const float inverse = factor / sqrtf(total / width + eps);
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += THREADS) {
        const float value = __half2float(projected[i]) * inverse * weight[i] +
                            table_value(table, looked_up + i, format) * table_scale;
        inputs[i] = __float2half_rn(value * 0.70710678f * out_factor);
    }
}

// grid T, block THREADS: out = gelu_tanh(gate) * inputs[:, layer] / the row's float of `rows`, which multiplies it
// later. gate fp16 [T, width] times `factor` and that float is the gate's projection. input_row: halves between tokens
// of `inputs`, which points at the layer's first. product: all powers of two of gate, inputs and out.
extern "C" __global__ void __launch_bounds__(THREADS)
    per_layer_gate(const __half* gate, const float* rows, float factor,
                   const __half* inputs, int input_row, float product, int width,
                   __half* __restrict__ out) {
    dependents_may_start();
    wait_for_predecessor();
    const float row = rows[blockIdx.x] * factor;
    gate += (size_t)blockIdx.x * width, inputs += (size_t)blockIdx.x * input_row, out += (size_t)blockIdx.x * width;
#pragma unroll 1
    for (int i = threadIdx.x; i < width; i += THREADS) {
        const float g = __half2float(gate[i]), y = g * row;
        const float open = 0.5f * (1 + tanhf(0.79788456f * (y + 0.044715f * y * y * y)));
        out[i] = __float2half_rn(g * open * __half2float(inputs[i]) * product);
    }
}
