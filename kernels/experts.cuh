// Linears of which every token uses a few out of many: expert e's tiles, row scales and bias lie behind those of e - 1.
// Included by linear.cuh.
//
// Few tokens: block (r, row_tile) computes 16 rows of output r, which is the sum over pairs r * slots .. + slots - 1 of
// shares[pair] * (W[ids[pair]] x[pair / pairs_of_x] + bias[ids[pair]]): with slots = 1 and no shares, one expert's
// output for one of its tokens; with all of a token's slots, their weighted sum. Warps take the tiles of all slots in
// turn and their sums are added in warp order: a result depends on nothing but its own token. The same activations stand
// in all columns of the mma. Warps have only a few tiles each, so many warps with few registers hide the way from memory
// better than tiles fetched ahead.

// 8 activations from column k of a row of K, zero past the end. `aligned`: K % 8 == 0.
__device__ __forceinline__ uint4 activations(const __half* row, int k, int K, bool aligned) {
    if (aligned) return k < K ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    __half values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = k + i < K ? row[k + i] : __float2half_rn(0.0f);
    return *reinterpret_cast<const uint4*>(values);
}

template <class Tile, int WARPS>
__device__ __forceinline__ void chosen_experts(const unsigned char* weights, const __half* x, const int* ids,
                                               const float* shares, int slots, int pairs_of_x, int K, int row_tiles,
                                               const Epilogue& e) {
    __shared__ float sums[WARPS][16];
    constexpr int STEPS = Tile::K / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int output = blockIdx.x, row_tile = blockIdx.y, first = output * slots;
    const int k_tiles = (K + Tile::K - 1) / Tile::K;
    const bool aligned = K % 8 == 0;
    dependents_may_start();
    wait_for_predecessor();

    // What the outputs need is fetched now: its latency would stand at the end otherwise.
    const bool gated = is_gated(e.activation);
    const int row = lane % 16, column = gated ? row_tile * 8 + row % 8 : row_tile * 16 + row;
    const bool writes = warp == 0 && lane < 16 && column < e.features && !(gated && row >= 8);
    float bias = 0.0f, before = 0.0f;
    if (e.bias && warp == 0) {
        for (int s = first; s < first + slots; s++)
            bias += (shares ? shares[s] : 1.0f) * e.bias[((size_t)ids[s] * row_tiles + row_tile) * 16 + row];
    }
    if (e.mode == ADD_FLOAT && writes)
        before = reinterpret_cast<const float*>(e.out)[(size_t)output * e.stride + column];

    float low = 0.0f, high = 0.0f;
    for (int task = warp; task < slots * k_tiles; task += WARPS) {
        const int slot = task / k_tiles, kt = task - slot * k_tiles, pair = first + slot;
        const size_t at = (size_t)ids[pair] * row_tiles + row_tile;
        const __half* columns = x + (size_t)(pair / pairs_of_x) * K;
        typename Tile::Raw raw;
        uint4 chunks[STEPS];
        Tile::load(raw, weights + (at * k_tiles + kt) * Tile::BYTES, lane);
#pragma unroll
        for (int step = 0; step < STEPS; step++)  // `position` is its own inverse
            chunks[step] = activations(columns, kt * Tile::K + Tile::position(4 * step + t) * 8, K, aligned);
        const float share = shares ? shares[pair] : 1.0f;
        const float low_scale = e.row_scale[at * 16 + g] * share, high_scale = e.row_scale[at * 16 + g + 8] * share;
        float acc[1][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const uint4 b[1] = {chunks[step]};
            multiply<Tile>(acc, raw, step, b);
        }
        low += acc[0][0] * low_scale;
        high += acc[0][2] * high_scale;
    }

    if (t == 0) sums[warp][g] = low, sums[warp][g + 8] = high;
    __syncthreads();
    if (warp != 0) return;
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) value += sums[w][row];
    value = value * e.in_factor + bias;
    const float up = __shfl_down_sync(0xffffffffu, value, 8, 16);
    if (gated) value = gated_product(value, up, e.activation);
    else if (e.activation == RELU2) value = relu2(value);
    if (writes) store(e, output, column, value, before);
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
