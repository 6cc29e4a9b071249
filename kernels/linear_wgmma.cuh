// The linear kernel for 16 tokens and more on sm_90a: y = x W^T by warpgroup products, weights decoded in registers.
//
// Weights are the A operand, from registers: a warp's 16 rows of a product are a row tile, decoded as for `mma`. The
// activations are B, in shared memory, in the order of order.cuh: a block's part of a slab is contiguous.
//
// One warpgroup brings weights and, by bulk copies, activations into a ring of STAGES tiles' columns. Two others
// compute M * 64 rows each for N tokens, and decode a step's weights while the products of the step before are running.
// Blocks go through the tiles of the output, tokens fastest, so that weights come from memory once.
//
// GROUPED: tokens are pairs grouped by expert, in `count` blocks of up to N {expert, first, end}, and x is ordered block
// by block.
//
// A stage is free when every thread that computes has said so, after the products of what it read are done.
//
// SPLIT blocks, a cluster, share a tile's columns; each has one tile at least. Their sums are added in order of rank,
// through shared memory. BLOCKS: how many blocks share an SM. Order: SumOrder of linear_many.cuh.
//
// Dynamic shared memory: activations [STAGES][Tile::K / 64][N][64] halves; weights [STAGES][row tiles][Tile::BYTES];
// sums [2][tokens at a time][M * 64 + 4] floats (SPLIT: in their place); barriers [2][STAGES].
#include "wgmma.cuh"
#include "order.cuh"

template <class Tile, int M, int N, int STAGES, int SPLIT, int BLOCKS, bool GROUPED, class Order>
__device__ __forceinline__ void warpgroup_tokens(const unsigned char* weights, const unsigned char* x, int tokens,
                                                 int padded, int K, int row_tiles, int parts, const int4* blocks,
                                                 int count, const Epilogue& e) {
    extern __shared__ __align__(1024) unsigned char ring[];
    constexpr int GROUPS = 2, ROW_TILES = GROUPS * M * 4, ROWS = M * 64, SLABS = Tile::K / 64, STEPS = Tile::K / 32;
    constexpr int SLAB = N * 128, X_BYTES = SLABS * SLAB, W_BYTES = ROW_TILES * Tile::BYTES;
    constexpr int CHUNK = SPLIT > 1 || N <= 64 ? N : 32, STRIDE = ROWS + 4;  // of the sums: free of bank conflicts
    unsigned char* const packed = ring + STAGES * X_BYTES;
    unsigned char* const behind = packed + STAGES * W_BYTES;
    float* const sums = reinterpret_cast<float*>(SPLIT > 1 ? ring : behind);
    const unsigned full = shared_address(behind + (SPLIT > 1 ? 0 : GROUPS * CHUNK * STRIDE * 4));
    const unsigned empty = full + STAGES * 8;
    static_assert(SPLIT == 1 || Order::WARPS == 1, "blocks that share columns take them as they come");
    static_assert(SPLIT == 1 || GROUPS * CHUNK * STRIDE * 4 <= STAGES * (X_BYTES + W_BYTES), "the sums fit the ring");
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int k_tiles = (K + Tile::K - 1) / Tile::K, token_tiles = GROUPED ? count : (tokens + N - 1) / N;
    const int tiles = token_tiles * ((row_tiles + ROW_TILES - 1) / ROW_TILES);
    const int rank = SPLIT > 1 ? blockIdx.x % SPLIT : 0, first = blockIdx.x / SPLIT, tiles_apart = gridDim.x / SPLIT;
    const int k_first = k_tiles * rank / SPLIT, k_end = k_tiles * (rank + 1) / SPLIT;

    // A tile's expert, first token, and where the tokens end.
    auto tokens_of = [&](int tile) {
        const int token = tile % token_tiles * N;
        return GROUPED ? blocks[tile % token_tiles] : make_int4(0, token, min(token + N, tokens), 0);
    };

    dependents_may_start();
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + s * 8, 128 + 1);
            mbarrier_init(empty + s * 8, GROUPS * 128);
        }
        mbarrier_publish();
    }
    __syncthreads();

    if (warp >= GROUPS * 4) {
        fewer_registers<BLOCKS == 1 ? 40 : 32>();  // of 168 or 80 that each thread begins with
        const unsigned long long policy = evict_first();
        auto bring_weights = [&](int tile, const int4& part, int kt, int stage) {
            const size_t expert = (size_t)part.x * row_tiles;
#pragma unroll
            for (int i = warp % 4; i < ROW_TILES; i += 4) {
                const int row_tile = min(tile / token_tiles * ROW_TILES + i, row_tiles - 1);
                const unsigned char* from = weights + ((expert + row_tile) * k_tiles + kt) * Tile::BYTES + lane * 16;
                unsigned char* to = packed + stage * W_BYTES + i * Tile::BYTES + lane * 16;
#pragma unroll
                for (int c = 0; c < Tile::BYTES; c += 512)
                    if (c + 512 <= Tile::BYTES || lane * 16 < Tile::BYTES - c) copy_async(to + c, from + c, policy);
            }
            mbarrier_arrive_copied(full + stage * 8);
        };
        auto bring_activations = [&](const int4& part, int kt, int stage) {
            if (threadIdx.x != GROUPS * 128) return;
            const int bytes = (part.z - part.y) * 128;
            mbarrier_expect(full + stage * 8, SLABS * bytes);
#pragma unroll
            for (int i = 0; i < SLABS; i++)
                bulk_copy(shared_address(ring + stage * X_BYTES + i * SLAB),
                          x + ((size_t)(kt * SLABS + i) * padded + part.y) * 128, bytes, full + stage * 8);
        };
        // Weights depend on no other kernel: the first ones come before the predecessor is done.
        const int early = !GROUPED && first < tiles ? min(STAGES, k_end - k_first) : 0;
        Order order;
        for (int i = 0; i < early; i++, order.next(k_tiles, parts))
            bring_weights(first, tokens_of(first), k_first + order.kt, i);
        wait_for_predecessor();
        order = {};
        for (int i = 0; i < early; i++, order.next(k_tiles, parts))
            bring_activations(tokens_of(first), k_first + order.kt, i);
        int stage = early % STAGES, phase = early < STAGES;  // the first turn of a stage finds it empty
        for (int tile = first; tile < tiles; tile += tiles_apart) {
            const int4 part = tokens_of(tile);
            if (GROUPED && part.y >= part.z) continue;
            if (tile != first) order = {};
            for (int i = tile == first ? early : 0; i < k_end - k_first; i++, order.next(k_tiles, parts)) {
                mbarrier_wait(empty + stage * 8, phase);
                bring_activations(part, k_first + order.kt, stage);
                bring_weights(tile, part, k_first + order.kt, stage);
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
        }
        return;
    }

    more_registers<BLOCKS == 1 ? 232 : 104>();
    if (!GROUPED && first < tiles && threadIdx.x * 32 < ROW_TILES * 16)
        prefetch(e.row_scale + min(first / token_tiles * ROW_TILES * 16 + (int)threadIdx.x * 32, row_tiles * 16 - 1));
    wait_for_predecessor();
    const int group = warp / 4;
    int stage = 0, phase = 0;
    for (int tile = first; tile < tiles; tile += tiles_apart) {
        if (GROUPED && blocks[tile % token_tiles].y >= blocks[tile % token_tiles].z) continue;
        float acc[M][N / 2];
        unsigned a[2][M][2][4];
        typename Tile::Raw raw[M];
        auto own = [&](int m) { return packed + stage * W_BYTES + (group * M * 4 + m * 4 + warp % 4) * Tile::BYTES; };
        auto begin = [&]() {
            mbarrier_wait(full + stage * 8, phase);
#pragma unroll
            for (int m = 0; m < M; m++) Tile::load_pair(raw[m], own(m), lane, 0);
        };
        begin();
        int last = stage;
        Sums<Order, N / 2> sum[M];
        Order order;
        SumEnd end = SUM_GOES_ON;
        for (int number = k_first; number < k_end; number++) {
            const unsigned long long b = swizzled_columns(shared_address(ring + stage * X_BYTES));
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                auto& fragments = a[step % 2];
#pragma unroll
                for (int m = 0; m < M; m++) {
                    if (step > 0 && step % 2 == 0) Tile::load_pair(raw[m], own(m), lane, step / 2);
                    Tile::template decode<0>(raw[m], step, fragments[m]);
                }
                if (step == 0 && end != SUM_GOES_ON) {
                    wgmma_wait<0>();
                    mbarrier_arrive(empty + last * 8);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        wgmma_settled(acc[m]);
                        sum[m].add(acc[m], end);
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int h = 0; h < 2; h++) {
#pragma unroll
                    for (int m = 0; m < M; m++)
                        wgmma<N>(acc[m], fragments[m][h], b + step / 2 * (SLAB / 16) + step % 2 * 4 + h * 2,
                                 step > 0 || h > 0 || (number > k_first && end == SUM_GOES_ON));
                }
                wgmma_commit();
                if (step == STEPS - 1) {
                    const int done = stage;
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                    // Products still read their fragments, which the next load must not overwrite.
                    if constexpr (Tile::FRAGMENTS) wgmma_wait<0>();
                    if (number + 1 < k_end) begin();
                    wgmma_wait<1>();
                    last = done;
                    end = order.next(k_tiles, parts);
                } else {
                    wgmma_wait<1>();
                    if (step == 0 && number > k_first && end == SUM_GOES_ON) mbarrier_arrive(empty + last * 8);
                }
            }
        }
        auto finish = [&]() {
            wgmma_wait<0>();
#pragma unroll
            for (int m = 0; m < M; m++) {
                wgmma_settled(acc[m]);
                sum[m].finish(acc[m]);
            }
        };

        // Gate and up of a row of the product are in one thread: what goes to another linear leaves from registers.
        if (SPLIT == 1 && e.mode == STORE_INTERLEAVED && (e.activation == SILU || e.activation == GELU_TANH)) {
            const int g = lane / 4, t = lane % 4;
            const int first_tile = tile / token_tiles * ROW_TILES + group * M * 4 + warp % 4;
            const int4 part = tokens_of(tile);
            float scale[M][2], bias[M][2];
#pragma unroll
            for (int m = 0; m < M; m++) {
                const size_t row = ((size_t)part.x * row_tiles + first_tile + m * 4) * 16 + g;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    scale[m][half] = e.row_scale[row + half * 8] * e.in_factor;
                    bias[m][half] = e.bias ? e.bias[row + half * 8] : 0.0f;
                }
            }
            Slope slope = slope_of(e.activation);
            asm volatile("" : "+f"(slope.linear), "+f"(slope.cubic));  // one copy of what follows for both
            finish();
            mbarrier_arrive(empty + last * 8);
            // Lanes of neighbouring rows exchange tokens: one gets both rows of the even token, one those of the odd.
            const int own = 2 * t + g % 2, pick = g % 2 ? 0x3276 : 0x5410;
            unsigned* const to = static_cast<unsigned*>(e.out)
                + ordered_word(first_tile * 8 + g / 2 * 2, part.y + own, e.stride / 64, true, own);
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                unsigned words[M];
#pragma unroll
                for (int m = 0; m < M; m++) {
                    float v[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float gate = acc[m][n * 4 + j] * scale[m][0] + bias[m][0];
                        const float up = acc[m][n * 4 + 2 + j] * scale[m][1] + bias[m][1];
                        v[j] = smooth_product(gate, up, slope) * e.out_factor;
                    }
                    const unsigned both = as_bits(__floats2half2_rn(v[0], v[1]));
                    words[m] = __byte_perm(both, __shfl_xor_sync(~0u, both, 4), pick);
                }
                if (part.y + n * 8 + own < part.z) {
                    if constexpr (M == 2) *reinterpret_cast<uint2*>(to + n * 256) = make_uint2(words[0], words[1]);
                    else to[n * 256] = words[0];
                }
            }
            continue;
        }
        finish();

        if constexpr (SPLIT > 1) barrier_wait(1, GROUPS * 128);  // the ring is free for the sums

        // What follows is computed from here on: kept through the products, it would take their registers.
        const int thread = thread_index() % 128, g = thread % 32 / 4, t = thread % 4;
        float* const own_sums = sums + group * CHUNK * STRIDE;
        const bool gated = is_gated(e.activation);

        // The sums go through shared memory, some tokens at a time, and come back as four rows of a token. Gated: four
        // rows of the gate and, eight rows further, four of the other part.
        const int quads = gated ? ROWS / 8 : ROWS / 4, quad = thread % quads;
        const int row = gated ? quad / 2 * 16 + quad % 2 * 4 : quad * 4;
        const int packed_row = tile / token_tiles * ROW_TILES * 16 + group * ROWS + row;
        const int column = gated ? packed_row / 16 * 8 + packed_row % 8 : packed_row;
        const int4 part = tokens_of(tile);
        const size_t expert_row = (size_t)part.x * row_tiles * 16 + packed_row;
        float4 scale[2] = {};  // of the two quads of rows, where there are any
        if (packed_row < row_tiles * 16) {
            scale[0] = *reinterpret_cast<const float4*>(e.row_scale + expert_row);
            if (gated) scale[1] = *reinterpret_cast<const float4*>(e.row_scale + expert_row + 8);
        }
        const bool whole = column + 4 <= e.features && e.stride % 4 == 0 && reinterpret_cast<size_t>(e.out) % 16 == 0;
        auto finished = [&](const float* from, int half) {
            float4 v = *reinterpret_cast<const float4*>(from + half * 8);
            if (SPLIT > 1) {
                v = cluster_load(shared_address(from + half * 8), 0);
#pragma unroll
                for (int r = 1; r < SPLIT; r++) {
                    const float4 other = cluster_load(shared_address(from + half * 8), r);
                    v.x += other.x, v.y += other.y, v.z += other.z, v.w += other.w;
                }
            }
            const float4 s = scale[half];
            float4 c = {};
            if (e.bias) c = *reinterpret_cast<const float4*>(e.bias + expert_row + half * 8);
            return make_float4(v.x * (s.x * e.in_factor) + c.x, v.y * (s.y * e.in_factor) + c.y,
                               v.z * (s.z * e.in_factor) + c.z, v.w * (s.w * e.in_factor) + c.w);
        };
        auto write = [&](int number, const float4& value) {  // of the tile's tokens
            const int token = part.y + number;
            const size_t at = (size_t)token * e.stride + column;
            const float v[4] = {value.x * e.out_factor, value.y * e.out_factor, value.z * e.out_factor,
                                value.w * e.out_factor};
            float* const floats = static_cast<float*>(e.out) + at;
            __half* const halves = static_cast<__half*>(e.out) + at;
            if (e.mode >= STORE_ORDERED) {  // e.features is a multiple of 128
                const bool interleaved = e.mode == STORE_INTERLEAVED;
                unsigned* const words = static_cast<unsigned*>(e.out);
                words[ordered_word(column, token, e.stride / 64, interleaved, number % 8)] =
                    as_bits(__floats2half2_rn(v[0], v[1]));
                words[ordered_word(column + 2, token, e.stride / 64, interleaved, number % 8)] =
                    as_bits(__floats2half2_rn(v[2], v[3]));
            } else if (whole) {
                if (e.mode == STORE_HALF)
                    *reinterpret_cast<uint2*>(halves) = make_uint2(as_bits(__floats2half2_rn(v[0], v[1])),
                                                                   as_bits(__floats2half2_rn(v[2], v[3])));
                else if (e.mode == STORE_FLOAT)
                    *reinterpret_cast<float4*>(floats) = make_float4(v[0], v[1], v[2], v[3]);
                else add_four(floats, v[0], v[1], v[2], v[3]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (column + i >= e.features) break;
                    if (e.mode == STORE_HALF) halves[i] = __float2half_rn(v[i]);
                    else floats[i] = (e.mode == ADD_FLOAT ? floats[i] : 0.0f) + v[i];
                }
            }
        };
#pragma unroll 1
        for (int chunk = 0; chunk < N / CHUNK; chunk++) {
#pragma unroll
            for (int n = 0; n < N / 8; n++) {
                if (n / (CHUNK / 8) != chunk) continue;
#pragma unroll
                for (int m = 0; m < M; m++) {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        own_sums[(n % (CHUNK / 8) * 8 + 2 * t + i % 2) * STRIDE + m * 64 + thread / 32 * 16 + g
                                 + i / 2 * 8] = acc[m][n * 4 + i];
                }
            }
            if (chunk == 0) mbarrier_arrive(empty + last * 8);
            if constexpr (SPLIT > 1) cluster_barrier();
            else barrier_wait(1 + group, 128);
#pragma unroll 1
            for (int c = thread / quads * SPLIT + rank; c < CHUNK; c += 128 / quads * SPLIT) {
                if (part.y + chunk * CHUNK + c >= part.z || column >= e.features) continue;
                const float* from = own_sums + c * STRIDE + row;
                float4 v = finished(from, 0);
                if (gated) {
                    const float4 up = finished(from, 1);
                    v = make_float4(gated_product(v.x, up.x, e.activation), gated_product(v.y, up.y, e.activation),
                                    gated_product(v.z, up.z, e.activation), gated_product(v.w, up.w, e.activation));
                } else if (e.activation == RELU2) v = make_float4(relu2(v.x), relu2(v.y), relu2(v.z), relu2(v.w));
                write(chunk * CHUNK + c, v);
            }
            if constexpr (SPLIT > 1) cluster_barrier();
            else barrier_wait(1 + group, 128);
        }
    }
}
