// What follows a sublayer in models that norm after it: (residual + norm(sum of norm_i(x_i))) * scale.
#include "mma.cuh"

// Each thread has VECTORS times WIDTH neighbours of the row in registers; both by -D, WIDTH 4 or, where d is no multiple
// of four, 1.
constexpr int THREADS = 512, WARPS = THREADS / 32;

using Numbers = float[VECTORS][WIDTH];

// A row of d numbers, or null; `missing` where there are none.
template <class T>
__device__ __forceinline__ void load(Numbers& out, const T* row, float missing, int d) {
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int at = WIDTH * (threadIdx.x + j * THREADS);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) out[j][i] = missing;
        if (!row || at >= d) continue;
        if constexpr (WIDTH == 1) {
            out[j][0] = static_cast<float>(row[at]);
        } else if constexpr (sizeof(T) == 2) {
            const uint2 raw = *reinterpret_cast<const uint2*>(row + at);
            const float2 low = __half22float2(as_half2(raw.x)), high = __half22float2(as_half2(raw.y));
            out[j][0] = low.x, out[j][1] = low.y, out[j][2] = high.x, out[j][3] = high.y;
        } else {
            const float4 raw = *reinterpret_cast<const float4*>(row + at);
            out[j][0] = raw.x, out[j][1] = raw.y, out[j][2] = raw.z, out[j][3] = raw.w;
        }
    }
}

// One of the sum's terms: x [T, d], fp16 or float32, times factor and, where not null, its row's float of `rows`.
__device__ __forceinline__ void load_branch(Numbers& out, const void* x, int is_half, float factor, const float* rows,
                                            int d) {
    const size_t from = (size_t)blockIdx.x * d;
    if (is_half) load(out, static_cast<const __half*>(x) + from, 0.0f, d);
    else load(out, x ? static_cast<const float*>(x) + from : nullptr, 0.0f, d);
    if (rows) factor *= rows[blockIdx.x];
#pragma unroll
    for (int j = 0; j < VECTORS; j++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) out[j][i] *= factor;
}

__device__ __forceinline__ float sum_of_squares(const Numbers& x) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < VECTORS; j++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) sum = fmaf(x[j][i], x[j][i], sum);
    return sum;
}

// The sums of two numbers over the block, in one order.
__device__ __forceinline__ float2 block_sums(float2 mine) {
    __shared__ float2 partial[WARPS];
    auto add_lanes = [&](int most) {
#pragma unroll
        for (int offset = most / 2; offset; offset /= 2) {
            mine.x += __shfl_xor_sync(~0u, mine.x, offset);
            mine.y += __shfl_xor_sync(~0u, mine.y, offset);
        }
    };
    add_lanes(32);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = partial[threadIdx.x % WARPS];
    add_lanes(WARPS);
    return mine;
}

// grid T, block THREADS, in place. A row's result depends on nothing but the row. x2 is null where there is one branch;
// a branch, and their sum, is RMS-normed where its weight is not null.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge(float* residual, const void* x1, int half1, float factor1, const float* rows1,
          const float* __restrict__ weight1, float eps1, const void* x2, int half2, float factor2,
          const float* rows2, const float* __restrict__ weight2, float eps2,
          const float* __restrict__ weight, float eps, float scale, int d) {
    dependents_may_start();
    Numbers w1, w2, w, a, b, h;
    load(w1, weight1, 1.0f, d), load(w2, weight2, 1.0f, d), load(w, weight, 1.0f, d);
    const float of_d = __fdividef(1.0f, d);
    wait_for_predecessor();
    load_branch(a, x1, half1, factor1, rows1, d);
    load_branch(b, x2, half2, factor2, rows2, d);
    residual += (size_t)blockIdx.x * d;
    load(h, residual, 0.0f, d);
    float2 inverse = make_float2(1, 1);
    if (weight1 || weight2) {
        const float2 squares = block_sums(make_float2(sum_of_squares(a), sum_of_squares(b)));
        if (weight1) inverse.x = rsqrtf(fmaf(squares.x, of_d, eps1));
        if (weight2) inverse.y = rsqrtf(fmaf(squares.y, of_d, eps2));
    }
#pragma unroll
    for (int j = 0; j < VECTORS; j++)
#pragma unroll
        for (int i = 0; i < WIDTH; i++) a[j][i] = a[j][i] * inverse.x * w1[j][i] + b[j][i] * inverse.y * w2[j][i];
    const float outer = weight ? rsqrtf(fmaf(block_sums(make_float2(sum_of_squares(a), 0)).x, of_d, eps)) : 1.0f;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int at = WIDTH * (threadIdx.x + j * THREADS);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) h[j][i] = (h[j][i] + a[j][i] * outer * w[j][i]) * scale;
        if (at >= d) continue;
        if constexpr (WIDTH == 1) residual[at] = h[j][0];
        else *reinterpret_cast<float4*>(residual + at) = make_float4(h[j][0], h[j][1], h[j][2], h[j][3]);
    }
}
