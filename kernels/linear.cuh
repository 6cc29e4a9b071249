// What the linear kernels of all weight formats share: y = x W^T on tensor cores, weights decoded in registers.
//
// Weights are the A operand. They lie as tiles of 16 rows x Tile::K columns, row tile by row tile, each Tile::BYTES
// contiguous bytes made by the format's `repack`. Within a step of 32 columns, lane 4 * g + t owns 8 of rows g and g+8:
// two mma of 16 columns, whose order of k is free as long as the activations follow it. Tile provides
//   Raw                           one lane's share of a tile
//   load<Source>(raw, tile, lane) reads it from shared memory, or another Source
//   load_pair(raw, tile, lane, p) reads what steps 2p and 2p+1 need of it
//   decode<plane>(raw, step, a)   the A fragments of the two mma of a step; a weight is the sum of PLANES planes
//   FRAGMENTS                     whether a Raw holds them as they are
//   BLOCK_SCALED, row_scale(raw)  whether float32 scales of rows g and g+8 apply to this tile's sum
//   position(c)                   where the 16-byte chunk c of a token's Tile::K activations lies in shared memory, so
//                                 that lane t finds those of its step at chunk 4 * step + t
//
// A gated pair alternates 8 gate rows and 8 up rows, so that d[0..1] and d[2..3] of an accumulator belong together.
#include "mma.cuh"
#include "activation.cuh"

enum Output { STORE_HALF = 0, STORE_FLOAT = 1, ADD_FLOAT = 2, STORE_ORDERED = 3, STORE_INTERLEAVED = 4 };  // order.cuh

// Where a tile is read from: shared memory, or global memory, once in a step.
struct Shared {
    static __device__ __forceinline__ uint4 read(const unsigned char* p) { return *reinterpret_cast<const uint4*>(p); }
};
struct Global {
    static __device__ __forceinline__ uint4 read(const unsigned char* p) { return load_streamed(p); }
};

struct Epilogue {
    void* out;               // [T, stride] half or float
    const float* row_scale;  // of packed rows: what the format leaves to the end
    const float* bias;       // of packed rows, or null
    int stride;              // elements between tokens, of ordered ones between slabs
    int features;            // output columns (of the product for a gated pair)
    int mode;                // Output
    int activation;          // ActivationKind
    float in_factor;         // 2^exponent of x
    float out_factor;        // 2^-exponent of y
};

__device__ __forceinline__ void store(const Epilogue& e, int token, int column, float value, float before) {
    size_t at = (size_t)token * e.stride + column;
    value *= e.out_factor;
    if (e.mode == STORE_HALF) reinterpret_cast<__half*>(e.out)[at] = __float2half_rn(value);
    else reinterpret_cast<float*>(e.out)[at] = before + value;
}

// Swizzle of activations in shared memory: neighbouring tokens use different halves of the banks.
template <class Tile> __device__ __forceinline__ int chunk_at(int token, int chunk) {
    return token * (Tile::K / 8) + (chunk ^ ((token & 1) << 2));
}

// 8 halves of a row from k, zero past its end, wherever it lies: few instructions for what is rare.
__device__ __forceinline__ uint4 eight_halves(const __half* row, int k, int K) {
    uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (int i = 7; i >= 0; i--)
        v = make_uint4(v.x << 16 | (k + i < K ? __half_as_ushort(row[k + i]) : 0), __funnelshift_l(v.x, v.y, 16),
                       __funnelshift_l(v.y, v.z, 16), __funnelshift_l(v.z, v.w, 16));
    return v;
}

// 8 activations (from column k of a row of K) to shared memory as 16 bytes, zero past the end. `aligned`: K % 8 == 0.
__device__ __forceinline__ void stage_chunk(uint4* shared, const __half* row, int k, int K, bool valid, bool aligned) {
    if (aligned) {
        valid = valid && k < K;
        copy_async(shared, valid ? row + k : row, valid ? 16 : 0);
    } else *shared = valid ? eight_halves(row, k, K) : make_uint4(0, 0, 0, 0);
}

template <class Tile, int N>
__device__ __forceinline__ void multiply(float (&acc)[N][4], const typename Tile::Raw& raw, int step,
                                         const uint4 (&b)[N]) {
    unsigned a[2][4];
    if constexpr (Tile::BLOCK_SCALED) {
        float part[N][4] = {};
        Tile::template decode<0>(raw, step, a);
#pragma unroll
        for (int n = 0; n < N; n++) {
            mma(part[n], a[0], b[n].x, b[n].y);
            mma(part[n], a[1], b[n].z, b[n].w);
        }
        float2 s = Tile::row_scale(raw);
#pragma unroll
        for (int n = 0; n < N; n++) {
            acc[n][0] += part[n][0] * s.x; acc[n][1] += part[n][1] * s.x;
            acc[n][2] += part[n][2] * s.y; acc[n][3] += part[n][3] * s.y;
        }
    } else {
        Tile::template decode<0>(raw, step, a);
#pragma unroll
        for (int n = 0; n < N; n++) mma(acc[n], a[0], b[n].x, b[n].y);
#pragma unroll
        for (int n = 0; n < N; n++) mma(acc[n], a[1], b[n].z, b[n].w);
        if constexpr (Tile::PLANES == 2) {
            Tile::template decode<1>(raw, step, a);
#pragma unroll
            for (int n = 0; n < N; n++) mma(acc[n], a[0], b[n].x, b[n].y);
#pragma unroll
            for (int n = 0; n < N; n++) mma(acc[n], a[1], b[n].z, b[n].w);
        }
    }
}

#include "linear_few.cuh"
#include "linear_many.cuh"

// -- Repacking ----------------------------------------------------------------------------------------------------

// Which packed row holds row r of a part: parts stand below each other from `first`, or alternate by 8 rows (gated_part
// 0 or 1; -1 otherwise).
__device__ __forceinline__ int packed_row(int r, int first, int gated_part) {
    return gated_part < 0 ? first + r : r / 8 * 16 + gated_part * 8 + r % 8;
}

// The largest squared 2-norm of the rows: sums in a fixed order, and a maximum does not depend on order.
// Call with all threads of a block that has repacked one row.
__device__ __forceinline__ void record_norm(float sum, unsigned* largest) {
    __shared__ float warps[32];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; w++) sum += warps[w];
        atomicMax(largest, __float_as_uint(sum));  // non-negative floats order as their bits; NaN is above all
    }
}

#define EPILOGUE_PARAMETERS                                                                                            \
    void *out, const float *row_scale, const float *bias, int stride, int features, int mode, int activation,          \
        float in_factor, float out_factor
#define EPILOGUE {out, row_scale, bias, stride, features, mode, activation, in_factor, out_factor}

#include "experts.cuh"

// A variant of one kernel or of another: see fp4rt/ops/cuda/linear.py and experts.py for the constants.
#if !defined(SUM_WARPS)
#define SUM_WARPS 1
#define SUM_DIVIDED 0
#endif
#ifdef MANY_STAGES
#define MANY_TOKENS(Tile, GATHER)                                                                                      \
    many_tokens<Tile, MANY_ROW_WARPS, MANY_ROW_TILES, MANY_TOKEN_WARPS, MANY_TOKEN_TILES, MANY_STAGES, GATHER,         \
                SumOrder<SUM_WARPS, SUM_DIVIDED>>
#define MANY_TOKENS_PER_BLOCK (MANY_TOKEN_WARPS * MANY_TOKEN_TILES * 8)
#define MANY_BOUNDS __launch_bounds__(MANY_ROW_WARPS* MANY_TOKEN_WARPS * 32, 1)
#endif

#ifdef WARPGROUP_STAGES
#include "linear_wgmma.cuh"
#define WARPGROUP_BOUNDS __cluster_dims__(WARPGROUP_SPLIT) __launch_bounds__(384, WARPGROUP_BLOCKS)
#define WARPGROUP_TILES(Tile, GROUPED)                                                                                 \
    warpgroup_tokens<Tile, WARPGROUP_ROWS / 128, WARPGROUP_TOKENS, WARPGROUP_STAGES, WARPGROUP_SPLIT,                  \
                     WARPGROUP_BLOCKS, GROUPED, SumOrder<SUM_WARPS, SUM_DIVIDED>>
#endif

#if defined(WARPGROUP_STAGES) && defined(EXPERTS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void WARPGROUP_BOUNDS                                                                        \
        many_experts_warpgroups(const unsigned char* weights, const unsigned char* x, const int4* blocks, int count,   \
                                int padded, int K, int row_tiles, EPILOGUE_PARAMETERS) {                               \
        const Epilogue e = EPILOGUE;                                                                                   \
        WARPGROUP_TILES(Tile, true)(weights, x, 0, padded, K, row_tiles, 1, blocks, count, e);                         \
    }
#elif defined(WARPGROUP_STAGES)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void WARPGROUP_BOUNDS                                                                        \
        many_warpgroups(const unsigned char* weights, const unsigned char* x, int tokens, int padded, int K,           \
                        int row_tiles, int parts, EPILOGUE_PARAMETERS) {                                               \
        const Epilogue e = EPILOGUE;                                                                                   \
        WARPGROUP_TILES(Tile, false)(weights, x, tokens, padded, K, row_tiles, parts, nullptr, 0, e);                  \
    }
#elif defined(MANY_STAGES) && defined(EXPERTS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void MANY_BOUNDS                                                                             \
        many_experts(const unsigned char* weights, const __half* x, const int* rows, const int4* blocks, int K,        \
                     int row_tiles, EPILOGUE_PARAMETERS) {                                                             \
        Epilogue e = EPILOGUE;                                                                                         \
        const int4 block = expert_block<Tile>(blocks, weights, K, row_tiles, e);                                       \
        if (block.y >= block.z) return;                                                                                \
        MANY_TOKENS(Tile, true)(weights, x, rows, block.y, block.z, K, row_tiles, 1, e);                               \
    }
#elif defined(MANY_STAGES)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void MANY_BOUNDS                                                                             \
        many(const unsigned char* weights, const __half* x, int tokens, int K, int row_tiles, int parts,               \
             EPILOGUE_PARAMETERS) {                                                                                    \
        const Epilogue e = EPILOGUE;                                                                                   \
        MANY_TOKENS(Tile, false)(weights, x, nullptr, blockIdx.x * MANY_TOKENS_PER_BLOCK, tokens, K, row_tiles, parts, \
                                 e);                                                                                   \
    }
#elif defined(EXPERTS)
// Registers for 40 warps on an SM, or fewer where a format or two row tiles need more.
#define EXPERT_BLOCKS(Tile)                                                                                            \
    ((Tile::PLANES == 2 || Tile::BLOCK_SCALED ? 16 : Tile::BYTES >= 2048 ? 24 : EXPERT_ROW_TILES == 2 ? 32 : 40) /     \
     EXPERT_WARPS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS * 32, EXPERT_BLOCKS(Tile))                               \
        few_experts(const unsigned char* weights, const __half* x, int x_slots, int K, int row_tiles, const int* ids,  \
                    int tokens, int slots, int always, int routed, const float* shares,                                \
                    unsigned long long* handed_over, int adders, EPILOGUE_PARAMETERS) {                                \
        const Choices choices = {ids, tokens, slots, always, routed, shares, handed_over, adders};                     \
        const Epilogue e = EPILOGUE;                                                                                   \
        chosen_experts<Tile, EXPERT_WARPS, EXPERT_ROW_TILES, false>(weights, x, x_slots, K, row_tiles, choices, {}, e);\
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS * 32, EXPERT_BLOCKS(Tile))                               \
        few_grouped(const unsigned char* weights, const __half* x, const int* rows, const int4* blocks, int K,         \
                    int row_tiles, EPILOGUE_PARAMETERS) {                                                              \
        const Epilogue e = EPILOGUE;                                                                                   \
        chosen_experts<Tile, EXPERT_WARPS, EXPERT_ROW_TILES, true>(weights, x, 0, K, row_tiles, {}, {blocks, rows}, e);\
    }
#else
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, FEW_BLOCKS)                                           \
        few(const unsigned char* weights, const void* x, int tokens, int K, int row_tiles, int parts,                  \
            unsigned long long* handed_over, const float* norm, float norm_eps, float norm_factor,                     \
            EPILOGUE_PARAMETERS) {                                                                                     \
        const RowNorm before = {norm, norm_eps, norm_factor};                                                          \
        const Epilogue e = EPILOGUE;                                                                                   \
        few_tokens<Tile, FEW_WARPS, FEW_DEPTH, FEW_DIVISION>(weights, x, tokens, K, row_tiles, parts, handed_over,     \
                                                             before, e);                                               \
    }
#endif
