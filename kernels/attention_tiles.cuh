// Keys, values and queries of one head as a warp of attention_decode takes them to the tensor cores.
#include "attention.cuh"

// -D: HEAD_TILES of eight query heads that a block has; SPLIT: warps that share keys, each with its dimensions;
// CLUSTER: blocks of one; STAGED: 1 where shared memory has room for tiles that are on their way, else 0; SMALL: 1 for
// blocks whose tiles wait nowhere else, so that more share an SM.
constexpr int PART_DIM = HEAD_DIM / SPLIT;
constexpr int WARPS = SPLIT == 4 ? 8 : 4, THREADS = 32 * WARPS;
constexpr int KEY_WARPS = WARPS / SPLIT;
constexpr int TILE = 16;                // keys of one warp at a time
constexpr int TURN = KEY_WARPS * TILE;  // keys of a block at a time
constexpr int HEADS = 8 * HEAD_TILES;   // query heads of one block

// Numbers from row to row of keys and of values in shared memory, so that neighbouring lanes meet no bank conflicts.
constexpr int ROW_BYTES = PART_DIM * sizeof(Kv);
constexpr int KEY_STRIDE = ((ROW_BYTES + 63) / 128 * 128 + 64) / sizeof(Kv);
constexpr int VALUE_STRIDE = ((ROW_BYTES + 111) / 128 * 128 + 16) / sizeof(Kv);

// A head's PART_DIM numbers as a lane holds them for the tensor cores. Which dimension is which k of a
// product does not matter as long as both operands agree, so lane t of a quad takes 8 neighbours of every 32
// (4 of a last 16).
constexpr int WIDE = PART_DIM / 32, NARROW = PART_DIM % 32 / 16;

// Read past L1, which a kernel that starts early may find as the step before left it.
template <class T> __device__ __forceinline__ T fetch(const T* p) { return __ldcg(p); }

// 8, 4 and 2 numbers.
#if KV_FP8
using Eight = uint2;
using Four = unsigned;
using Two = unsigned short;
#else
using Eight = uint4;
using Four = uint2;
using Two = unsigned;
#endif

// Two k steps of a row of queries as operand B, read where they are used: registers are for keys and values to come.
__device__ __forceinline__ uint4 query_steps(const __half* row, int pair, int t) {
    uint4 q;
    if (pair < WIDE)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
            : "r"((unsigned)__cvta_generic_to_shared(row + 32 * pair + 8 * t)));
    else
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(q.x), "=r"(q.y)
            : "r"((unsigned)__cvta_generic_to_shared(row + 32 * pair + 4 * t)));
    if (!KV_FP8) return q;
    return make_uint4(__byte_perm(q.x, q.y, 0x5410), __byte_perm(q.x, q.y, 0x7632),
                      __byte_perm(q.z, q.w, 0x5410), __byte_perm(q.z, q.w, 0x7632));
}

// A row of keys as half of operand A.
struct KeyRow {
    Eight wide[WIDE + 1];
    Four narrow;

    __device__ __forceinline__ void load(const Kv* row, int t) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) wide[j] = fetch(reinterpret_cast<const Eight*>(row + 32 * j + 8 * t));
        if (NARROW) narrow = fetch(reinterpret_cast<const Four*>(row + 32 * WIDE + 4 * t));
    }
    __device__ __forceinline__ void load_shared(const Kv* row, int t) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) wide[j] = *reinterpret_cast<const Eight*>(row + 32 * j + 8 * t);
        if (NARROW) narrow = *reinterpret_cast<const Four*>(row + 32 * WIDE + 4 * t);
    }
    __device__ __forceinline__ uint2 step(int k) const {
#if KV_FP8
        uint2 pair;
        from_e4m3(k == 2 * WIDE ? narrow : k % 2 ? wide[k / 2].y : wide[k / 2].x, pair.x, pair.y);
        return pair;
#else
        if (k == 2 * WIDE) return narrow;
        return k % 2 ? make_uint2(wide[k / 2].z, wide[k / 2].w) : make_uint2(wide[k / 2].x, wide[k / 2].y);
#endif
    }
};

// Rows 2t, 2t+1, 2t+8, 2t+9 of a tile of 16 values: lane g of the eight takes W neighbouring dimensions of
// every 8 W. As operand A of value^T * probability^T, pair i of the four rows becomes rows g and g+8 of a
// 16-row tile, which are the dimensions W g + 2i and W g + 2i + 1.
struct ValueTile {
    static constexpr int FULL = PART_DIM / 64, HALF = PART_DIM % 64 / 32, QUARTER = PART_DIM % 32 / 16;
    static constexpr int PAIRED = 4 * FULL + 2 * HALF;  // tiles whose neighbour has a lane's next two dimensions
    Eight full[4][FULL + 1];
    Four half[4];
    Two quarter[4];

    static __device__ __forceinline__ int key(int r, int t) { return 2 * t + r % 2 + r / 2 * 8; }

    __device__ __forceinline__ void load(const Kv* tile, int g, int t) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const Kv* row = tile + key(r, t) * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < FULL; j++)
                full[r][j] = fetch(reinterpret_cast<const Eight*>(row + 64 * j + 8 * g));
            if (HALF) half[r] = fetch(reinterpret_cast<const Four*>(row + 64 * FULL + 4 * g));
            if (QUARTER) quarter[r] = fetch(reinterpret_cast<const Two*>(row + PART_DIM - 16 + 2 * g));
        }
    }
    __device__ __forceinline__ void load_staged(const Kv* tile, int g, int t) {
#pragma unroll
        for (int r = 0; r < 4; r++) load_shared(r, tile + key(r, t) * VALUE_STRIDE, g);
    }
    __device__ __forceinline__ void load_shared(int r, const Kv* row, int g) {
#pragma unroll
        for (int j = 0; j < FULL; j++) full[r][j] = *reinterpret_cast<const Eight*>(row + 64 * j + 8 * g);
        if (HALF) half[r] = *reinterpret_cast<const Four*>(row + 64 * FULL + 4 * g);
        if (QUARTER) quarter[r] = *reinterpret_cast<const Two*>(row + PART_DIM - 16 + 2 * g);
    }
    // Rows r and r+1 of tile m of 16 dimensions: the first of a lane's two dimensions, and the second.
    __device__ __forceinline__ uint2 operand(int r, int m) const {
#if KV_FP8
        unsigned codes, first, second;
        if (m < 4 * FULL)
            codes = m % 4 < 2 ? interleave(full[r][m / 4].x, full[r + 1][m / 4].x, m % 2)
                              : interleave(full[r][m / 4].y, full[r + 1][m / 4].y, m % 2);
        else if (HALF && m < 4 * FULL + 2) codes = interleave(half[r], half[r + 1], m % 2);
        else codes = interleave(quarter[r], quarter[r + 1], 0);
        from_e4m3(codes, first, second);
        return make_uint2(first, second);
#else
        const unsigned a = word(r, m), b = word(r + 1, m);
        return make_uint2(interleave(a, b, 0), interleave(a, b, 1));
#endif
    }
    // The lower 16 bits of both, or the upper.
    static __device__ __forceinline__ unsigned interleave(unsigned a, unsigned b, int upper) {
        return __byte_perm(a, b, upper ? 0x7632 : 0x5410);
    }
#if !KV_FP8
    __device__ __forceinline__ unsigned word(int r, int m) const {
        if (m < 4 * FULL) {
            const uint4& v = full[r][m / 4];
            return m % 4 == 0 ? v.x : m % 4 == 1 ? v.y : m % 4 == 2 ? v.z : v.w;
        }
        if (HALF && m < 4 * FULL + 2) return m == 4 * FULL ? half[r].x : half[r].y;
        return quarter[r];
    }
#endif
    // The first of the two dimensions of tile m that this lane holds.
    __device__ __forceinline__ static int dimension(int m, int g) {
        if (m < 4 * FULL) return m / 4 * 64 + 8 * g + m % 4 * 2;
        if (HALF && m < 4 * FULL + 2) return 64 * FULL + 4 * g + (m - 4 * FULL) * 2;
        return PART_DIM - 16 + 2 * g;
    }
};

// A warp's tile of keys or values on its way to shared memory.
__device__ __forceinline__ void stage(Kv* to, int stride, const Kv* tile) {
    constexpr int PIECES = ROW_BYTES / 16, ROWS = 32 / PIECES;  // of 16 bytes in a row; rows of a pass
    const int lane = threadIdx.x % 32;
    if constexpr (32 % PIECES == 0) {
        const int first = lane / PIECES, at = lane % PIECES * (16 / sizeof(Kv));
        to += first * stride + at, tile += first * HEAD_DIM + at;
#pragma unroll
        for (int row = 0; row < TILE; row += ROWS) copy_async(to + row * stride, tile + row * HEAD_DIM, 16);
    } else {
#pragma unroll
        for (int i = 0; i < (ROW_BYTES + 31) / 32; i++) {
            const int piece = lane + 32 * i, row = piece / PIECES, at = piece % PIECES * (16 / sizeof(Kv));
            if (ROW_BYTES % 32 && row >= TILE) break;
            copy_async(to + row * stride + at, tile + row * HEAD_DIM + at, 16);
        }
    }
}

__device__ __forceinline__ unsigned transpose8x8(unsigned x) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
