// Linears of which every token uses a few out of many: expert e's tiles, row scales and bias lie behind those of e - 1.
// Included by linear.cuh.
//
// Few tokens (up to 8), each with `slots` experts, which are distinct. Block (row_tile, slot, token) computes 16 rows of
// the expert in that slot, for all tokens that chose it: they are columns of one mma, a column for each token, and only
// the block of the first of them works. Its warps take the tiles in turn and their sums are added in warp order, so a
// result depends on nothing but its own token. Many warps with few registers hide the way from memory better than tiles
// fetched ahead, and what a block does besides its few tiles is kept short.
//
// Without `partial`, row token * slots + slot of the output is an expert's result. With it, row token is their sum times
// `shares` in the order of the slots, by the block that is done last with them.
struct Choices {
    const int* ids;       // [tokens][slots]
    int tokens, slots;
    int always, routed;   // the last `always` slots of all tokens hold experts routed, routed + 1, ...
    const float* shares;  // [tokens][slots], or null
    float* partial;       // room for [tokens][row tiles][slots][16], or null
    int* tickets;         // [tokens][row tiles], zero before and after
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

// Orders what was written before it before what is written after it, for all who see the latter.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Weights of known experts are fetched before the predecessor is done. With `partial` all are known, as ids were ready
// before the predecessor began: a kernel between the one that wrote them and this one let its dependents begin after
// its own wait (in its blocks of chosen experts).
template <class Tile, int WARPS>
__device__ __forceinline__ void chosen_experts(const unsigned char* weights, const __half* x, int x_slots, int K,
                                               int row_tiles, const Choices& c, const Epilogue& e) {
    __shared__ float sums[WARPS][8 * 16];  // of 16 rows of each token
    __shared__ float4 scales[4], biases[4];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = lane % 16;
    const int row_tile = blockIdx.x, k_tiles = (K + Tile::K - 1) / Tile::K;
    const int beyond = blockIdx.y - (c.slots - c.always);  // the slots of chosen experts
    if (beyond >= 0 && blockIdx.z > 0) return;             // the first token's block works
    const bool is_known = c.partial || beyond >= 0;
    if (!is_known) wait_for_predecessor();

    const int* const own_id = c.ids + blockIdx.z * c.slots + blockIdx.y;
    const int expert = beyond >= 0 ? c.routed + beyond
        : c.partial ? __ldcg(own_id) : *own_id;  // before the wait, L1 may hold what was there before
    const size_t at = (size_t)expert * row_tiles + row_tile;
    unsigned tile = (at * k_tiles + warp) * (Tile::BYTES / 16);  // in 16 bytes: half the registers of a pointer
    auto load = [&](typename Tile::Raw& to) { Tile::template load<Global>(to, weights + tile * (size_t)16, lane); };
    typename Tile::Raw raw;
    if (warp < k_tiles) load(raw);
    if (beyond >= 0) {  // the other tiles come to L2; of chosen experts, late as they are known, that took longer
#pragma unroll 1
        for (int ahead = WARPS; warp + ahead < k_tiles; ahead += WARPS)
            if (lane < (Tile::BYTES + 127) / 128)
                prefetch(weights + (tile + ahead * (Tile::BYTES / 16)) * (size_t)16 + lane * 128);
    }
    if (threadIdx.x < 4) {
        copy_async(&scales[threadIdx.x], e.row_scale + at * 16 + threadIdx.x * 4, 16);
        if (e.bias) copy_async(&biases[threadIdx.x], e.bias + at * 16 + threadIdx.x * 4, 16);
        copy_commit();
    }
    dependents_may_start();
    if (is_known) wait_for_predecessor();

    int slot = g == blockIdx.z ? blockIdx.y : -1;  // of token g with this expert
    if (c.tokens > 1) {
        if (g < c.tokens) {
#pragma unroll 2
            for (int s = t; s < c.slots; s += 4)
                if (c.ids[g * c.slots + s] == expert) slot = s;
        }
        slot = max(slot, __shfl_xor_sync(~0u, slot, 1));
        slot = max(slot, __shfl_xor_sync(~0u, slot, 2));
        if (__any_sync(~0u, slot >= 0 && g < blockIdx.z)) {
            copy_wait<0>();
            return;
        }
    }
    const int token = slot < 0 ? blockIdx.z : g;  // columns that are not wanted repeat one that is
    const unsigned column = (x_slots ? token * x_slots + (slot < 0 ? blockIdx.y : slot) : token) * K;
    float acc[1][4] = {};
#pragma unroll 1
    for (int kt = warp; kt < k_tiles; kt += WARPS) {
        uint4 chunks[Tile::K / 32];
        activations<Tile>(chunks, x + column, kt, K);
#pragma unroll
        for (int step = 0; step < Tile::K / 32; step++) {
            const uint4 b[1] = {chunks[step]};
            multiply<Tile>(acc, raw, step, b);
        }
        tile += WARPS * (Tile::BYTES / 16);
        if (kt + WARPS < k_tiles) load(raw);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][(2 * t + i % 2) * 16 + g + i / 2 * 8] = acc[0][i];
    copy_wait<0>();
    __syncthreads();

    const bool gated = is_gated(e.activation);
    const int feature = gated ? row_tile * 8 + row % 8 : row_tile * 16 + row;
#pragma unroll 1
    for (int i = warp; i < (c.tokens + 1) / 2; i += WARPS) {  // two tokens: 16 lanes each
        const int own = 2 * i + lane / 16, own_slot = __shfl_sync(~0u, slot, own * 4);
        if (!__any_sync(~0u, own_slot >= 0)) continue;
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += sums[w][own * 16 + row];
        value = value * ((&scales[0].x)[row] * e.in_factor) + (e.bias ? (&biases[0].x)[row] : 0.0f);
        const bool writes = own_slot >= 0 && feature < e.features && !(gated && row >= 8);
        if (!c.partial) {
            const float up = __shfl_down_sync(~0u, value, 8, 16);
            if (gated) value = gated_product(value, up, e.activation);
            else if (e.activation == RELU2) value = relu2(value);
            if (writes) store(e, own * c.slots + own_slot, feature, value, 0.0f);
            continue;
        }
        const int whole = own * row_tiles + row_tile;
        float* const all = c.partial + (size_t)whole * c.slots * 16 + row;
        if (own_slot >= 0) all[own_slot * 16] = value;
        __syncwarp();
        int is_last = 0;
        if (row == 0 && own_slot >= 0) {
            fence();
            is_last = atomicAdd(&c.tickets[whole], 1) == c.slots - 1;
            if (is_last) c.tickets[whole] = 0;
            fence();
        }
        if (!__shfl_sync(~0u, is_last, lane & 16) || !writes) continue;
        const float* const shares = c.shares + own * c.slots;
        const float before = e.mode == ADD_FLOAT
            ? reinterpret_cast<const float*>(e.out)[(size_t)own * e.stride + feature] : 0.0f;
        float sum = 0.0f;
#pragma unroll 1
        for (int base = 0; base < c.slots; base += 4) {
            float values[4];
#pragma unroll
            for (int s = 0; s < 4; s++) values[s] = base + s < c.slots ? __ldcg(all + (base + s) * 16) : 0.0f;
#pragma unroll
            for (int s = 0; s < 4; s++)
                if (base + s < c.slots) sum = fmaf(shares[base + s], values[s], sum);
        }
        store(e, own, feature, sum, before);
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
