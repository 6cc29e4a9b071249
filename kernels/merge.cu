// What follows a sublayer in models that norm after it: (residual + norm(sum of norm_i(x_i))) * scale.
#include "mma.cuh"

constexpr int THREADS = 512;

// One of the sum's terms: x [T, d], fp16 or float32, times factor and, where not null, its row's float of `rows`; then
// RMSNorm where `weight` is not null.
struct Branch {
    const void* x;
    const float* rows;
    const float* weight;
    int is_half;
    float factor, eps;

    __device__ __forceinline__ float at(int i) const {
        return (is_half ? __half2float(static_cast<const __half*>(x)[i]) : static_cast<const float*>(x)[i]) * factor;
    }
    __device__ __forceinline__ void start_row(int row, int d) {
        const size_t from = (size_t)row * d;
        x = is_half ? static_cast<const void*>(static_cast<const __half*>(x) + from)
                    : static_cast<const void*>(static_cast<const float*>(x) + from);
        if (rows) factor *= rows[row];
    }
};

// The sums of two numbers over the block, in one order.
__device__ __forceinline__ float2 block_sums(float2 mine) {
    __shared__ float2 partial[THREADS / 32];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
        mine.x += __shfl_xor_sync(~0u, mine.x, offset);
        mine.y += __shfl_xor_sync(~0u, mine.y, offset);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    float2 sums = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) sums.x += partial[i].x, sums.y += partial[i].y;
    return sums;
}

// grid T, block THREADS, in place. A row's result depends on nothing but the row. x2 is null where there is one branch.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge(float* residual, const void* __restrict__ x1, int half1, float factor1, const float* __restrict__ rows1,
          const float* __restrict__ weight1, float eps1, const void* __restrict__ x2, int half2, float factor2,
          const float* __restrict__ rows2, const float* __restrict__ weight2, float eps2,
          const float* __restrict__ weight, float eps, float scale, int d) {
    dependents_may_start();
    wait_for_predecessor();
    Branch a{x1, rows1, weight1, half1, factor1, eps1}, b{x2, rows2, weight2, half2, factor2, eps2};
    a.start_row(blockIdx.x, d);
    if (x2) b.start_row(blockIdx.x, d);
    residual += (size_t)blockIdx.x * d;
    float2 inverse = make_float2(1, 1);
    if (a.weight || b.weight) {
        float2 squares = make_float2(0, 0);
        for (int i = threadIdx.x; i < d; i += THREADS) {
            const float first = a.at(i), second = x2 ? b.at(i) : 0.0f;
            squares.x = fmaf(first, first, squares.x), squares.y = fmaf(second, second, squares.y);
        }
        squares = block_sums(squares);
        if (a.weight) inverse.x = 1 / sqrtf(squares.x / d + a.eps);
        if (b.weight) inverse.y = 1 / sqrtf(squares.y / d + b.eps);
    }
    auto sum = [&](int i) {
        float total = a.at(i) * inverse.x * (a.weight ? a.weight[i] : 1.0f);
        if (x2) total += b.at(i) * inverse.y * (b.weight ? b.weight[i] : 1.0f);
        return total;
    };
    float outer = 1;
    if (weight) {
        float squares = 0;
        for (int i = threadIdx.x; i < d; i += THREADS) {
            const float total = sum(i);
            squares = fmaf(total, total, squares);
        }
        outer = 1 / sqrtf(block_sums(make_float2(squares, 0)).x / d + eps);
    }
    for (int i = threadIdx.x; i < d; i += THREADS)
        residual[i] = (residual[i] + sum(i) * outer * (weight ? weight[i] : 1.0f)) * scale;
}
