// What follows a sublayer in models that norm after it: (residual + norm(sum of norm_i(x_i))) * scale.
#include "mma.cuh"

// Each thread has VECTORS times WIDTH neighbours of the row in registers, both by -D: WIDTH is 4 or, where d is no
// multiple of four, 1.
constexpr int THREADS = 512, WARPS = THREADS / 32;

using Numbers = float[VECTORS][WIDTH];
using Raw = uint4[VECTORS];  // four floats, or as many halves in the first two words

// Two words if `here`. The compiler keeps such loads in their order, in front of what uses them.
__device__ __forceinline__ void load_if(unsigned& x, unsigned& y, const void* from, bool here) {
    asm volatile("{\n.reg .pred here;\nsetp.ne.s32 here, %3, 0;\n@here ld.global.v2.u32 {%0, %1}, [%2];\n}"
                 : "+r"(x), "+r"(y) : "l"(from), "r"((int)here) : "memory");
}

// A thread's part of a row of d numbers at x; `missing` where there are none.
__device__ __forceinline__ void load(Raw& raw, const void* x, int is_half, size_t row, int d, float missing = 0.0f) {
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const int at = threadIdx.x + j * THREADS;
        const size_t from = row * (d / WIDTH) + at;
        const bool here = x && WIDTH * at < d;
        const unsigned none = __float_as_uint(missing);
        raw[j] = make_uint4(none, none, none, none);
        if constexpr (WIDTH == 4) {
            const char* const quad = static_cast<const char*>(x) + from * (is_half ? 8 : 16);
            load_if(raw[j].x, raw[j].y, quad, here), load_if(raw[j].z, raw[j].w, quad + 8, here && !is_half);
        } else if (here) {
            raw[j].x = is_half ? static_cast<const unsigned short*>(x)[from] : static_cast<const unsigned*>(x)[from];
        }
    }
}

__device__ __forceinline__ void convert(Numbers& out, const Raw& raw, int is_half, float factor) {
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
        const float2 low = __half22float2(as_half2(raw[j].x)), high = __half22float2(as_half2(raw[j].y));
        const float halves[4] = {low.x, low.y, high.x, high.y};
        const unsigned floats[4] = {raw[j].x, raw[j].y, raw[j].z, raw[j].w};
#pragma unroll
        for (int i = 0; i < WIDTH; i++) out[j][i] = (is_half ? halves[i] : __uint_as_float(floats[i])) * factor;
    }
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

// grid T, block THREADS, in place. A row's result depends on nothing but the row. x1, x2 [T, d]: fp16 or float32, times
// factor and, where not null, the row's float of `rows`; x2 is null where there is one branch. A branch, and their sum,
// is RMS-normed where its weight is not null.
extern "C" __global__ void __launch_bounds__(THREADS)
    merge(float* residual, const void* x1, int half1, float factor1, const float* rows1,
          const float* __restrict__ weight1, float eps1, const void* x2, int half2, float factor2,
          const float* rows2, const float* __restrict__ weight2, float eps2,
          const float* __restrict__ weight, float eps, float scale, int d) {
    dependents_may_start();
    Raw raw1, raw2, raw;
    Numbers w1, w2, w, a, b, h;
    load(raw1, weight1, 0, 0, d, 1.0f), load(raw2, weight2, 0, 0, d, 1.0f), load(raw, weight, 0, 0, d, 1.0f);
    convert(w1, raw1, 0, 1.0f), convert(w2, raw2, 0, 1.0f), convert(w, raw, 0, 1.0f);
    const float of_d = __fdividef(1.0f, d);
    wait_for_predecessor();
    load(raw1, x1, half1, blockIdx.x, d), load(raw2, x2, half2, blockIdx.x, d);
    load(raw, residual, 0, blockIdx.x, d);
    const float row1 = rows1 ? rows1[blockIdx.x] : 1.0f, row2 = rows2 ? rows2[blockIdx.x] : 1.0f;
    convert(a, raw1, half1, factor1 * row1), convert(b, raw2, half2, factor2 * row2), convert(h, raw, 0, 1.0f);
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
        float* const to = residual + (size_t)blockIdx.x * d + at;
        if constexpr (WIDTH == 1) to[0] = h[j][0];
        else *reinterpret_cast<float4*>(to) = make_float4(h[j][0], h[j][1], h[j][2], h[j][3]);
    }
}
