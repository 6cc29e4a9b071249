// What the attention kernels share: sizes, where a head lies in its page, and the opening (qk-norm and RoPE).
//
// HEAD_DIM: 16 to 256, a multiple of 16, or to 512, a multiple of 32. A token's row of the input holds `heads` queries
// and then `others` heads: keys and values; keys alone, where the raw keys are the values, too; or nothing, where
// another layer has written the pages. The last kv_heads of a row give the values. Pages are [page, kv_head, PAGE,
// HEAD_DIM] fp16. Token i of sequence s lies at row starts[s] + i of the token axis and at position lengths[s] -
// (starts[s+1] - starts[s]) + i; window 0 means all keys. Scores and softmax are float32, in powers of two (scale_log2 =
// scale * log2(e) and the exponents of q and k); sinks (null for none) add one score without a value to a head's sum.
#include "mma.cuh"

constexpr int PAGE = 64;
constexpr int HALF_DIM = HEAD_DIM / 2;
#define INFINITY __int_as_float(0x7f800000)  // NVRTC has no math.h

// 2^x to two units in the last place; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ size_t head_in_page(int page, int kv_heads, int kv_head, int slot) {
    return (((size_t)page * kv_heads + kv_head) * PAGE + slot) * HEAD_DIM;
}

// One warp opens one head of HEAD_DIM numbers: RMSNorm (norm not null), then rotation (rope not null: (cos, sin) of
// [position, HALF_DIM]). Stored fp16 times value_scale is the value; after a norm, what is stored is the value. Source
// and target may be shared or global memory.
__device__ __forceinline__ void open_head(const __half* source, __half* target, const float* norm, float eps,
                                          const float2* rope, int position, float value_scale) {
    // A step: two neighbours below HALF_DIM and the two that they pair with.
    constexpr int QUARTER = HEAD_DIM / 4, STEPS = (QUARTER + 31) / 32;
    const int lane = threadIdx.x % 32;
    float2 low[STEPS], high[STEPS];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int j = lane + 32 * i;
        low[i] = high[i] = make_float2(0, 0);
        if (j < QUARTER) {
            low[i] = __half22float2(reinterpret_cast<const __half2*>(source)[j]);
            high[i] = __half22float2(reinterpret_cast<const __half2*>(source)[j + QUARTER]);
        }
    }
    if (norm) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            low[i].x *= value_scale, low[i].y *= value_scale;
            high[i].x *= value_scale, high[i].y *= value_scale;
            squares +=
                low[i].x * low[i].x + low[i].y * low[i].y + high[i].x * high[i].x + high[i].y * high[i].y;
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
        const float inverse = 1 / sqrtf(squares / HEAD_DIM + eps);
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            const int j = lane + 32 * i;
            if (j < QUARTER) {
                const float2 a = reinterpret_cast<const float2*>(norm)[j];
                const float2 b = reinterpret_cast<const float2*>(norm)[j + QUARTER];
                low[i].x *= inverse * a.x, low[i].y *= inverse * a.y;
                high[i].x *= inverse * b.x, high[i].y *= inverse * b.y;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int j = lane + 32 * i;
        if (j >= QUARTER) continue;
        float2 a = low[i], b = high[i];
        if (rope) {
            const float4 r = reinterpret_cast<const float4*>(rope + (size_t)position * HALF_DIM)[j];
            a = make_float2(low[i].x * r.x - high[i].x * r.y, low[i].y * r.z - high[i].y * r.w);
            b = make_float2(high[i].x * r.x + low[i].x * r.y, high[i].y * r.z + low[i].y * r.w);
        }
        reinterpret_cast<__half2*>(target)[j] = __float22half2_rn(a);
        reinterpret_cast<__half2*>(target)[j + QUARTER] = __float22half2_rn(b);
    }
}

// One warp brings a value to its page, normed where norm is not null.
__device__ __forceinline__ void write_value(const __half* source, __half* target, const float* norm, float eps,
                                            float value_scale) {
    if (norm) {
        open_head(source, target, norm, eps, nullptr, 0, value_scale);
        return;
    }
    for (int j = threadIdx.x % 32; j < HALF_DIM; j += 32)
        reinterpret_cast<unsigned*>(target)[j] = reinterpret_cast<const unsigned*>(source)[j];
}

// A head's sink as one more score, in powers of two; it has no value.
__device__ __forceinline__ float sink_score(const float* sinks, int head) {
    return sinks ? sinks[head] * 1.4426950408889634f : -INFINITY;
}
