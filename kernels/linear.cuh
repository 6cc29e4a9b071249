// The two linear kernels that all weight formats share: y = x W^T on tensor cores, weights decoded in registers.
//
// Weights are the A operand. They lie as tiles of 16 rows x Tile::K columns, row tile by row tile, each Tile::BYTES
// contiguous bytes made by the format's `repack`. Within a step of 32 columns, lane 4 * g + t owns 8 of rows g and g+8:
// two mma of 16 columns, whose order of k is free as long as the activations follow it. Tile provides
//   Raw                           one lane's share of a tile
//   load(raw, tile, lane)         reads it from shared memory
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
#include "norm.cuh"

enum Output { STORE_HALF = 0, STORE_FLOAT = 1, ADD_FLOAT = 2, STORE_ORDERED = 3, STORE_INTERLEAVED = 4 };  // order.cuh

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

// 8 activations (from column k of a row of K) to shared memory as 16 bytes, zero past the end. `aligned`: K % 8 == 0.
__device__ __forceinline__ void stage_chunk(uint4* shared, const __half* row, int k, int K, bool valid, bool aligned) {
    if (aligned) {
        valid = valid && k < K;
        copy_async(shared, valid ? row + k : row, valid ? 16 : 0);
    } else {
        __half values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = valid && k + i < K ? row[k + i] : __float2half_rn(0.0f);
        *shared = *reinterpret_cast<uint4*>(values);
    }
}

// What stands before a linear: y = W fp16(norm(x) * factor), x in float32. weight null: none, and x is fp16.
struct RowNorm {
    const float* weight;
    float eps, factor;
};

// 8 of a row's columns from k, zero past the end. `aligned`: K % 8 == 0.
__device__ __forceinline__ void load_eight(float4 (&to)[2], const float* row, int k, int K, bool aligned) {
    to[0] = to[1] = make_float4(0, 0, 0, 0);
    if (aligned) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (k < K) to[i] = reinterpret_cast<const float4*>(row + k)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (k + i < K) (&to[i / 4].x)[i % 4] = row[k + i];
    }
}

__device__ __forceinline__ uint4 normed_eight(const float4 (&x)[2], float scale, const float4 (&weight)[2]) {
    const uint2 low = normed(x[0], scale, weight[0]), high = normed(x[1], scale, weight[1]);
    return make_uint4(low.x, low.y, high.x, high.y);
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

// -- Few tokens ---------------------------------------------------------------------------------------------------
//
// A block takes row tiles blockIdx.x, blockIdx.x + gridDim.x, ...; its warps split the columns (tile kt belongs to warp
// kt % WARPS) and their sums are added in warp order, so a token's result depends neither on the number of tokens nor
// on the grid. Each warp has a ring of DEPTH slots in shared memory and keeps weights on the way, across row tiles,
// while it computes; the first ones before the predecessor is done. The warp's own columns of the activations are
// fetched once; where shared memory is too small for them (not RESIDENT) they come through the ring with the weights.
// Resident activations (not HALVED, below) may be normed on the way: every block sums a row's squares itself, as
// rms_norm.cu does.
//
// A weight with too many columns for eight resident tokens is HALVED: the sums over the warps' first tiles and over the
// others are added up apart, and then the two. SPLIT, two blocks share each row tile, one half of the columns each: the
// same additions, with half the activations in a block. They take turns to write a row tile; the other hands its sums
// over through memory, each with a mark beside it. Both are on the chip at the same time: all blocks of the grid find
// places there, and later kernels start none before these have. The halves take turns to have an odd tile.
//
// Dynamic shared memory: rings [WARPS][DEPTH][slot]; resident activations [WARPS][tiles of a warp][tokens][Tile::K]
// halves; sums [2][HALVED and not SPLIT: 2][WARPS][tokens][SUM_STRIDE] floats.

constexpr int SUM_STRIDE = 20;  // floats between columns of 16 rows: conflict-free for the accumulators' layout

// HALVED: how many of a warp's tiles are the first half; `large`: half of those of the warp that has most, rounded up.
// SPLIT: handed_over [row tiles][tokens][16] is zero before and after.
struct Halves {
    int large;
    unsigned long long* handed_over;

    __device__ __forceinline__ int first(int row_tile, int tiles) const {
        return row_tile >> 1 & 1 ? tiles - large : large;
    }
};

template <class Tile, int WARPS, int DEPTH, bool RESIDENT, bool HALVED, bool SPLIT>
__device__ __forceinline__ void few_tokens(const unsigned char* weights, const void* x, int tokens, int K,
                                           int row_tiles, const Halves& halves, const RowNorm& norm,
                                           const Epilogue& e) {
    extern __shared__ uint4 shared[];
    constexpr int CHUNKS = Tile::K / 8, STEPS = Tile::K / 32, TILE = Tile::BYTES / 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int k_tiles = (K + Tile::K - 1) / Tile::K, x_tile = tokens * CHUNKS;
    const int block = SPLIT ? blockIdx.x / 2 : blockIdx.x, blocks = SPLIT ? gridDim.x / 2 : gridDim.x;
    const int part = SPLIT ? blockIdx.x % 2 : 0;
    // A warp has `all` tiles of a row, or one has `tiles`; this block may need `mine` of them from `first` on, and of a
    // row tile those from begin(row_tile) up to end(row_tile).
    const int all = max(0, (k_tiles - warp + WARPS - 1) / WARPS), tiles = (k_tiles + WARPS - 1) / WARPS;
    const int first = SPLIT && part ? tiles - halves.large : 0, most = SPLIT ? halves.large : tiles;
    const int mine = SPLIT ? max(0, min(all - first, most)) : all;
    auto begin = [&](int row_tile) { return SPLIT && part ? halves.first(row_tile, tiles) : 0; };
    auto end = [&](int row_tile) { return SPLIT && !part ? min(all, halves.first(row_tile, tiles)) : all; };
    // A slot is free as soon as its tile is in registers, unless activations lie behind it or registers are short.
    constexpr bool FETCH_EARLY = RESIDENT && sizeof(typename Tile::Raw) <= 64;
    const int slot_size = RESIDENT ? TILE : TILE + x_tile;
    constexpr bool NORMS = RESIDENT && !HALVED;
    constexpr int HALF_SETS = HALVED && !SPLIT ? 2 : 1;
    const bool aligned = K % 8 == 0;
    // Places in shared memory are offsets in bytes: half the registers of pointers.
    unsigned char* const base = reinterpret_cast<unsigned char*>(shared);
    const unsigned slot_bytes = slot_size * 16, ring = warp * DEPTH * slot_bytes, ring_end = ring + DEPTH * slot_bytes;
    const unsigned all_x = WARPS * DEPTH * slot_bytes, own_x = all_x + warp * most * x_tile * 16;
    float* const sums = reinterpret_cast<float*>(base + all_x + (RESIDENT ? WARPS * most * x_tile * 16 : 0));

    auto fetch_x = [&](unsigned to, int i) {  // the activations of this warp's i-th tile
        const int k = (warp + (first + i) * WARPS) * Tile::K + lane % CHUNKS * 8, c = Tile::position(lane % CHUNKS);
        for (int token = lane / CHUNKS; token < tokens; token += 32 / CHUNKS)
            stage_chunk(reinterpret_cast<uint4*>(base + to) + chunk_at<Tile>(token, c),
                        static_cast<const __half*>(x) + (size_t)token * K, k, K, true, aligned);
    };
    // What is fetched next: this lane's part of a tile, the tile's number among the warp's, and its row tile.
    auto place = [&](int row_tile, int i) {
        return weights + ((size_t)row_tile * k_tiles + warp + i * WARPS) * Tile::BYTES + lane * 16;
    };
    const unsigned char* tile = place(block, begin(block));
    const int to_next_row = (blocks * k_tiles - all * WARPS) * Tile::BYTES;
    int number = begin(block), fetch_row = all > 0 ? block : row_tiles;
    auto fetch = [&](unsigned slot) {
        if (SPLIT)
            while (fetch_row < row_tiles && number >= end(fetch_row)) {  // a half may hold none of the warp's tiles
                fetch_row += blocks;
                number = begin(fetch_row);
                tile = place(fetch_row, number);
            }
        if (fetch_row < row_tiles) {
#pragma unroll
            for (int i = 0; i < TILE; i += 32)
                if (i + 32 <= TILE || lane < TILE - i) copy_async(base + slot + (i + lane) * 16, tile + i * 16, 16);
            if constexpr (!RESIDENT) fetch_x(slot + TILE * 16, number);
            tile += WARPS * Tile::BYTES;
            if (++number == all && !SPLIT) number = 0, tile += to_next_row, fetch_row += blocks;
        }
        copy_commit();
    };

    // Resident activations come by plain loads: cp.async of lines that all SMs want at once takes several times longer,
    // and would have to wait for the weights before them. 1 / ROWS of a warp takes the columns of one tile and token.
    constexpr int ROWS = 32 / CHUNKS;
    const int c = lane % CHUNKS, to_c = Tile::position(c);
    uint4* const resident = reinterpret_cast<uint4*>(base + own_x);
    auto column = [&](int i) { return (warp + (first + i) * WARPS) * Tile::K + c * 8; };
    auto load_x = [&]() {
        const __half* rows = static_cast<const __half*>(x);
        if (!aligned) {
            for (int i = 0; i < mine; i++) fetch_x(own_x + i * x_tile * 16, i);
            __syncwarp();
            return;
        }
        int i = 0, token = lane / CHUNKS;
        auto carry = [&]() {
            while (token >= tokens) token -= tokens, i++;
        };
        carry();
        while (i < mine) {
            uint4 values[8];
            int to[8];
#pragma unroll
            for (int u = 0; u < 8; u++) {
                to[u] = i < mine ? i * x_tile + chunk_at<Tile>(token, to_c) : -1;
                values[u] = make_uint4(0, 0, 0, 0);
                if (i < mine && column(i) < K)
                    values[u] = *reinterpret_cast<const uint4*>(rows + (size_t)token * K + column(i));
                token += ROWS;
                carry();
            }
#pragma unroll
            for (int u = 0; u < 8; u++)
                if (to[u] >= 0) resident[to[u]] = values[u];
        }
        __syncwarp();
    };
    // The same, normed. Parts of a warp take turns with the tiles; the weights of the first are read before the
    // predecessor is done.
    float4 norm_weight[2];
    auto load_norm_weight = [&](int i) { load_eight(norm_weight, norm.weight, column(i), K, aligned); };
    auto load_normed = [&]() {
        const float* rows = static_cast<const float*>(x);
#pragma unroll 1
        for (int token = 0; token < tokens; token += 2) {
            const float* const row = rows + (size_t)token * K;
            const bool two = token + 1 < tokens;
            float squares[2];
            warp_squares<WARPS * 32>(squares, {row, two ? row + K : nullptr}, K);
            if (lane == 0) sums[warp * tokens + token] = squares[0];
            if (lane == 0 && two) sums[warp * tokens + token + 1] = squares[1];
        }
        __syncthreads();
#pragma unroll 1
        for (int i = lane / CHUNKS; i < mine; i += ROWS) {
            if (i >= ROWS) load_norm_weight(i);
#pragma unroll 1
            for (int token = 0; token < tokens; token += 2) {
                const float* const row = rows + (size_t)token * K;
                float4 values[2][2];
                load_eight(values[0], row, column(i), K, aligned);
                if (token + 1 < tokens) load_eight(values[1], row + K, column(i), K, aligned);
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    if (token + u >= tokens) continue;
                    const float scale = norm.factor / row_length<WARPS>(sums + token + u, tokens, K, norm.eps);
                    uint4& to = resident[i * x_tile + chunk_at<Tile>(token + u, to_c)];
                    to = normed_eight(values[u], scale, norm_weight);
                }
            }
        }
        __syncthreads();  // the sums' place is free again
    };

    dependents_may_start();
    if constexpr (RESIDENT) {
#pragma unroll 1
        for (unsigned slot = ring; slot != ring_end; slot += slot_bytes) fetch(slot);
        if (NORMS && norm.weight) load_norm_weight(lane / CHUNKS);
    }
    for (int i = threadIdx.x; block + i * blocks < row_tiles; i += WARPS * 32)
        prefetch(e.row_scale + (block + i * blocks) * 16);
    wait_for_predecessor();
    if constexpr (RESIDENT) {
        if (NORMS && norm.weight) load_normed();
        else load_x();
    } else {
#pragma unroll 1
        for (unsigned slot = ring; slot != ring_end; slot += slot_bytes) fetch(slot);
    }

    // Lane t of token g finds the chunk of a step 4 chunks further each step, the swizzle apart.
    const int token = min(g, tokens - 1), swizzle = (token & 1) * 4;  // columns past the last token repeat it, unused
    const unsigned even = (token * CHUNKS + t + swizzle) * 16;
    // The warps that add up a row tile's sums take turns; the others go on to the next one. There are two sets of sums,
    // each with a barrier for "written", where the adders wait, and one for "read", where all others wait before they
    // write it again (the adders wait for each other at once).
    enum { WRITTEN = 1, READ = 3, ADDED = 5 };
    const int adders = (tokens + 1) / 2;  // warps: 16 rows x tokens threads
    const bool gated = is_gated(e.activation);
    int added = 0;  // bit: whether this warp read that set
    unsigned drain = ring;
    int turn = warp, count = 0;
    for (int row_tile = block; row_tile < row_tiles; row_tile += blocks, count++) {
        const bool adds = turn < adders;
        float row_scale = 0.0f, bias = 0.0f, before = 0.0f;
        if (adds) {  // What the outputs need is fetched now: its latency would stand at the end otherwise.
            const int slot = turn * 32 + lane, row = slot % 16, column_token = slot / 16, packed = row_tile * 16 + row;
            const int column = gated ? row_tile * 8 + row % 8 : packed;
            row_scale = e.row_scale[packed];
            if (e.bias) bias = e.bias[packed];
            if (e.mode == ADD_FLOAT && column_token < tokens && column < e.features)
                before = reinterpret_cast<const float*>(e.out)[(size_t)column_token * e.stride + column];
        }

        const int which = count & 1, half_size = WARPS * tokens * SUM_STRIDE;
        float* const set = sums + which * HALF_SETS * half_size;
        float acc[1][4] = {};
        auto put_sums = [&](int half) {
            if (half == 0 && count >= 2 && !(added >> which & 1)) barrier_wait(READ + which, WARPS * 32);
            float* own = set + half * half_size + warp * tokens * SUM_STRIDE + 2 * t * SUM_STRIDE + g;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (2 * t + j >= tokens) continue;
                float* two = own + j * SUM_STRIDE;
                two[0] = acc[0][j];
                two[8] = acc[0][2 + j];
            }
        };
        const int last_tile = end(row_tile), second_half = HALF_SETS == 2 ? halves.first(row_tile, tiles) : 0;
        unsigned x_at = own_x + even + (begin(row_tile) - first) * x_tile * 16;
#pragma unroll 1
        for (int i = begin(row_tile); i < last_tile; i++) {
            if (HALF_SETS == 2 && i == second_half) {
                put_sums(0);
                acc[0][0] = acc[0][1] = acc[0][2] = acc[0][3] = 0.0f;
            }
            copy_wait<DEPTH - 1>();
            __syncwarp();
            if constexpr (!RESIDENT) x_at = drain + TILE * 16 + even;
            const uint4* x_even = reinterpret_cast<const uint4*>(base + x_at);
            const uint4* x_odd = reinterpret_cast<const uint4*>(base + (x_at - 32 * swizzle));
            typename Tile::Raw raw;
            Tile::load(raw, base + drain, lane);
            if constexpr (FETCH_EARLY) {
                __syncwarp();
                fetch(drain);
            }
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const uint4 b[1] = {(step % 2 ? x_odd : x_even)[4 * step]};
                multiply<Tile>(acc, raw, step, b);
            }
            if constexpr (!FETCH_EARLY) {
                __syncwarp();
                fetch(drain);
            }
            x_at += x_tile * 16;
            drain += slot_bytes;
            if (drain == ring_end) drain = ring;
        }

        if (HALF_SETS == 2 && last_tile <= second_half) {  // nothing in the second half
            put_sums(0);
            acc[0][0] = acc[0][1] = acc[0][2] = acc[0][3] = 0.0f;
        }
        put_sums(HALF_SETS - 1);
        if (!adds) barrier_arrive(WRITTEN + which, WARPS * 32);
        else {
            const int slot = turn * 32 + lane, row = slot % 16, column_token = slot / 16;
            const int column = gated ? row_tile * 8 + row % 8 : row_tile * 16 + row;
            const bool valid = column_token < tokens;
            bool writes = valid && column < e.features && !(gated && row >= 8);
            barrier_wait(WRITTEN + which, WARPS * 32);
            float value = 0.0f;
            if (valid) {
                const float* warps = set + column_token * SUM_STRIDE + row;
#pragma unroll
                for (int w = 0; w < WARPS; w++) value += warps[w * tokens * SUM_STRIDE];
                if constexpr (HALF_SETS == 2) {
                    float second = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) second += warps[half_size + w * tokens * SUM_STRIDE];
                    value += second;
                }
            }
            barrier_wait(ADDED + which, adders * 32);
            barrier_arrive(READ + which, WARPS * 32);
            if constexpr (SPLIT) {
                volatile unsigned long long* const exchange =
                    halves.handed_over + (size_t)row_tile * tokens * 16 + slot;
                if ((count & 1) != part) {
                    if (valid) *exchange = 1ull << 32 | __float_as_uint(value);
                    writes = false;
                } else if (valid) {
                    unsigned long long other;
                    while (!(other = *exchange)) {}
                    *exchange = 0;
                    value += __uint_as_float((unsigned)other);
                }
            }
            value = value * (row_scale * e.in_factor) + bias;
            const float up = __shfl_down_sync(0xffffffffu, value, 8, 16);
            if (gated) value = gated_product(value, up, e.activation);
            else if (e.activation == RELU2) value = relu2(value);
            if (writes) store(e, column_token, column, value, before);
        }
        added = (added & ~(1 << which)) | adds << which;
        turn = turn < adders ? turn + WARPS - adders : turn - adders;
    }
}

// -- Many tokens --------------------------------------------------------------------------------------------------
//
// A block computes RW * RT * 16 rows for TW * NT * 8 tokens (RW x TW warps). Weights (packed) and activations go
// through STAGES buffers in shared memory; each warp decodes the row tiles of its own part.
// Grid: (token blocks, row blocks), tokens fastest, so that weights come from memory once and activations from L2.
//
// It takes outputs first_token up to `tokens`; with GATHER and `rows`, output i is of row rows[i] of x.
//
// Dynamic shared memory: [STAGES] of weights [RW * RT][Tile::BYTES], activations [tokens][Tile::K] halves.

template <class Tile, int RW, int RT, int TW, int NT, int STAGES, bool GATHER>
__device__ __forceinline__ void many_tokens(const unsigned char* weights, const __half* x, const int* rows,
                                            int first_token, int tokens, int K, int row_tiles, const Epilogue& e) {
    extern __shared__ uint4 shared[];
    constexpr int CHUNKS = Tile::K / 8, STEPS = Tile::K / 32;
    constexpr int BLOCK_TILES = RW * RT, BLOCK_TOKENS = TW * NT * 8;
    constexpr int TILE_CHUNKS = Tile::BYTES / 16, STAGE = BLOCK_TILES * TILE_CHUNKS + BLOCK_TOKENS * CHUNKS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row_warp = warp % RW, token_warp = warp / RW;
    const int first_tile = blockIdx.y * BLOCK_TILES;
    const int k_tiles = (K + Tile::K - 1) / Tile::K;
    const bool aligned = K % 8 == 0;
    constexpr int WARPS = RW * TW, ROWS_AT_ONCE = 32 / CHUNKS * WARPS;
    const int c = lane % CHUNKS, own = warp * (32 / CHUNKS) + lane / CHUNKS;  // this thread's chunk and first token
    const __half* source = x + (size_t)(first_token + own) * K;
    auto stage = [&](int kt) {
        uint4* buffer = shared + kt % STAGES * STAGE;
#pragma unroll
        for (int tile = warp; tile < BLOCK_TILES; tile += WARPS) {
            const int row_tile = min(first_tile + tile, row_tiles - 1);
            const unsigned char* from = weights + ((size_t)row_tile * k_tiles + kt) * Tile::BYTES;
#pragma unroll
            for (int i = lane; i < TILE_CHUNKS; i += 32) copy_async(buffer + tile * TILE_CHUNKS + i, from + i * 16, 16);
        }
        buffer += BLOCK_TILES * TILE_CHUNKS;
#pragma unroll
        for (int i = 0; i < BLOCK_TOKENS; i += ROWS_AT_ONCE) {
            const int token = first_token + own + i;
            const __half* row = source + (size_t)i * K;
            if (GATHER && rows) row = x + (size_t)rows[min(token, tokens - 1)] * K;
            stage_chunk(buffer + chunk_at<Tile>(own + i, Tile::position(c)), row, kt * Tile::K + c * 8, K,
                        token < tokens, aligned);
        }
    };

    float acc[RT][NT][4] = {};
    dependents_may_start();
    wait_for_predecessor();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < k_tiles) stage(s);
        copy_commit();
    }
    for (int kt = 0; kt < k_tiles; kt++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (kt + STAGES - 1 < k_tiles) stage(kt + STAGES - 1);
        copy_commit();

        const uint4* buffer = shared + kt % STAGES * STAGE;
        const unsigned char* packed = reinterpret_cast<const unsigned char*>(buffer) + row_warp * RT * Tile::BYTES;
        typename Tile::Raw raw[RT];
        buffer += BLOCK_TILES * TILE_CHUNKS;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            if (step % 2 == 0) {
#pragma unroll
                for (int r = 0; r < RT; r++) Tile::load_pair(raw[r], packed + r * Tile::BYTES, lane, step / 2);
            }
            uint4 b[NT];
#pragma unroll
            for (int n = 0; n < NT; n++) b[n] = buffer[chunk_at<Tile>(token_warp * NT * 8 + n * 8 + g, 4 * step + t)];
#pragma unroll
            for (int r = 0; r < RT; r++) multiply<Tile>(acc[r], raw[r], step, b);
        }
    }

#pragma unroll
    for (int r = 0; r < RT; r++) {
        const int row_tile = first_tile + row_warp * RT + r;
        if (row_tile >= row_tiles) break;
        const int packed = row_tile * 16 + g;
        const float scale[2] = {e.row_scale[packed] * e.in_factor, e.row_scale[packed + 8] * e.in_factor};
        const float bias[2] = {e.bias ? e.bias[packed] : 0.0f, e.bias ? e.bias[packed + 8] : 0.0f};
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int token = first_token + token_warp * NT * 8 + n * 8 + 2 * t + j;
                if (token >= tokens) continue;
                float low = acc[r][n][j] * scale[0] + bias[0], high = acc[r][n][2 + j] * scale[1] + bias[1];
                auto emit = [&](int column, float value) {
                    if (column >= e.features) return;
                    float before = e.mode == ADD_FLOAT
                        ? reinterpret_cast<const float*>(e.out)[(size_t)token * e.stride + column] : 0.0f;
                    store(e, token, column, value, before);
                };
                if (is_gated(e.activation)) emit(row_tile * 8 + g, gated_product(low, high, e.activation));
                else {
                    if (e.activation == RELU2) low = relu2(low), high = relu2(high);
                    emit(packed, low);
                    emit(packed + 8, high);
                }
            }
        }
    }
}

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
#ifdef MANY_STAGES
#define MANY_TOKENS(Tile, GATHER)                                                                                      \
    many_tokens<Tile, MANY_ROW_WARPS, MANY_ROW_TILES, MANY_TOKEN_WARPS, MANY_TOKEN_TILES, MANY_STAGES, GATHER>
#define MANY_TOKENS_PER_BLOCK (MANY_TOKEN_WARPS * MANY_TOKEN_TILES * 8)
#define MANY_BOUNDS __launch_bounds__(MANY_ROW_WARPS* MANY_TOKEN_WARPS * 32, 1)
#endif

#ifdef WARPGROUP_STAGES
#include "linear_wgmma.cuh"
#define WARPGROUP_BOUNDS __cluster_dims__(WARPGROUP_SPLIT) __launch_bounds__(384, WARPGROUP_BLOCKS)
#define WARPGROUP_TILES(Tile, GROUPED)                                                                                 \
    warpgroup_tokens<Tile, WARPGROUP_ROWS / 128, WARPGROUP_TOKENS, WARPGROUP_STAGES, WARPGROUP_SPLIT,                  \
                     WARPGROUP_BLOCKS, GROUPED>
#endif

#if defined(WARPGROUP_STAGES) && defined(EXPERTS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void WARPGROUP_BOUNDS                                                                        \
        many_experts_warpgroups(const unsigned char* weights, const unsigned char* x, const int4* blocks, int count,   \
                                int padded, int K, int row_tiles, EPILOGUE_PARAMETERS) {                               \
        const Epilogue e = EPILOGUE;                                                                                   \
        WARPGROUP_TILES(Tile, true)(weights, x, 0, padded, K, row_tiles, blocks, count, e);                            \
    }
#elif defined(WARPGROUP_STAGES)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void WARPGROUP_BOUNDS                                                                        \
        many_warpgroups(const unsigned char* weights, const unsigned char* x, int tokens, int padded, int K,           \
                        int row_tiles, EPILOGUE_PARAMETERS) {                                                          \
        const Epilogue e = EPILOGUE;                                                                                   \
        WARPGROUP_TILES(Tile, false)(weights, x, tokens, padded, K, row_tiles, nullptr, 0, e);                         \
    }
#elif defined(MANY_STAGES) && defined(EXPERTS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void MANY_BOUNDS                                                                             \
        many_experts(const unsigned char* weights, const __half* x, const int* rows, const int4* blocks, int K,        \
                     int row_tiles, EPILOGUE_PARAMETERS) {                                                             \
        Epilogue e = EPILOGUE;                                                                                         \
        const int4 block = expert_block<Tile>(blocks, weights, K, row_tiles, e);                                       \
        if (block.y >= block.z) return;                                                                                \
        MANY_TOKENS(Tile, true)(weights, x, rows, block.y, block.z, K, row_tiles, e);                                  \
    }
#elif defined(MANY_STAGES)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void MANY_BOUNDS                                                                             \
        many(const unsigned char* weights, const __half* x, int tokens, int K, int row_tiles, EPILOGUE_PARAMETERS) {   \
        const Epilogue e = EPILOGUE;                                                                                   \
        MANY_TOKENS(Tile, false)(weights, x, nullptr, blockIdx.x * MANY_TOKENS_PER_BLOCK, tokens, K, row_tiles, e);    \
    }
#elif defined(EXPERTS)
// Registers for two blocks of 16 warps on an SM, where the format needs no more.
#define EXPERT_BLOCKS(Tile) (Tile::PLANES == 2 || Tile::BLOCK_SCALED ? 1 : 32 / EXPERT_WARPS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS * 32, EXPERT_BLOCKS(Tile))                               \
        few_experts(const unsigned char* weights, const __half* x, const int* ids, const float* shares, int slots,     \
                    int pairs_of_x, int K, int row_tiles, EPILOGUE_PARAMETERS) {                                       \
        const Epilogue e = EPILOGUE;                                                                                   \
        chosen_experts<Tile, EXPERT_WARPS>(weights, x, ids, shares, slots, pairs_of_x, K, row_tiles, e);               \
    }
#else
#define FEW_TOKENS(Tile, RESIDENT, SPLIT) few_tokens<Tile, FEW_WARPS, FEW_DEPTH, RESIDENT, FEW_HALVED, SPLIT>
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, FEW_BLOCKS)                                           \
        few(const unsigned char* weights, const void* x, int tokens, int K, int row_tiles, int resident,               \
            int half, const float* norm, float norm_eps, float norm_factor, EPILOGUE_PARAMETERS) {                     \
        const RowNorm before = {norm, norm_eps, norm_factor};                                                          \
        const Halves halves = {half, nullptr};                                                                         \
        const Epilogue e = EPILOGUE;                                                                                   \
        if (resident) FEW_TOKENS(Tile, true, false)(weights, x, tokens, K, row_tiles, halves, before, e);              \
        else FEW_TOKENS(Tile, false, false)(weights, x, tokens, K, row_tiles, halves, before, e);                      \
    }                                                                                                                  \
    SPLIT_ENTRY(Tile)
#if FEW_HALVED
#define SPLIT_ENTRY(Tile)                                                                                              \
    extern "C" __global__ void __launch_bounds__(FEW_WARPS * 32, 1)                                                    \
        few_split(const unsigned char* weights, const __half* x, int tokens, int K, int row_tiles, int half,           \
                  unsigned long long* handed_over, EPILOGUE_PARAMETERS) {                                              \
        const RowNorm before = {nullptr, 0.0f, 0.0f};                                                                  \
        const Halves halves = {half, handed_over};                                                                     \
        const Epilogue e = EPILOGUE;                                                                                   \
        FEW_TOKENS(Tile, true, true)(weights, x, tokens, K, row_tiles, halves, before, e);                             \
    }
#else
#define SPLIT_ENTRY(Tile)
#endif
#endif
