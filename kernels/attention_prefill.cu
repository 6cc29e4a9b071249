// Attention of many new tokens over pages: the K/V write, then flash attention (Dao et al. 2022, Dao 2023).
#include "attention.cuh"

// grid T, block 128: keys and values of every new token go to their pages (nothing does where others is 0). A token
// that no sequence owns gets a zero output row instead, so that what follows in the layer stays finite.
extern "C" __global__ void __launch_bounds__(128)
    attention_write(const __half* qkv, Kv* keys, Kv* values,
                    const int* __restrict__ positions, const int* __restrict__ starts,
                    const int* __restrict__ pages, int sequences, int table_width, int heads, int kv_heads,
                    int others, const float* k_norm, float k_eps, const float* v_norm, float v_eps,
                    const float2* rope, float value_scale, float key_factor, float value_factor,
                    __half* __restrict__ out) {
    wait_for_predecessor();
    const int token = blockIdx.x, warp = threadIdx.x / 32;
    if (token >= starts[sequences]) {
        for (int i = threadIdx.x; i < heads * HALF_DIM; i += 128)
            reinterpret_cast<unsigned*>(out + (size_t)token * heads * HEAD_DIM)[i] = 0;
        return;
    }
    if (!others) return;
    int low = 0, high = sequences;  // the last s with starts[s] <= token
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (starts[middle] <= token) low = middle; else high = middle;
    }
    const int position = positions[token];
    const int page = pages[(size_t)low * table_width + position / PAGE];
    const __half* row = qkv + (size_t)token * (heads + others) * HEAD_DIM;
    for (int i = warp; i < 2 * kv_heads; i += 4) {
        const int kv_head = i % kv_heads;
        const size_t target = head_in_page(page, kv_heads, kv_head, position % PAGE);
        const bool is_key = i < kv_heads;
        Opening opening;
        opening.load(is_key ? k_norm : v_norm, is_key ? rope : nullptr, position);
        Head head;
        head.load_half(row + (size_t)(heads + (is_key ? 0 : others - kv_heads) + kv_head) * HEAD_DIM);
        opening.open(head, is_key ? k_eps : v_eps, value_scale);
        head.store((is_key ? keys : values) + target, is_key ? key_factor : value_factor);
    }
}

constexpr int FLASH_WARPS = HEAD_DIM > 128 ? 4 : 8;
constexpr int SPLIT = HEAD_DIM > 256 ? 2 : 1;  // warps that share 16 rows, each with its part of the output
constexpr int PART_DIM = HEAD_DIM / SPLIT;
constexpr int FLASH_ROWS = 16 * FLASH_WARPS / SPLIT;  // a row: one query head of one token
constexpr int FLASH_KEYS = HEAD_DIM > 160 ? 16 : HEAD_DIM > 128 ? 32 : 64;
constexpr bool HELD = HEAD_DIM <= 160;  // whether registers hold the queries, too, or shared memory does
constexpr int TILES_AT = HELD ? 0 : FLASH_ROWS;      // row of shared memory where the tiles begin
#if __CUDA_ARCH__ >= 800
constexpr int STAGES = 2;                            // the next tiles arrive while these are used
#else
constexpr int STAGES = 1;  // copies are not asynchronous, and shared memory is small
#endif
constexpr bool IN_TURN = STAGES == 1 && HEAD_DIM > 256;  // values take the keys' place once the scores are done
constexpr int STRIDE = HEAD_DIM + 8;  // odd multiples of 16 bytes: no bank conflicts for ldmatrix

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const __half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)));
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const __half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)));
}

constexpr int PIECE = 16 / sizeof(Kv);  // numbers of 16 bytes of a page
constexpr int ROW_PIECES = HEAD_DIM / PIECE, PIECES = FLASH_KEYS * ROW_PIECES, THREADS = 32 * FLASH_WARPS;
constexpr int TURNS = (PIECES + THREADS - 1) / THREADS;

// FLASH_KEYS keys or values from `first` on, on their way into shared memory; rows from `length` on are zero. fp16 is
// copied there by itself. Codes come by registers, which hold them while the tiles before are used: `finish` puts them
// down (where STAGES is 1, `load` does).
struct Tile {
#if KV_FP8
    uint4 codes[STAGES == 2 ? TURNS : 1];
#endif
    __device__ __forceinline__ void load(__half* tile, const Kv* store, const int* table, int kv_heads, int kv_head,
                                         int first, int length) {
        const Kv* source = store + head_in_page(table[first / PAGE], kv_heads, kv_head, first % PAGE);
#pragma unroll(KV_FP8 && STAGES == 1 ? 1 : TURNS)
        for (int n = 0; n < TURNS; n++) {
            const int i = threadIdx.x + n * THREADS;
            if (i >= PIECES) break;
            const int row = i / ROW_PIECES, column = i % ROW_PIECES * PIECE;
            const Kv* from = source + row * HEAD_DIM + column;
#if KV_FP8
            uint4& held = codes[STAGES == 2 ? n : 0];
            held = first + row < length ? __ldcg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
            if (STAGES == 1) put(tile, i, held);
#else
            copy_async(tile + row * STRIDE + column, from, first + row < length ? 16 : 0);
#endif
        }
    }
    __device__ __forceinline__ void finish(__half* tile) const {
#if KV_FP8 && __CUDA_ARCH__ >= 800
#pragma unroll
        for (int n = 0; n < TURNS; n++)
            if (threadIdx.x + n * THREADS < PIECES) put(tile, threadIdx.x + n * THREADS, codes[n]);
#endif
    }
    static __device__ __forceinline__ void put(__half* tile, int i, const uint4& codes) {
        uint4* to = reinterpret_cast<uint4*>(tile + i / ROW_PIECES * STRIDE + i % ROW_PIECES * PIECE);
        to[0] = widen(codes.x, codes.y), to[1] = widen(codes.z, codes.w);
    }
    static __device__ __forceinline__ uint4 widen(unsigned first, unsigned second) {
        unsigned even[2], odd[2];
        from_e4m3(first, even[0], odd[0]), from_e4m3(second, even[1], odd[1]);
        return make_uint4(__byte_perm(even[0], odd[0], 0x5410), __byte_perm(even[0], odd[0], 0x7632),
                          __byte_perm(even[1], odd[1], 0x5410), __byte_perm(even[1], odd[1], 0x7632));
    }
};

// grid (kv_heads, row tiles of all sequences at most), block 32 * FLASH_WARPS. A row's result does not depend
// on the tile it falls into: key tiles start at multiples of FLASH_KEYS, and a tile that is masked for a row
// changes nothing in it. skip_single: leave sequences with one new token to attention_decode.
extern "C" __global__ void __launch_bounds__(32 * FLASH_WARPS, 1)
    attention_prefill(const __half* qkv, const Kv* keys,
                      const Kv* values, const int* __restrict__ positions,
                      const int* __restrict__ starts, const int* __restrict__ lengths,
                      const int* __restrict__ pages, int sequences, int table_width, int heads, int kv_heads,
                      int others, int skip_single, const float* q_norm, float q_eps, const float2* rope,
                      float value_scale, float scale_log2, int window, const float* __restrict__ sinks,
                      float out_factor, __half* __restrict__ out) {
    extern __shared__ __align__(16) __half shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int warp_row = warp / SPLIT * 16, first_dimension = warp % SPLIT * PART_DIM;
    wait_for_predecessor();

    // The blockIdx.y-th row tile, from the last of the last sequence: those with many keys start first.
    const int group = heads / kv_heads, kv_head = blockIdx.x;
    int sequence = -1, tile = 0;
    for (int base = 0, before = 0; base < sequences; base += 32) {
        const int s = sequences - 1 - base - lane;
        const int count = s < 0 ? 0 : starts[s + 1] - starts[s];
        const int tiles = count == 1 && skip_single ? 0 : (count * group + FLASH_ROWS - 1) / FLASH_ROWS;
        int sum = tiles;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(~0u, sum, offset);
            if (lane >= offset) sum += other;
        }
        const int left = before + sum - 1 - (int)blockIdx.y;  // tiles of this sequence that come after ours
        const unsigned found = __ballot_sync(~0u, left >= 0 && left < tiles);
        if (found) {
            const int owner = __ffs(found) - 1;
            sequence = __shfl_sync(~0u, s, owner), tile = __shfl_sync(~0u, left, owner);
            break;
        }
        before += __shfl_sync(~0u, sum, 31);
    }
    if (sequence < 0) return;

    const int start = starts[sequence], rows = (starts[sequence + 1] - start) * group,
              length = lengths[sequence];
    const int first_position = length - rows / group, first_row = tile * FLASH_ROWS;
    const int last_row = min(first_row + FLASH_ROWS, rows) - 1;
    const int* table = pages + (size_t)sequence * table_width;
    const int lowest = window ? max(0, first_position + first_row / group - window + 1) : 0;
    const int first_key = lowest / FLASH_KEYS * FLASH_KEYS;
    const int end_key = first_position + last_row / group + 1;

    // Queries: opened into shared memory; if registers then hold them, their room is the tiles'.
#pragma unroll 4
    for (int i = warp % SPLIT; i < 16; i += SPLIT) {
        const int row = first_row + warp_row + i;
        __half* target = shared + (warp_row + i) * STRIDE;
        if (row < rows) {
            const int token = start + row / group;
            const __half* source =
                qkv + ((size_t)token * (heads + others) + kv_head * group + row % group) * HEAD_DIM;
            Opening opening;
            opening.load(q_norm, rope, positions[token]);
            Head head;
            head.load_half(source);
            opening.open(head, q_eps, value_scale);
            head.store(target, 1.0f);
        } else {
            for (int j = lane; j < HALF_DIM; j += 32) reinterpret_cast<unsigned*>(target)[j] = 0;
        }
    }
    if (SPLIT > 1) __syncthreads();
    else __syncwarp();
    const __half* my_queries = shared + (warp_row + lane % 16) * STRIDE + lane / 16 * 8;
    unsigned q[HELD ? HEAD_DIM / 16 : 1][4];
    if (HELD) {
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) load_matrices(q[k], my_queries + k * 16);
        __syncthreads();
    }

    float o[PART_DIM / 8][4];
#pragma unroll
    for (int n = 0; n < PART_DIM / 8; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0;
    float largest[2] = {-INFINITY, -INFINITY};  // q.k before scale_log2, which is positive
    float sums[2] = {0, 0};
    int position[2];  // of this lane's two rows
#pragma unroll
    for (int i = 0; i < 2; i++) position[i] = first_position + (first_row + warp_row + g + 8 * i) / group;

    auto tile_at = [&](int key, int kind) {  // kind: 0 for keys, 1 for values
        return shared + (TILES_AT + (IN_TURN ? 0 : key / FLASH_KEYS % STAGES * 2 + kind) * FLASH_KEYS) * STRIDE;
    };
    Tile key_part, value_part;
    auto load = [&](int key) {
        key_part.load(tile_at(key, 0), keys, table, kv_heads, kv_head, key, length);
        if (!IN_TURN) value_part.load(tile_at(key, 1), values, table, kv_heads, kv_head, key, length);
        copy_commit();
    };
    if (STAGES == 2 && first_key < end_key) load(first_key);
    for (int key = first_key; key < end_key; key += FLASH_KEYS) {
        __half *key_tile = tile_at(key, 0), *value_tile = tile_at(key, 1);
        if (STAGES == 1) {
            __syncthreads();
            load(key);
        }
        key_part.finish(key_tile), value_part.finish(value_tile);
        copy_wait<0>();
        __syncthreads();
        if (STAGES == 2 && key + FLASH_KEYS < end_key) load(key + FLASH_KEYS);

        float s[FLASH_KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < FLASH_KEYS / 8; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            unsigned(&a)[4] = q[HELD ? k : 0];
            if (!HELD) load_matrices(a, my_queries + k * 16);
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 16; n++) {
                unsigned b[4];
                load_matrices(
                    b, key_tile + (n * 16 + lane / 16 * 8 + lane % 8) * STRIDE + k * 16 + lane / 8 % 2 * 8);
                mma(s[2 * n], a, b[0], b[1]);
                mma(s[2 * n + 1], a, b[2], b[3]);
            }
        }

        if (key + FLASH_KEYS > first_position + first_row / group + 1 ||
            (window && key <= end_key - 1 - window)) {
#pragma unroll
            for (int n = 0; n < FLASH_KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int k = key + n * 8 + 2 * t + i % 2;
                    if (k > position[i / 2] || (window && k <= position[i / 2] - window)) s[n][i] = -INFINITY;
                }
        }
        if (IN_TURN) {
            __syncthreads();
            value_part.load(value_tile, values, table, kv_heads, kv_head, key, length);
            __syncthreads();
        }
        float m[2] = {largest[0], largest[1]}, shrink[2], offset[2];
#pragma unroll
        for (int n = 0; n < FLASH_KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) m[i / 2] = fmaxf(m[i / 2], s[n][i]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            m[i] = fmaxf(m[i], __shfl_xor_sync(~0u, m[i], 1));
            m[i] = fmaxf(m[i], __shfl_xor_sync(~0u, m[i], 2));
            const float reference = m[i] == -INFINITY ? 0 : m[i];  // a row may see no key of the first tiles
            offset[i] = reference * scale_log2;
            shrink[i] = power_of_two((largest[i] - reference) * scale_log2);  // 1 where the largest stays
            largest[i] = m[i];
            sums[i] *= shrink[i];
        }
#pragma unroll
        for (int n = 0; n < FLASH_KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = power_of_two(s[n][i] * scale_log2 - offset[i / 2]);
                sums[i / 2] += s[n][i];
            }
#pragma unroll
        for (int n = 0; n < PART_DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) o[n][i] *= shrink[i / 2];

#pragma unroll
        for (int k = 0; k < FLASH_KEYS / 16; k++) {
            unsigned p[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                p[i] =
                    as_bits(__floats2half2_rn(s[2 * k + i / 2][i % 2 * 2], s[2 * k + i / 2][i % 2 * 2 + 1]));
#pragma unroll
            for (int n = 0; n < PART_DIM / 16; n++) {
                unsigned b[4];
                load_matrices_transposed(b, value_tile + (k * 16 + lane % 16) * STRIDE + first_dimension + n * 16 +
                                                lane / 16 * 8);
                mma(o[2 * n], p, b[0], b[1]);
                mma(o[2 * n + 1], p, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
        const int row = first_row + warp_row + g + 8 * i;
        if (row >= rows) continue;
        const int head = kv_head * group + row % group;
        if (sums[i] > 0) sums[i] += power_of_two(sink_score(sinks, head) - largest[i] * scale_log2);
        const float inverse = sums[i] > 0 ? out_factor / sums[i] : 0;
        __half* target = out + ((size_t)(start + row / group) * heads + head) * HEAD_DIM + first_dimension;
#pragma unroll
        for (int n = 0; n < PART_DIM / 8; n++)
            *reinterpret_cast<__half2*>(target + n * 8 + 2 * t) =
                __floats2half2_rn(o[n][2 * i] * inverse, o[n][2 * i + 1] * inverse);
    }
}
