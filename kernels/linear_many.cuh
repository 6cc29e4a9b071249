// The linear kernel for more tokens on every architecture (mma.sync). Included by linear.cuh.
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
