// Linears of which every token uses a few out of many: expert e's tiles, row scales and bias lie behind those of e - 1.
// Included by linear.cuh.
//
// Few tokens, each with `slots` experts, which are distinct. Up to 8 find those that share an expert themselves: block
// (i, pair) computes ROW_TILES row tiles of the expert of a pair of token and slot, for all tokens that chose it: they
// are columns of one mma, a column for each token, and only the block of the first of them works; the others find that
// out before they fetch anything. More tokens are grouped by expert first (kernels/experts.cu), and block (i, j) takes
// the up to 8 pairs of blocks[j]. A block's warps take the tiles in turn and their sums are added in warp order, so a
// result depends on nothing but its own token. Many warps with few registers hide the way from memory better than tiles
// fetched ahead, and what a block does besides its few tiles is kept short.
//
// Without `shares`, row token * slots + slot of the output is an expert's result, or grouped, row i the i-th pair's.
// With them, row token is the sum of results times `shares` in the order of the slots. A block hands each number over
// with a mark beside it, in one store, and leaves; a fence and a count would keep it on the chip for two more ways to
// memory. Behind the last pair, `adders` blocks wait for the numbers: at most one for each SM, where others have room
// beside it, so that these get on in whatever order they begin. They wait for every slot, so two slots of a token with
// one expert would never end: kernels/route.cu gives distinct ones whatever the logits.
struct Choices {
    const int* ids;                   // [tokens][slots]
    int tokens, slots;
    int always, routed;               // the last `always` slots of all tokens hold experts routed, routed + 1, ...
    const float* shares;              // [tokens][slots], or null
    unsigned long long* handed_over;  // [tokens][row tiles][slots][16], zero between kernels, or null
    int adders;                       // blocks that add, or 0
};

// Pairs grouped by expert: blocks[j] says what blocks (i, j) compute, {expert, first pair, end}; first = end: nothing.
struct Grouped {
    const int4* blocks;
    const int* rows;  // of the activations, for each pair; null: its own
};

// The columns of a row of K that a lane multiplies tile kt by; past the row's end, where weights are zero, any of it.
template <class Tile>
__device__ __forceinline__ void activations(uint4 (&chunks)[Tile::K / 32], const __half* row, int kt, int K) {
    const int t = threadIdx.x % 4;
    if (K % 32 == 0) {
#pragma unroll
        for (int step = 0; step < Tile::K / 32; step++) {
            const int c = Tile::position(4 * step + t);  // `position` is its own inverse
            chunks[step] = reinterpret_cast<const uint4*>(row + min(kt * Tile::K + c / 4 * 32, K - 32))[c % 4];
        }
        return;
    }
#pragma unroll
    for (int step = 0; step < Tile::K / 32; step++) {
        const int k = kt * Tile::K + Tile::position(4 * step + t) * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
#pragma unroll 1
        for (int i = 7; i >= 0; i--)
            v = make_uint4(v.x << 16 | (k + i < K ? __half_as_ushort(row[k + i]) : 0), __funnelshift_l(v.x, v.y, 16),
                           __funnelshift_l(v.y, v.z, 16), __funnelshift_l(v.z, v.w, 16));
        chunks[step] = v;
    }
}

constexpr unsigned long long HANDED_OVER = 1ull << 32;  // beside the bits of a number

// The sums over the slots of what other blocks hand over, which is zero again then. Half a warp adds a token's 16 rows.
template <int WARPS>
__device__ __forceinline__ void add_slots(int row_tiles, const Choices& c, const Epilogue& e) {
    const int row = threadIdx.x % 16;
    dependents_may_start();
    wait_for_predecessor();
#pragma unroll 1
    for (int i = blockIdx.x * WARPS * 2 + threadIdx.x / 16; i < c.tokens * row_tiles; i += c.adders * WARPS * 2) {
        const int token = i / row_tiles, feature = i % row_tiles * 16 + row;
        const bool writes = feature < e.features;
        const float before = writes && e.mode == ADD_FLOAT
            ? reinterpret_cast<const float*>(e.out)[(size_t)token * e.stride + feature] : 0.0f;
        volatile unsigned long long* all = c.handed_over + (size_t)i * c.slots * 16 + row;
        const float* shares = c.shares + token * c.slots;
        float sum = 0.0f;
#pragma unroll 1
        for (int left = c.slots; left > 0; left -= 4, all += 64, shares += 4) {
            unsigned long long values[4];
            bool all_there;
#pragma unroll 1
            do {
                all_there = true;
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    values[s] = s < left ? all[s * 16] : HANDED_OVER;
                    all_there &= values[s] != 0;
                }
            } while (!all_there);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                if (s >= left) break;
                all[s * 16] = 0;
                sum = fmaf(shares[s], __uint_as_float((unsigned)values[s]), sum);
            }
        }
        if (writes) store(e, token, feature, sum, before);
    }
}

// Weights of known experts are fetched before the predecessor is done. With `shares`, or grouped without `rows`, all are
// known, as ids or blocks were ready before the predecessor began: a kernel between the one that wrote them and this one
// let its dependents begin after its own wait (in its blocks of chosen experts). A block that has nothing to do leaves
// without a wait: its grid is done when the others are. Dynamic shared memory: 4 bytes of each pair, unless GROUPED.
template <class Tile, int WARPS, int ROW_TILES, bool GROUPED>
__device__ __forceinline__ void chosen_experts(const unsigned char* weights, const __half* x, int x_slots, int K,
                                               int row_tiles, const Choices& c, const Grouped& grouped,
                                               const Epilogue& e) {
    extern __shared__ int ids[];  // as c.ids
    __shared__ float sums[WARPS][ROW_TILES][8 * 16];  // of 16 rows of each token
    __shared__ float4 scales[ROW_TILES * 4], biases[ROW_TILES * 4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = lane % 16;
    const int pair = blockIdx.y, k_tiles = (K + Tile::K - 1) / Tile::K;
    if (!GROUPED && pair == c.tokens * c.slots) {
        if (blockIdx.x < c.adders) add_slots<WARPS>(row_tiles, c, e);
        return;
    }
    // Which of the experts that all tokens take this block computes, if not below 0.
    const int beyond = !GROUPED && c.always ? pair % c.slots - (c.slots - c.always) : -1;
    if (beyond >= 0 && pair >= c.slots) return;  // the first token's block works
    const bool is_known = GROUPED ? !grouped.rows : c.shares || beyond >= 0;
    if (!is_known) wait_for_predecessor();

    // slot: of token g with this expert, or -1. Grouped, a column stands for a pair: the g-th one, or -1.
    int expert, slot, first_token = 0, first_slot = pair, columns = c.tokens;
    if (GROUPED) {
        const int4 block = __ldcg(grouped.blocks + pair);
        expert = block.x, columns = block.z - block.y, first_slot = block.y;
        if (!columns) return;
        slot = g < columns ? block.y + g : -1;
    } else if (beyond >= 0) {
        expert = c.routed + beyond;
        slot = g < c.tokens ? pair : -1;
    } else {
        // A block reads each id once: all blocks read the same lines, which one place of L2 hands out. Before the wait,
        // L1 may hold what was there before.
#pragma unroll 1
        for (int i = threadIdx.x; i < c.tokens * c.slots; i += WARPS * 32)
            ids[i] = c.shares ? __ldcg(c.ids + i) : c.ids[i];
        __syncthreads();
        const int slots = g < c.tokens ? c.slots : 0;
        expert = ids[pair], slot = -1;
#pragma unroll 1
        for (int s = t; s < slots; s += 4)
            if (ids[g * c.slots + s] == expert) slot = s;
        slot = max(slot, __shfl_xor_sync(~0u, slot, 1));
        slot = max(slot, __shfl_xor_sync(~0u, slot, 2));
        const int first_lane = __ffs(__ballot_sync(~0u, slot >= 0)) - 1;
        first_token = first_lane / 4, first_slot = __shfl_sync(~0u, slot, first_lane);
        if (first_token * c.slots + first_slot != pair) return;
    }

    const int row_tile = blockIdx.x * ROW_TILES, count = min(ROW_TILES, row_tiles - row_tile);
    const size_t at = (size_t)expert * row_tiles + row_tile;
    unsigned tile = (at * k_tiles + warp) * (Tile::BYTES / 16);  // in 16 bytes: half the registers of a pointer
    typename Tile::Raw raw[ROW_TILES];
    auto load = [&]() {
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++)
            if (r < count) {
                const size_t offset = (tile + r * k_tiles * (Tile::BYTES / 16)) * (size_t)16;
                Tile::template load<Global>(raw[r], weights + offset, lane);
            }
    };
    if (warp < k_tiles) load();
    if (beyond >= 0) {  // the other tiles come to L2; of chosen experts, late as they are known, that took longer
        const unsigned char* const first_tile = weights + at * k_tiles * Tile::BYTES;
#pragma unroll 1
        for (int i = WARPS * Tile::BYTES + threadIdx.x * 128; i < count * k_tiles * Tile::BYTES; i += WARPS * 32 * 128)
            prefetch(first_tile + i);
    }
    if (threadIdx.x < count * 4) {
        copy_async(&scales[threadIdx.x], e.row_scale + at * 16 + threadIdx.x * 4, 16);
        if (e.bias) copy_async(&biases[threadIdx.x], e.bias + at * 16 + threadIdx.x * 4, 16);
        copy_commit();
    }
    dependents_may_start();
    if (is_known) wait_for_predecessor();

    const int token = slot < 0 ? first_token : g;  // columns that are not wanted repeat one that is
    unsigned column = (x_slots ? token * x_slots + (slot < 0 ? first_slot : slot) : token) * K;
    if (GROUPED) {
        const int own = slot < 0 ? first_slot : slot;
        column = (grouped.rows ? grouped.rows[own] : own) * K;
    }
    float acc[ROW_TILES][1][4] = {};
#pragma unroll 1
    for (int kt = warp; kt < k_tiles; kt += WARPS) {
        uint4 chunks[Tile::K / 32];
        activations<Tile>(chunks, x + column, kt, K);
#pragma unroll
        for (int step = 0; step < Tile::K / 32; step++) {
            const uint4 b[1] = {chunks[step]};
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) multiply<Tile>(acc[r], raw[r], step, b);
        }
        tile += WARPS * (Tile::BYTES / 16);
        if (kt + WARPS < k_tiles) load();
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES * 4; i++)
        sums[warp][i / 4][(2 * t + i % 2) * 16 + g + i / 2 % 2 * 8] = acc[i / 4][0][i % 4];
    copy_wait<0>();
    __syncthreads();

    const bool gated = is_gated(e.activation);
#pragma unroll 1
    for (int i = warp; i < (columns + 1) / 2 * ROW_TILES; i += WARPS) {  // two tokens: 16 lanes each
        const int r = i % ROW_TILES, of_row_tile = row_tile + r, of = i / ROW_TILES * 2 + lane / 16;
        const int feature = gated ? of_row_tile * 8 + row % 8 : of_row_tile * 16 + row;
        const int of_slot = __shfl_sync(~0u, slot, of * 4);
        if (r >= count || !__any_sync(~0u, of_slot >= 0)) continue;
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += sums[w][r][of * 16 + row];
        value = value * ((&scales[r * 4].x)[row] * e.in_factor) + (e.bias ? (&biases[r * 4].x)[row] : 0.0f);
        if (!GROUPED && c.shares) {
            const size_t to = ((size_t)(of * row_tiles + of_row_tile) * c.slots + of_slot) * 16 + row;
            if (of_slot >= 0)
                static_cast<volatile unsigned long long*>(c.handed_over)[to] = HANDED_OVER | __float_as_uint(value);
            continue;
        }
        const float up = __shfl_down_sync(~0u, value, 8, 16);
        if (gated) value = gated_product(value, up, e.activation);
        else if (e.activation == RELU2) value = relu2(value);
        if (of_slot >= 0 && feature < e.features && !(gated && row >= 8))
            store(e, GROUPED ? of_slot : of * c.slots + of_slot, feature, value, 0.0f);
    }
}

// Many tokens: pairs lie grouped by expert, and blocks[i] says what block i of them computes: {expert, first pair, end}
// (kernels/experts.cu writes it; the grid is as large as it may be, and what is left has first = end). Points weights
// and epilogue at that expert.
template <class Tile>
__device__ __forceinline__ int4 expert_block(const int4* blocks, const unsigned char*& weights, int K, int row_tiles,
                                             Epilogue& e) {
    dependents_may_start();
    wait_for_predecessor();
    const int4 block = blocks[blockIdx.x];
    const size_t rows = (size_t)block.x * row_tiles;
    weights += rows * ((K + Tile::K - 1) / Tile::K) * Tile::BYTES;
    e.row_scale += rows * 16;
    if (e.bias) e.bias += rows * 16;
    return block;
}
