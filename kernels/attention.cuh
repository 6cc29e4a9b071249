// What the attention kernels share: sizes, where a head lies in its page, and the opening (qk-norm and RoPE).
//
// HEAD_DIM: 16 to 256, a multiple of 16. Pages are [page, kv_head, PAGE, HEAD_DIM] fp16. Token i of sequence
// s lies at row starts[s] + i of the token axis and at position lengths[s] - (starts[s+1] - starts[s]) + i;
// window 0 means all keys. Scores and softmax are float32, in powers of two (scale_log2 = scale * log2(e) and
// the exponents of q and k).
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

// RMSNorm of each head (norm not null), then rotation (rope not null).
struct Opening {
    const float* q_norm;
    const float* k_norm;
    float q_eps, k_eps;
    const float2* rope;  // (cos, sin) [position, HALF_DIM]
    float value_scale;   // stored fp16 times this is the value
};

// One warp opens one head of HEAD_DIM numbers; source and target may be shared or global memory.
__device__ __forceinline__ void open_head(const __half* source, __half* target, const float* norm, float eps,
                                          const Opening& opening, int position) {
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
            low[i].x *= opening.value_scale, low[i].y *= opening.value_scale;
            high[i].x *= opening.value_scale, high[i].y *= opening.value_scale;
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
        if (opening.rope) {
            const float4 r = reinterpret_cast<const float4*>(opening.rope + (size_t)position * HALF_DIM)[j];
            a = make_float2(low[i].x * r.x - high[i].x * r.y, low[i].y * r.z - high[i].y * r.w);
            b = make_float2(high[i].x * r.x + low[i].x * r.y, high[i].y * r.z + low[i].y * r.w);
        }
        reinterpret_cast<__half2*>(target)[j] = __float22half2_rn(a);
        reinterpret_cast<__half2*>(target)[j + QUARTER] = __float22half2_rn(b);
    }
}

__device__ __forceinline__ void copy_head(const __half* source, __half* target) {
    for (int j = threadIdx.x % 32; j < HALF_DIM; j += 32)
        reinterpret_cast<unsigned*>(target)[j] = reinterpret_cast<const unsigned*>(source)[j];
}
