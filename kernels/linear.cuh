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
// A block takes row tiles blockIdx.x, blockIdx.x + gridDim.x, ...; its warps split the columns and their sums are added
// in warp order, so a token's result depends neither on the number of tokens nor on the grid. Each warp has a ring of
// DEPTH slots in shared memory and keeps weights on the way, across row tiles, while it computes; the first ones before
// the predecessor is done. The warp's own columns of the activations are fetched once. They may be normed on the way
// (UNDIVIDED, below): every block sums a row's squares itself, as rms_norm.cu does.
//
// The columns of a weight are divided into parts where a block's shared memory does not hold them for eight tokens:
// column tile kt is of part kt % parts, its warp is kt / parts % WARPS, the warps' sums are added up part by part, and
// then the parts' sums. Few enough tokens: a block takes all parts (WHOLE). Otherwise, as many blocks as parts share
// each row tile (SHARED). They take turns to write one; the others hand their sums over through memory, each with a
// mark beside it. They are on the chip at the same time: all blocks of the grid find places there, and later kernels
// start none before these have.
//
// Dynamic shared memory: rings [WARPS][DEPTH][Tile::BYTES]; activations [column tiles of a block][tokens][Tile::K]
// halves; sums [2][parts of a block][WARPS][tokens][SUM_STRIDE] floats.

constexpr int SUM_STRIDE = 20;  // floats between columns of 16 rows: conflict-free for the accumulators' layout
// How columns are divided: not at all; a block takes all parts; as many blocks as parts share a row tile.
enum Division { UNDIVIDED = 0, WHOLE = 1, SHARED = 2 };

// SHARED: handed_over is [row tiles][parts - 1][tokens][16], zero before and after.
template <class Tile, int WARPS, int DEPTH, int DIVISION>
__device__ __forceinline__ void few_tokens(const unsigned char* weights, const void* x, int tokens, int K,
                                           int row_tiles, int divided, unsigned long long* handed_over,
                                           const RowNorm& norm, const Epilogue& e) {
    extern __shared__ uint4 shared[];
    constexpr int CHUNKS = Tile::K / 8, STEPS = Tile::K / 32, TILE = Tile::BYTES / 16;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int parts = DIVISION == UNDIVIDED ? 1 : divided;
    const int held = DIVISION == WHOLE ? parts : 1, sharing = DIVISION == WHOLE ? 1 : parts;
    const int part = blockIdx.x % sharing, block = blockIdx.x / sharing, blocks = gridDim.x / sharing;
    // Of a row tile, this warp has column tiles kt(i, p), i = 0, 1, ... of the block's p-th part, whose activations lie
    // at x_place(i, p).
    const int k_tiles = (K + Tile::K - 1) / Tile::K, x_tile = tokens * CHUNKS;
    auto kt = [&](int i, int p) { return (i * WARPS + warp) * parts + part + p; };
    auto x_place = [&](int i, int p) { return ((i * WARPS + warp) * held + p) * x_tile; };
    // A slot is free as soon as its tile is in registers, unless registers are short.
    constexpr bool FETCH_EARLY = sizeof(typename Tile::Raw) <= 64;
    const bool aligned = K % 8 == 0;
    // Places in shared memory are offsets in bytes: half the registers of pointers.
    unsigned char* const base = reinterpret_cast<unsigned char*>(shared);
    const unsigned ring = warp * DEPTH * Tile::BYTES, ring_end = ring + DEPTH * Tile::BYTES;
    constexpr unsigned all_x = WARPS * DEPTH * Tile::BYTES;
    uint4* const resident = reinterpret_cast<uint4*>(base + all_x);
    float* const sums = reinterpret_cast<float*>(resident + (k_tiles + sharing - 1) / sharing * x_tile);

    // What is fetched next: tile i of the p-th part, and where this lane's share of it lies, in 16 bytes.
    int fetch_row = block, fetch_i = 0, fetch_p = 0;
    auto place = [&]() { return (unsigned)(fetch_row * k_tiles + kt(fetch_i, fetch_p)) * TILE + lane; };
    unsigned tile = place();
    auto fetch = [&](unsigned slot) {
        while (fetch_row < row_tiles && kt(fetch_i, fetch_p) >= k_tiles) {
            fetch_i = 0;
            if (++fetch_p == held) fetch_p = 0, fetch_row += blocks;
            tile = place();
        }
        if (fetch_row < row_tiles) {
#pragma unroll
            for (int i = 0; i < TILE; i += 32)
                if (i + 32 <= TILE || lane < TILE - i)
                    copy_async(base + slot + (i + lane) * 16, reinterpret_cast<const uint4*>(weights) + tile + i, 16);
            fetch_i++;
            tile += WARPS * parts * TILE;
        }
        copy_commit();
    };

    // Activations come by plain loads: cp.async of lines that all SMs want at once takes several times longer, and
    // would have to wait for the weights before them. 1 / ROWS of a warp takes the columns of one tile and token.
    constexpr int ROWS = 32 / CHUNKS;
    const int c = lane % CHUNKS, to_c = Tile::position(c);
    auto column = [&](int i, int p) { return kt(i, p) * Tile::K + c * 8; };
    auto load_x = [&]() {
        const __half* rows = static_cast<const __half*>(x);
        int i = 0, p = 0, token = lane / CHUNKS;
        auto carry = [&]() {
            while (token >= tokens) {
                token -= tokens;
                if (++p == held) p = 0, i++;
            }
        };
        carry();
        if (!aligned) {
#pragma unroll 1
            for (; kt(i, 0) < k_tiles; token += ROWS, carry())
                if (kt(i, p) < k_tiles)
                    stage_chunk(resident + x_place(i, p) + chunk_at<Tile>(token, to_c), rows + (size_t)token * K,
                                column(i, p), K, true, false);
        }
        while (kt(i, 0) < k_tiles) {
            uint4 values[8];
            int to[8];
#pragma unroll
            for (int u = 0; u < 8; u++) {
                to[u] = kt(i, p) < k_tiles ? x_place(i, p) + chunk_at<Tile>(token, to_c) : -1;
                values[u] = make_uint4(0, 0, 0, 0);
                if (to[u] >= 0 && column(i, p) < K)
                    values[u] = *reinterpret_cast<const uint4*>(rows + (size_t)token * K + column(i, p));
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
    auto load_norm_weight = [&](int i) { load_eight(norm_weight, norm.weight, column(i, 0), K, aligned); };
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
        for (int i = lane / CHUNKS; kt(i, 0) < k_tiles; i += ROWS) {
            if (i >= ROWS) load_norm_weight(i);
#pragma unroll 1
            for (int token = 0; token < tokens; token += 2) {
                const float* const row = rows + (size_t)token * K;
                float4 values[2][2];
                load_eight(values[0], row, column(i, 0), K, aligned);
                if (token + 1 < tokens) load_eight(values[1], row + K, column(i, 0), K, aligned);
#pragma unroll
                for (int u = 0; u < 2; u++) {
                    if (token + u >= tokens) continue;
                    const float scale = norm.factor / row_length<WARPS>(sums + token + u, tokens, K, norm.eps);
                    uint4& to = resident[x_place(i, 0) + chunk_at<Tile>(token + u, to_c)];
                    to = normed_eight(values[u], scale, norm_weight);
                }
            }
        }
        __syncthreads();  // the sums' place is free again
    };

    dependents_may_start();
#pragma unroll 1
    for (unsigned slot = ring; slot != ring_end; slot += Tile::BYTES) fetch(slot);
    if (DIVISION == UNDIVIDED && norm.weight) load_norm_weight(lane / CHUNKS);
    for (int i = threadIdx.x; block + i * blocks < row_tiles; i += WARPS * 32)
        prefetch(e.row_scale + (block + i * blocks) * 16);
    wait_for_predecessor();
    if (DIVISION == UNDIVIDED && norm.weight) load_normed();
    else load_x();

    // Lane t of token g finds the chunk of a step 4 chunks further each step, the swizzle apart.
    const int token = min(g, tokens - 1), swizzle = (token & 1) * 4;  // columns past the last token repeat it, unused
    const unsigned even = all_x + (token * CHUNKS + t + swizzle) * 16;
    // The warps that add up a row tile's sums take turns; the others go on to the next one. Each set of sums has a
    // barrier for "written", where the adders wait, and one for "read", where all others wait before they write it
    // again (the adders wait for each other at once).
    enum { WRITTEN = 1, READ = 3, ADDED = 5 };
    const int adders = (tokens + 1) / 2;  // warps: 16 rows x tokens threads
    const bool gated = is_gated(e.activation);
    int added = 0;  // bit: whether this warp read that set
    unsigned drain = ring;
    int turn = warp, count = 0, writer = 0;
    for (int row_tile = block; row_tile < row_tiles; row_tile += blocks, count++) {
        const bool adds = turn < adders;
        const bool writes = part == writer;
        float row_scale = 0.0f, bias = 0.0f, before = 0.0f;
        if (adds && writes) {  // What the outputs need is fetched now: its latency would stand at the end else.
            const int slot = turn * 32 + lane, row = slot % 16, column_token = slot / 16, packed = row_tile * 16 + row;
            const int column = gated ? row_tile * 8 + row % 8 : packed;
            row_scale = e.row_scale[packed];
            if (e.bias) bias = e.bias[packed];
            if (e.mode == ADD_FLOAT && column_token < tokens && column < e.features)
                before = reinterpret_cast<const float*>(e.out)[(size_t)column_token * e.stride + column];
        }

        const int which = count % 2, part_sums = WARPS * tokens * SUM_STRIDE;
        float* const set = sums + which * held * part_sums;
#pragma unroll 1
        for (int p = 0; p < held; p++) {
            float acc[1][4] = {};
            unsigned x_at = even + x_place(0, p) * 16;
#pragma unroll 1
            for (int i = 0; kt(i, p) < k_tiles; i++) {
                copy_wait<DEPTH - 1>();
                __syncwarp();
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
                x_at += WARPS * held * x_tile * 16;
                drain += Tile::BYTES;
                if (drain == ring_end) drain = ring;
            }

            if (p == 0 && count >= 2 && !(added >> which & 1)) barrier_wait(READ + which, WARPS * 32);
            float* const own = set + p * part_sums + warp * tokens * SUM_STRIDE + 2 * t * SUM_STRIDE + g;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (2 * t + j >= tokens) continue;
                own[j * SUM_STRIDE] = acc[0][j];
                own[j * SUM_STRIDE + 8] = acc[0][2 + j];
            }
        }
        if (!adds) barrier_arrive(WRITTEN + which, WARPS * 32);
        else {
            const int slot = turn * 32 + lane, row = slot % 16, column_token = slot / 16;
            const int column = gated ? row_tile * 8 + row % 8 : row_tile * 16 + row;
            const bool valid = column_token < tokens;
            barrier_wait(WRITTEN + which, WARPS * 32);
            float value = 0.0f;
            if (valid) {
#pragma unroll
                for (int w = 0; w < WARPS; w++) value += set[(w * tokens + column_token) * SUM_STRIDE + row];
#pragma unroll 1
                for (int p = 1; p < held; p++) {
                    float more = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; w++)
                        more += set[p * part_sums + (w * tokens + column_token) * SUM_STRIDE + row];
                    value += more;
                }
            }
            barrier_wait(ADDED + which, adders * 32);
            barrier_arrive(READ + which, WARPS * 32);
            if constexpr (DIVISION == SHARED) {
                volatile unsigned long long* const exchange =
                    handed_over + (size_t)row_tile * (parts - 1) * tokens * 16 + slot;
                auto from = [&](int p) { return exchange + (p - writer - (p > writer ? 1 : 1 - parts)) * tokens * 16; };
                const unsigned long long own_sum = 1ull << 32 | __float_as_uint(value);
                if (valid && !writes) *from(part) = own_sum;
                if (valid && writes) {
                    constexpr int AT_ONCE = 2;
                    value = 0.0f;
#pragma unroll 1
                    for (int p = 0; p < parts; p += AT_ONCE) {
                        unsigned long long sum[AT_ONCE];
#pragma unroll
                        for (int u = 0; u < AT_ONCE; u++)
                            sum[u] = p + u == part || p + u >= parts ? own_sum : *from(p + u);
#pragma unroll
                        for (int u = 0; u < AT_ONCE; u++) {
                            if (p + u >= parts) break;
                            while (!sum[u]) sum[u] = *from(p + u);
                            value += __uint_as_float(static_cast<unsigned>(sum[u]));
                            if (p + u != part) *from(p + u) = 0;
                        }
                    }
                }
            }
            value = value * (row_scale * e.in_factor) + bias;
            const float up = __shfl_down_sync(0xffffffffu, value, 8, 16);
            if (gated) value = gated_product(value, up, e.activation);
            else if (e.activation == RELU2) value = relu2(value);
            if (valid && writes && column < e.features && !(gated && row >= 8))
                store(e, column_token, column, value, before);
        }
        added = (added & ~(1 << which)) | adds << which;
        writer = writer + 1 == sharing ? 0 : writer + 1;
        turn = turn < adders ? turn + WARPS - adders : turn - adders;
    }
}

// -- The few-token kernel's sums, by other kernels ----------------------------------------------------------------

// The order of column tiles in which a kernel whose every thread has its outputs to itself gets the few-token kernel's
// bits: those of each of its WARPS one after the other, part by part (DIVIDED; else there is one part). A product of 16
// columns adds up the same in mma and in wgmma of any shape. WARPS 1: as they come, in one sum.
enum SumEnd { SUM_GOES_ON, WARP_ENDS, PART_ENDS };
template <int WARPS_, bool DIVIDED_> struct SumOrder {
    static constexpr int WARPS = WARPS_;
    static constexpr bool DIVIDED = DIVIDED_;
    int kt = 0, warp = 0, part = 0;

    // Goes on to the next column tile; says what ends with the one before it.
    __device__ __forceinline__ SumEnd next(int k_tiles, int parts) {
        kt += WARPS * (DIVIDED ? parts : 1);
        if (WARPS == 1 || kt < k_tiles) return SUM_GOES_ON;
        kt = DIVIDED ? ++warp * parts + part : ++warp;
        if (!DIVIDED || (warp < WARPS && kt < k_tiles)) return WARP_ENDS;
        warp = 0;
        kt = ++part;
        return PART_ENDS;
    }
};

// A thread's sums of COUNT outputs.
template <class Order, int COUNT> struct Sums {
    float part[COUNT] = {}, all[COUNT] = {};

    // A warp's sum has ended, and that of a part if `end` says so.
    __device__ __forceinline__ void add(const float (&warp)[COUNT], SumEnd end) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) part[i] += warp[i];
        if constexpr (Order::DIVIDED) {
            if (end != PART_ENDS) return;
#pragma unroll
            for (int i = 0; i < COUNT; i++) all[i] += part[i], part[i] = 0.0f;
        }
    }
    // The last warp's sum has ended: it becomes that of all.
    __device__ __forceinline__ void finish(float (&warp)[COUNT]) {
        if constexpr (Order::WARPS > 1) {
            add(warp, PART_ENDS);
#pragma unroll
            for (int i = 0; i < COUNT; i++) warp[i] = Order::DIVIDED ? all[i] : part[i];
        }
    }
};

// -- Many tokens --------------------------------------------------------------------------------------------------
//
// A block computes RW * RT * 16 rows for TW * NT * 8 tokens (RW x TW warps). Weights (packed) and activations go
// through STAGES buffers in shared memory; each warp decodes the row tiles of its own part. Order: SumOrder.
// Grid: (token blocks, row blocks), tokens fastest, so that weights come from memory once and activations from L2.
//
// It takes outputs first_token up to `tokens`; with GATHER and `rows`, output i is of row rows[i] of x.
//
// Dynamic shared memory: [STAGES] of weights [RW * RT][Tile::BYTES], activations [tokens][Tile::K] halves.

template <class Tile, int RW, int RT, int TW, int NT, int STAGES, bool GATHER, class Order>
__device__ __forceinline__ void many_tokens(const unsigned char* weights, const __half* x, const int* rows,
                                            int first_token, int tokens, int K, int row_tiles, int parts,
                                            const Epilogue& e) {
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
    Order fetched;
    auto stage = [&](int number) {
        uint4* buffer = shared + number % STAGES * STAGE;
        const int kt = fetched.kt;
        fetched.next(k_tiles, parts);
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
    Sums<Order, 4> sums[RT][NT];
    Order order;
    dependents_may_start();
    wait_for_predecessor();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < k_tiles) stage(s);
        copy_commit();
    }
    for (int number = 0; number < k_tiles; number++) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (number + STAGES - 1 < k_tiles) stage(number + STAGES - 1);
        copy_commit();

        const uint4* buffer = shared + number % STAGES * STAGE;
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
        const SumEnd end = order.next(k_tiles, parts);
        if (end == SUM_GOES_ON || number + 1 == k_tiles) continue;
#pragma unroll
        for (int r = 0; r < RT; r++) {
#pragma unroll
            for (int n = 0; n < NT; n++) {
                sums[r][n].add(acc[r][n], end);
#pragma unroll
                for (int i = 0; i < 4; i++) acc[r][n][i] = 0.0f;
            }
        }
    }
#pragma unroll
    for (int r = 0; r < RT; r++) {
#pragma unroll
        for (int n = 0; n < NT; n++) sums[r][n].finish(acc[r][n]);
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
// Registers for 40 warps on an SM, or fewer where a format needs more.
#define EXPERT_BLOCKS(Tile)                                                                                            \
    ((Tile::PLANES == 2 || Tile::BLOCK_SCALED ? 16 : Tile::BYTES < 2048 ? 40 : 24) / EXPERT_WARPS)
#define LINEAR_ENTRIES(Tile)                                                                                           \
    extern "C" __global__ void __launch_bounds__(EXPERT_WARPS * 32, EXPERT_BLOCKS(Tile))                               \
        few_experts(const unsigned char* weights, const __half* x, int x_slots, int K, int row_tiles, const int* ids,  \
                    int tokens, int slots, const float* shares, float* partial, int* tickets, EPILOGUE_PARAMETERS) {   \
        const Choices choices = {ids, tokens, slots, shares, partial, tickets};                                        \
        const Epilogue e = EPILOGUE;                                                                                   \
        chosen_experts<Tile, EXPERT_WARPS>(weights, x, x_slots, K, row_tiles, choices, e);                             \
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
