// The linear kernel for more tokens on every architecture (mma.sync). Included by linear.cuh.
//
// A block computes RW * RT * 16 rows for TW * NT * 8 tokens (RW x TW warps). Weights (packed) and activations go
// through STAGES buffers in shared memory; each warp decodes the row tiles of its own part.
// Grid: (token blocks, row blocks), tokens fastest, so that weights come from memory once and activations from L2.
//
// It takes outputs first_token up to `tokens`; with GATHER and `rows`, output i is of row rows[i] of x.
//
// Order: SumOrder, below.
//
// Dynamic shared memory: [STAGES] of weights [RW * RT][Tile::BYTES], activations [tokens][Tile::K] halves.

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
