// What the attention kernels share: sizes, where a head lies in its page, and the opening (qk-norm and RoPE).
//
// HEAD_DIM: 16 to 256, a multiple of 16, or to 512, a multiple of 32. A token's row of the input holds `heads` queries
// and then `others` heads: keys and values; keys alone, where the raw keys are the values, too; or nothing, where
// another layer has written the pages. The last kv_heads of a row give the values. Pages are [page, kv_head, PAGE,
// HEAD_DIM] of Kv: fp16, or E4M3 with KV_FP8. Token i of sequence s lies at row starts[s] + i of the token axis and at
// position lengths[s] - (starts[s+1] - starts[s]) + i; window 0 means all keys. Scores and softmax are float32, in
// powers of two (scale_log2 = scale * log2(e) and what q and k were divided by); sinks (null for none) add one score
// without a value to a head's sum.
#include "mma.cuh"

constexpr int PAGE = 64;
constexpr int HALF_DIM = HEAD_DIM / 2;
#ifndef KV_FP8
#define KV_FP8 0
#endif
#if KV_FP8
using Kv = unsigned char;
#else
using Kv = __half;
#endif
#define INFINITY __int_as_float(0x7f800000)  // NVRTC has no math.h

// 2^x to two units in the last place; 0 for minus infinity.
__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What another kernel writes, read no earlier than here and past L1, which may hold what was there before.
__device__ __forceinline__ unsigned read_now(const unsigned* p) {
    unsigned x;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ uint4 read_now(const uint4* p) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p) : "memory");
    return x;
}

// Two neighbours of a constant, or of the input.
__device__ __forceinline__ float2 pair_at(const float2* p) { return *p; }
__device__ __forceinline__ float2 pair_at(const __half2* p) {
    return __half22float2(as_half2(read_now(reinterpret_cast<const unsigned*>(p))));
}

// The nearest E4M3 code, ties to even; what is out of range saturates, and so does NaN.
__device__ __forceinline__ unsigned to_e4m3(float x) {
    const float size = fminf(fabsf(x), 448.0f);
    unsigned bits = __float_as_uint(size);
    bits = size < 0.015625f ? (unsigned)__float2int_rn(size * 512.0f)  // subnormal: multiples of 2^-9
                            : (bits + 0x7ffffu + (bits >> 20 & 1) - (120u << 23)) >> 20;
    return bits | __float_as_uint(x) >> 24 & 0x80;
}

// Four E4M3 codes to fp16, exactly: their values times 2^-8. The codes of bytes 0 and 2, and of bytes 1 and 3.
__device__ __forceinline__ void from_e4m3(unsigned codes, unsigned& even, unsigned& odd) {
    even = codes << 8 & 0x80008000u | codes << 7 & 0x3f803f80u;
    odd = codes & 0x80008000u | codes >> 1 & 0x3f803f80u;
}

__device__ __forceinline__ void store_pair(__half* target, int pair, float2 x, float factor) {
    reinterpret_cast<__half2*>(target)[pair] = __floats2half2_rn(x.x * factor, x.y * factor);
}
__device__ __forceinline__ void store_pair(unsigned char* target, int pair, float2 x, float factor) {
    reinterpret_cast<unsigned short*>(target)[pair] = to_e4m3(x.x * factor) | to_e4m3(x.y * factor) << 8;
}

__device__ __forceinline__ size_t head_in_page(int page, int kv_heads, int kv_head, int slot) {
    return (size_t)(page * kv_heads + kv_head) * (PAGE * HEAD_DIM) + slot * HEAD_DIM;
}

// One head as a warp holds it; in a step, two neighbours below HALF_DIM and the two that they pair with.
constexpr int QUARTER_DIM = HEAD_DIM / 4, HEAD_STEPS = (QUARTER_DIM + 31) / 32;
struct Head {
    float2 low[HEAD_STEPS], high[HEAD_STEPS];

    template <class Pair> __device__ __forceinline__ void load(const Pair* source) {
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; i++) {
            const int j = threadIdx.x % 32 + 32 * i;
            low[i] = high[i] = make_float2(0, 0);
            if (j < QUARTER_DIM) low[i] = pair_at(source + j), high[i] = pair_at(source + j + QUARTER_DIM);
        }
    }
    __device__ __forceinline__ void load_half(const __half* source) { load(reinterpret_cast<const __half2*>(source)); }

    // Stored fp16 times value_scale is the value; after the norm, what is held is the value.
    __device__ __forceinline__ void norm(const Head& weight, float eps, float value_scale) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; i++) {
            low[i].x *= value_scale, low[i].y *= value_scale;
            high[i].x *= value_scale, high[i].y *= value_scale;
            squares +=
                low[i].x * low[i].x + low[i].y * low[i].y + high[i].x * high[i].x + high[i].y * high[i].y;
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
        const float inverse = __fdividef(1.0f, sqrtf(squares / HEAD_DIM + eps));
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; i++) {
            low[i].x *= inverse * weight.low[i].x, low[i].y *= inverse * weight.low[i].y;
            high[i].x *= inverse * weight.high[i].x, high[i].y *= inverse * weight.high[i].y;
        }
    }
    __device__ __forceinline__ void rotate(const float4 (&r)[HEAD_STEPS]) {
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; i++) {
            const float2 a = low[i], b = high[i];
            low[i] = make_float2(a.x * r[i].x - b.x * r[i].y, a.y * r[i].z - b.y * r[i].w);
            high[i] = make_float2(b.x * r[i].x + a.x * r[i].y, b.y * r[i].z + a.y * r[i].w);
        }
    }
    template <class Number> __device__ __forceinline__ void store(Number* target, float factor) const {
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; i++) {
            const int j = threadIdx.x % 32 + 32 * i;
            if (j >= QUARTER_DIM) continue;
            store_pair(target, j, low[i], factor);
            store_pair(target, j + QUARTER_DIM, high[i], factor);
        }
    }
};

// What opens the heads of one token: a norm's weights (norm not null), and the rotation of its position, (cos, sin) of
// [position, HALF_DIM] (rope not null). Loaded first, so that it does not wait for the head.
struct Opening {
    Head weight;
    float4 rotation[HEAD_STEPS];
    bool normed, rotated;

    __device__ __forceinline__ void load(const float* norm, const float2* rope, int position) {
        normed = norm, rotated = rope;
        if (normed) weight.load(reinterpret_cast<const float2*>(norm));
#pragma unroll
        for (int i = 0; i < HEAD_STEPS; i++) {
            const int j = threadIdx.x % 32 + 32 * i;
            rotation[i] = make_float4(1, 0, 1, 0);
            if (rotated && j < QUARTER_DIM)
                rotation[i] = reinterpret_cast<const float4*>(rope + (size_t)position * HALF_DIM)[j];
        }
    }
    __device__ __forceinline__ void open(Head& head, float eps, float value_scale) const {
        if (normed) head.norm(weight, eps, value_scale);
        if (rotated) head.rotate(rotation);
    }
};

// A head's sink as one more score, in powers of two; it has no value.
__device__ __forceinline__ float sink_score(const float* sinks, int head) {
    return sinks ? sinks[head] * 1.4426950408889634f : -INFINITY;
}
