// The linear kernel for 1 to 8 tokens, which costs much the same for all of them. Included by linear.cuh.
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
#include "norm.cuh"

// What stands before a linear: y = W fp16(norm(x) * factor), x in float32. weight null: none, and x is fp16.
struct RowNorm {
    const float* weight;
    float eps, factor;
};

// 8 of a row's columns from k, zero past the end. K % 8 == 0.
__device__ __forceinline__ void load_eight(float4 (&to)[2], const float* row, int k, int K) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        to[i] = k < K ? reinterpret_cast<const float4*>(row + k)[i] : make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ uint4 normed_eight(const float4 (&x)[2], float scale, const float4 (&weight)[2]) {
    const uint2 low = normed(x[0], scale, weight[0]), high = normed(x[1], scale, weight[1]);
    return make_uint4(low.x, low.y, high.x, high.y);
}

template <int N> struct Count { static constexpr int value = N; };

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
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be the same for its lanes: less code
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
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

    // How many column tiles this warp has of a part: one less from part `short_from` on.
    int most_tiles = 0;
#pragma unroll 1
    while (kt(most_tiles, 0) < k_tiles) most_tiles++;
    const int short_from = k_tiles - kt(most_tiles - 1, 0);
    auto tiles = [&](int p) { return most_tiles - (DIVISION == WHOLE && p >= short_from); };

    // What is fetched next: how many tiles of the p-th part are left, none behind the last row tile, and where this
    // lane's share of the next one lies, in 16 bytes.
    int fetch_row = block, fetch_p = 0, fetch_left = most_tiles;
    auto place = [&]() { return (unsigned)(fetch_row * k_tiles + kt(0, fetch_p)) * TILE + lane; };
    unsigned tile = place();
    auto fetch = [&](unsigned slot) {
        if (fetch_left) {
            unsigned char* const to = base + slot + lane * 16;
            const uint4* const from = reinterpret_cast<const uint4*>(weights) + tile;
#pragma unroll
            for (int i = 0; i < TILE; i += 32)
                if (i + 32 <= TILE || lane < TILE - i) copy_streamed(to + i * 16, from + i);
            tile += WARPS * parts * TILE;
            if (!--fetch_left) {
                do {
                    if (DIVISION != WHOLE || ++fetch_p == held) fetch_p = 0, fetch_row += blocks;
                    if (fetch_row >= row_tiles) break;
                    fetch_left = tiles(fetch_p);
                } while (DIVISION == WHOLE && !fetch_left);
                tile = place();
            }
        }
        copy_commit();
    };

    // Activations come by plain loads: cp.async of lines that all SMs want at once takes several times longer, and
    // would have to wait for the weights before them. 1 / ROWS of a warp takes the columns of one tile and token.
    constexpr int ROWS = 32 / CHUNKS;
    const int c = lane % CHUNKS, to_c = Tile::position(c);
    auto column = [&](int i, int p) { return kt(i, p) * Tile::K + c * 8; };
    auto load_x = [&]() {
        const __half* const rows = static_cast<const __half*>(x);
        const int first = lane / CHUNKS;
        const unsigned own = chunk_at<Tile>(first, to_c);
        int p = 0, tile_of_x = kt(0, 0), to = x_place(0, 0);
        auto next = [&]() {
            const bool turns = ++p == held;
            if (turns) p = 0;
            tile_of_x += turns ? WARPS * parts - held + 1 : 1;
            to += (turns ? (WARPS - 1) * held + 1 : 1) * x_tile;
        };
        if (!aligned) {
#pragma unroll 1
            for (; tile_of_x < k_tiles; next())
#pragma unroll 1
                for (int token = first; token < tokens; token += ROWS)
                    resident[to + chunk_at<Tile>(token, to_c)] =
                        eight_halves(rows + (size_t)token * K, tile_of_x * Tile::K + c * 8, K);
        }
        // TILES at once, EACH of the lane's tokens of them: more tiles where tokens are few, for one way from memory.
        auto load = [&](auto tiles, auto each) {
            constexpr int TILES = decltype(tiles)::value, EACH = decltype(each)::value;
            while (tile_of_x < k_tiles) {
                uint4 values[TILES][EACH];
                int places[TILES];
#pragma unroll
                for (int i = 0; i < TILES; i++, next()) {
                    const int k = tile_of_x * Tile::K + c * 8;
                    const __half* const from = rows + (size_t)first * K + k;
                    places[i] = tile_of_x < k_tiles ? to : -1;
#pragma unroll
                    for (int u = 0; u < EACH; u++) {
                        if (u * ROWS >= tokens) break;
                        values[i][u] = k < K && first + u * ROWS < tokens
                            ? *reinterpret_cast<const uint4*>(from + (size_t)u * ROWS * K) : make_uint4(0, 0, 0, 0);
                    }
                }
#pragma unroll
                for (int i = 0; i < TILES; i++)
#pragma unroll
                    for (int u = 0; u < EACH; u++)
                        if (places[i] >= 0 && first + u * ROWS < tokens)
                            resident[places[i] + own + u * ROWS * CHUNKS] = values[i][u];
            }
        };
        if (tokens <= ROWS) load(Count<DIVISION == WHOLE ? 8 : 4>(), Count<1>());
        else load(Count<ROWS>(), Count<8 / ROWS>());
        __syncwarp();
    };
    // The same, normed. Parts of a warp take turns with the tiles; the weights of the first are read before the
    // predecessor is done.
    float4 norm_weight[2];
    auto load_normed = [&]() {
        const float* row = static_cast<const float*>(x);
#pragma unroll 1
        for (int token = 0; token < tokens; token++) {
            float squares[1];
            warp_squares<WARPS * 32>(squares, {row + (size_t)token * K}, K);
            if (lane == 0) sums[warp * tokens + token] = squares[0];
        }
        __syncthreads();
#pragma unroll 1
        for (int token = 0; token < tokens; token++, row += K) {
            float scale = 0.0f;
#pragma unroll 1
            for (int i = lane / CHUNKS; kt(i, 0) < k_tiles; i += ROWS) {
                float4 values[2], weight[2] = {norm_weight[0], norm_weight[1]};
                load_eight(values, row, column(i, 0), K);
                if (i >= ROWS) load_eight(weight, norm.weight, column(i, 0), K);
                else scale = norm.factor / row_length<WARPS>(sums + token, tokens, K, norm.eps);  // while they come
                resident[x_place(i, 0) + chunk_at<Tile>(token, to_c)] = normed_eight(values, scale, weight);
            }
        }
        __syncthreads();  // the sums' place is free again
    };

    // The next kernel fetches its first weights as soon as it starts: the activations of more than two tokens, all of
    // them wanted on every SM, take longer behind those than that kernel gains.
    const bool starts_dependents_late = tokens > 2;
    if (!starts_dependents_late) dependents_may_start();
#pragma unroll 1
    for (unsigned slot = ring; slot != ring_end; slot += Tile::BYTES) fetch(slot);
    if (DIVISION == UNDIVIDED && norm.weight) load_eight(norm_weight, norm.weight, column(lane / CHUNKS, 0), K);
    for (int i = threadIdx.x; block + i * blocks < row_tiles; i += WARPS * 32)
        prefetch(e.row_scale + (block + i * blocks) * 16);
    wait_for_predecessor();
    if (DIVISION == UNDIVIDED && norm.weight) load_normed();
    else load_x();
    if (starts_dependents_late) dependents_may_start();

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
    // What an adder writes: in a row tile that blocks share, only when it is to add again, or at the end. The others'
    // sums are there by then, and no row tile waits for them.
    float value = 0.0f, row_scale = 0.0f, bias = 0.0f, before = 0.0f;
    int unwritten = -1, slot = 0;  // its row tile; of a row tile's sums [tokens][16], this thread's
    auto write = [&]() {
        const int row = slot % 16, token_of_sum = slot / 16;
        const int column = gated ? unwritten * 8 + row % 8 : unwritten * 16 + row;
        const bool valid = token_of_sum < tokens;
        if (DIVISION == SHARED && valid) {
            // The parts' sums lie in order, without this one's.
            volatile unsigned long long* from = handed_over + (size_t)unwritten * (parts - 1) * tokens * 16 + slot;
            float total = 0.0f;
#pragma unroll 1
            for (int p = 0; p < parts; p++) {
                if (p != part) {
                    unsigned long long sum;
                    while (!(sum = *from)) {}
                    *from = 0;
                    from += tokens * 16;
                    total += __uint_as_float(static_cast<unsigned>(sum));
                } else total += value;
            }
            value = total;
        }
        value = value * (row_scale * e.in_factor) + bias;
        const float up = __shfl_down_sync(0xffffffffu, value, 8, 16);
        if (gated) value = gated_product(value, up, e.activation);
        else if (e.activation == RELU2) value = relu2(value);
        if (valid && column < e.features && !(gated && row >= 8)) store(e, token_of_sum, column, value, before);
        unwritten = -1;
    };
    for (int row_tile = block;; row_tile += blocks, count++) {
        const bool adds = turn < adders, writes = part == writer;
        if (DIVISION == SHARED && unwritten >= 0 && (adds || row_tile >= row_tiles)) write();
        if (row_tile >= row_tiles) break;
        if (adds) slot = turn * 32 + lane;
        if (adds && writes) {  // What the outputs need is fetched now: its latency would stand at the end else.
            const int row = slot % 16, token_of_sum = slot / 16, packed = row_tile * 16 + row;
            const int column = gated ? row_tile * 8 + row % 8 : packed;
            row_scale = e.row_scale[packed];
            bias = e.bias ? e.bias[packed] : 0.0f;
            if (e.mode == ADD_FLOAT && token_of_sum < tokens && column < e.features)
                before = reinterpret_cast<const float*>(e.out)[(size_t)token_of_sum * e.stride + column];
        }

        const int which = count % 2, part_sums = WARPS * tokens * SUM_STRIDE;
        float* const set = sums + which * held * part_sums;
#pragma unroll 1
        for (int p = 0; p < held; p++) {
            float acc[1][4] = {};
            unsigned x_at = even + x_place(0, p) * 16;
#pragma unroll 1
            for (int left = tiles(p); left; left--) {
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
            const int row = slot % 16, token_of_sum = slot / 16;
            const bool valid = token_of_sum < tokens;
            barrier_wait(WRITTEN + which, WARPS * 32);
            value = 0.0f;
#pragma unroll 1
            for (int p = 0; valid && p < held; p++) {
                float sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; w++)
                    sum += set[p * part_sums + (w * tokens + token_of_sum) * SUM_STRIDE + row];
                value = p ? value + sum : sum;
            }
            barrier_wait(ADDED + which, adders * 32);
            barrier_arrive(READ + which, WARPS * 32);
            if (writes) {
                unwritten = row_tile;
                if (DIVISION != SHARED) write();
            } else if (valid) {
                const int place = part - (part > writer);  // of the others' sums
                *(volatile unsigned long long*)(handed_over + ((size_t)row_tile * (parts - 1) + place) * tokens * 16 +
                                                slot) = 1ull << 32 | __float_as_uint(value);
            }
        }
        added = (added & ~(1 << which)) | adds << which;
        writer = writer + 1 == sharing ? 0 : writer + 1;
        turn = turn < adders ? turn + WARPS - adders : turn - adders;
    }
}
