// Attention of one new token per sequence over pages, split along the keys (Flash-Decoding, Dao et al. 2023).
#include "attention.cuh"

#ifndef HEAD_TILES
#define HEAD_TILES 1
#endif
constexpr int DECODE_WARPS = 4;
constexpr int SPLIT = HEAD_DIM > 256 ? 2 : 1;  // warps that share keys, each with its part of the dimensions
constexpr int PART_DIM = HEAD_DIM / SPLIT;
constexpr int KEY_WARPS = DECODE_WARPS / SPLIT;
constexpr int TILE = 16;                      // keys of one warp at a time
constexpr int DECODE_HEADS = 8 * HEAD_TILES;  // query heads of one block
constexpr int DECODE_BLOCKS = HEAD_DIM > 128 || HEAD_TILES > 1 ? 2 : 3;  // that registers are left for
constexpr int MAX_CHUNKS = 64;                // max_chunks, a constant of the layer, may be less

// A head's PART_DIM numbers as a lane holds them for the tensor cores. Which dimension is which k of a
// product does not matter as long as both operands agree, so lane t of a quad takes 8 neighbours of every 32
// (4 of a last 16).
constexpr int WIDE = PART_DIM / 32, NARROW = PART_DIM % 32 / 16;

// Heads of up to 256 dimensions have registers for keys and values that are read ahead of the predecessor.
constexpr bool AHEAD = SPLIT == 1;
template <class T> __device__ __forceinline__ T fetch(const T* p) { return AHEAD ? __ldcg(p) : *p; }

struct HeadRow {
    uint4 wide[WIDE + 1];
    uint2 narrow;

    // SHARED: the row lies in shared memory, which knows no cache operators.
    template <bool SHARED> __device__ __forceinline__ void load(const __half* row, int t) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) {
            const uint4* p = reinterpret_cast<const uint4*>(row + 32 * j + 8 * t);
            wide[j] = SHARED ? *p : fetch(p);
        }
        if (NARROW) {
            const uint2* p = reinterpret_cast<const uint2*>(row + 32 * WIDE + 4 * t);
            narrow = SHARED ? *p : fetch(p);
        }
    }
    // The two registers of k step `k` (16 dimensions each).
    __device__ __forceinline__ uint2 step(int k) const {
        if (k == 2 * WIDE) return narrow;
        return k % 2 ? make_uint2(wide[k / 2].z, wide[k / 2].w) : make_uint2(wide[k / 2].x, wide[k / 2].y);
    }
};

// Rows 2t, 2t+1, 2t+8, 2t+9 of a tile of 16 values: lane g of the eight takes W neighbouring dimensions of
// every 8 W. As operand A of value^T * probability^T, word i of the four rows becomes rows g and g+8 of a
// 16-row tile, which are the dimensions W g + 2i and W g + 2i + 1.
struct ValueTile {
    static constexpr int FULL = PART_DIM / 64, HALF = PART_DIM % 64 / 32, QUARTER = PART_DIM % 32 / 16;
    uint4 full[4][FULL + 1];
    uint2 half[4];
    unsigned quarter[4];

    __device__ __forceinline__ void load(const __half* tile, int g, int t, int valid) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int key = 2 * t + r % 2 + r / 2 * 8;
            const __half* row = tile + key * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < FULL; j++)
                full[r][j] = key < valid ? fetch(reinterpret_cast<const uint4*>(row + 64 * j + 8 * g))
                                         : make_uint4(0, 0, 0, 0);
            if (HALF)
                half[r] =
                    key < valid ? fetch(reinterpret_cast<const uint2*>(row + 64 * FULL + 4 * g)) : make_uint2(0, 0);
            if (QUARTER)
                quarter[r] =
                    key < valid ? fetch(reinterpret_cast<const unsigned*>(row + PART_DIM - 16 + 2 * g)) : 0;
        }
    }
    // Word of row r for tile m of 16 dimensions.
    __device__ __forceinline__ unsigned word(int r, int m) const {
        if (m < 4 * FULL) {
            const uint4& v = full[r][m / 4];
            return m % 4 == 0 ? v.x : m % 4 == 1 ? v.y : m % 4 == 2 ? v.z : v.w;
        }
        if (HALF && m < 4 * FULL + 2) return m == 4 * FULL ? half[r].x : half[r].y;
        return quarter[r];
    }
    // The first of the two dimensions of tile m that this lane holds.
    __device__ __forceinline__ static int dimension(int m, int g) {
        if (m < 4 * FULL) return m / 4 * 64 + 8 * g + m % 4 * 2;
        if (HALF && m < 4 * FULL + 2) return 64 * FULL + 4 * g + (m - 4 * FULL) * 2;
        return PART_DIM - 16 + 2 * g;
    }
};

__device__ __forceinline__ unsigned transpose8x8(unsigned x) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// grid (kv_heads * row_tiles, S, chunks), block 128. A sequence's visible pages are cut into at most
// max_chunks chunks by its own length alone; blocks beyond them end at once, so the grid holds for every
// length that the page table allows. The block of the last chunk writes the new key and value first; the
// block that finishes last adds up the chunks, in their order. partial [S, gridDim.x, gridDim.z, heads of a
// block, HEAD_DIM] and statistics (the same without HEAD_DIM) are room; `tickets` [S, gridDim.x] is zero
// before and after. Keys are tiled as rows (S^T = K q^T), so up to eight query heads cost one pass of the
// tensor cores. Sequences with several new tokens are attention_prefill's.
//
// Launched dependently, it reads lengths, pages and remembered keys and values before it waits. That is safe
// because no kernel that writes them lets its dependents start early, except this one, and a step's last
// kernel (advance) and first (embed) are never launched dependently. They are read past L1 (__ldcg), which a
// kernel that starts early may find as the step before left it.
extern "C" __global__ void __launch_bounds__(32 * DECODE_WARPS, DECODE_BLOCKS)
    attention_decode(const __half* __restrict__ qkv, __half* keys, __half* values,
                     const int* __restrict__ starts, const int* __restrict__ lengths,
                     const int* __restrict__ pages, int table_width, int heads, int kv_heads,
                     int others, const float* q_norm, float q_eps, const float* k_norm, float k_eps,
                     const float* v_norm, float v_eps, const float2* rope, float value_scale, float scale_log2,
                     int window, const float* __restrict__ sinks, int max_chunks, float* partial,
                     float2* statistics, int* tickets, __half* __restrict__ out) {
    union Shared {
        __half q[DECODE_HEADS][HEAD_DIM + 8];
        float o[KEY_WARPS][DECODE_HEADS][HEAD_DIM];
        float weights[DECODE_HEADS][MAX_CHUNKS];
    };
    __shared__ __align__(16) Shared shared;
    __shared__ float2 shared_statistics[KEY_WARPS][DECODE_HEADS];  // (largest score, sum)
    __shared__ float4 shared_scores[SPLIT > 1 ? 2 : 1][DECODE_WARPS][32];  // of each part, for its other warp
    __shared__ float shared_sinks[DECODE_HEADS];
    __shared__ int last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int key_warp = warp / SPLIT, first_dimension = warp % SPLIT * PART_DIM;
    const int group = heads / kv_heads, row_tiles = gridDim.x / kv_heads;
    const int kv_head = blockIdx.x / row_tiles, first_head = blockIdx.x % row_tiles * DECODE_HEADS;
    const int my_heads = min(group - first_head, DECODE_HEADS);
    const int sequence = blockIdx.y, chunk = blockIdx.z;
    dependents_may_start();
    if (!AHEAD) wait_for_predecessor();

    const int token = fetch(starts + sequence), length = fetch(lengths + sequence);
    const bool mine = fetch(starts + sequence + 1) - token == 1;
    const int lowest = window ? max(0, length - window) : 0;
    const int first_page = lowest / PAGE, visible_pages = (length + PAGE - 1) / PAGE - first_page;
    int chunk_pages = 2;
    while (chunk_pages * max_chunks < visible_pages) chunk_pages *= 2;
    const int chunks = max(1, (visible_pages + chunk_pages - 1) / chunk_pages);
    if (!mine || chunk >= chunks) {
        wait_for_predecessor();
        return;
    }
    __half* target = out + ((size_t)token * heads + kv_head * group + first_head) * HEAD_DIM;
    if (length <= 0) {  // a padded row without a context
        wait_for_predecessor();
        for (int i = threadIdx.x; i < my_heads * HEAD_DIM; i += 32 * DECODE_WARPS)
            target[i] = __float2half(0);
        return;
    }
    const int* table = pages + (size_t)sequence * table_width;
    const int begin = max(lowest, (first_page + chunk * chunk_pages) * PAGE) / TILE * TILE;
    const int end = min(length, (first_page + (chunk + 1) * chunk_pages) * PAGE);

    HeadRow k[2];
    ValueTile v;
    int key = begin + key_warp * TILE;
    auto load_keys = [&](int from) {
        const __half* tile =
            keys + head_in_page(fetch(table + from / PAGE), kv_heads, kv_head, from % PAGE) + first_dimension;
        k[0].load<false>(tile + g * HEAD_DIM, t);
        k[1].load<false>(tile + (g + 8) * HEAD_DIM, t);
    };
    auto load_values = [&](int from) {
        v.load(values + head_in_page(fetch(table + from / PAGE), kv_heads, kv_head, from % PAGE) + first_dimension, g, t,
               end - from);
    };
    const bool early = key + TILE < length;  // the new token is not in this warp's first tile
    if (early && key < end) load_keys(key), load_values(key);

    wait_for_predecessor();
    const __half* row = qkv + (size_t)token * (heads + others) * HEAD_DIM;
    for (int i = warp; i < DECODE_HEADS; i += DECODE_WARPS) {
        if (i < my_heads)
            open_head(row + (kv_head * group + first_head + i) * HEAD_DIM, shared.q[i], q_norm, q_eps,
                      rope, length - 1, value_scale);
        else
            for (int j = lane; j < HALF_DIM; j += 32) reinterpret_cast<unsigned*>(shared.q[i])[j] = 0;
    }
    if (threadIdx.x < my_heads)
        shared_sinks[threadIdx.x] = sink_score(sinks, kv_head * group + first_head + threadIdx.x);
    if (chunk == chunks - 1 && others) {
        const size_t place = head_in_page(table[(length - 1) / PAGE], kv_heads, kv_head, (length - 1) % PAGE);
        if (warp == DECODE_WARPS - 1)
            open_head(row + (heads + kv_head) * HEAD_DIM, keys + place, k_norm, k_eps, rope, length - 1,
                      value_scale);
        if (warp == DECODE_WARPS - 2)
            write_value(row + (heads + others - kv_heads + kv_head) * HEAD_DIM, values + place, v_norm, v_eps,
                        value_scale);
    }
    __syncthreads();
    if (!early && key < end) load_keys(key), load_values(key);
    HeadRow q[HEAD_TILES];
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) q[n].load<true>(shared.q[8 * n + g] + first_dimension, t);

    float o[HEAD_TILES][PART_DIM / 16][4];
    float largest[HEAD_TILES][2], sums[HEAD_TILES][2];  // of heads 2t and 2t+1
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
        for (int m = 0; m < PART_DIM / 16; m++) o[n][m][0] = o[n][m][1] = o[n][m][2] = o[n][m][3] = 0;
        largest[n][0] = largest[n][1] = -INFINITY;
        sums[n][0] = sums[n][1] = 0;
    }
    for (int turn = 0; key < end; key += KEY_WARPS * TILE, turn ^= 1) {
        const int next = key + KEY_WARPS * TILE;
        float s[HEAD_TILES][4];
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
        for (int d = 0; d < PART_DIM / 16; d++) {
            const uint2 upper = k[0].step(d), lower = k[1].step(d);
            const unsigned a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) mma(s[n], a, q[n].step(d).x, q[n].step(d).y);
        }
        if (next < end) load_keys(next);
        if (SPLIT > 1) {  // two sets of room: a warp writes one again only after its other warp has read it
            shared_scores[turn][warp][lane] = make_float4(s[0][0], s[0][1], s[0][2], s[0][3]);
            barrier_wait(1 + key_warp, 32 * SPLIT);
            const float4 other = shared_scores[turn][warp ^ 1][lane];
            s[0][0] += other.x, s[0][1] += other.y, s[0][2] += other.z, s[0][3] += other.w;
        }

        unsigned p[HEAD_TILES][2];
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
            float shrink[2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int position = key + g + i / 2 * 8;
                s[n][i] = position < end && position >= lowest ? s[n][i] * scale_log2 : -INFINITY;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float m = fmaxf(s[n][i], s[n][i + 2]);
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, offset));
                m = fmaxf(m, largest[n][i]);  // finite: every tile has a visible key
                shrink[i] = power_of_two(largest[n][i] - m);
                largest[n][i] = m;
                s[n][i] = power_of_two(s[n][i] - m);
                s[n][i + 2] = power_of_two(s[n][i + 2] - m);
                sums[n][i] = sums[n][i] * shrink[i] + (s[n][i] + s[n][i + 2]);
            }
            p[n][0] = transpose8x8(as_bits(__floats2half2_rn(s[n][0], s[n][1])));
            p[n][1] = transpose8x8(as_bits(__floats2half2_rn(s[n][2], s[n][3])));
#pragma unroll
            for (int m = 0; m < PART_DIM / 16; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][m][i] *= shrink[i % 2];
        }
#pragma unroll
        for (int m = 0; m < PART_DIM / 16; m++) {
            const unsigned a[4] = {__byte_perm(v.word(0, m), v.word(1, m), 0x5410),
                                   __byte_perm(v.word(0, m), v.word(1, m), 0x7632),
                                   __byte_perm(v.word(2, m), v.word(3, m), 0x5410),
                                   __byte_perm(v.word(2, m), v.word(3, m), 0x7632)};
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) mma(o[n][m], a, p[n][0], p[n][1]);
        }
        if (next < end) load_values(next);
    }

    // The warps' shares of the chunk, added in their order.
    __syncthreads();  // shared.q is read no more
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = 8 * n + 2 * t + i;
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2)
                sums[n][i] += __shfl_xor_sync(~0u, sums[n][i], offset);
            if (g == 0 && first_dimension == 0)
                shared_statistics[key_warp][head] = make_float2(largest[n][i], sums[n][i]);
#pragma unroll
            for (int m = 0; m < PART_DIM / 16; m++)
                *reinterpret_cast<float2*>(&shared.o[key_warp][head][first_dimension + ValueTile::dimension(m, g)]) =
                    make_float2(o[n][m][i], o[n][m][i + 2]);
        }
    }
    __syncthreads();
    constexpr int PIECES = HEAD_DIM / 4;
    const int slots = min(group, DECODE_HEADS);  // room for heads in `partial`
    const size_t place = ((size_t)sequence * gridDim.x + blockIdx.x) * gridDim.z;  // of chunk 0
    for (int i = threadIdx.x; i < my_heads * PIECES; i += 32 * DECODE_WARPS) {
        const int head = i / PIECES, dimension = i % PIECES * 4;
        float m = -INFINITY, total = 0;
#pragma unroll
        for (int w = 0; w < KEY_WARPS; w++) m = fmaxf(m, shared_statistics[w][head].x);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < KEY_WARPS; w++) {
            const float weight = power_of_two(shared_statistics[w][head].x - m);
            const float4 part = *reinterpret_cast<const float4*>(&shared.o[w][head][dimension]);
            total += weight * shared_statistics[w][head].y;
            sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z,
                sum.w += weight * part.w;
        }
        if (chunks == 1) {
            const float inverse = 1 / (total + power_of_two(shared_sinks[head] - m));
            __half2* to = reinterpret_cast<__half2*>(target + head * HEAD_DIM + dimension);
            to[0] = __floats2half2_rn(sum.x * inverse, sum.y * inverse);
            to[1] = __floats2half2_rn(sum.z * inverse, sum.w * inverse);
        } else {
            const size_t slot = (place + chunk) * slots + head;
            *reinterpret_cast<float4*>(partial + slot * HEAD_DIM + dimension) = sum;
            if (dimension == 0) statistics[slot] = make_float2(m, total);
        }
    }
    if (chunks == 1) return;

    // The last block to arrive adds the chunks.
    int* ticket = tickets + sequence * gridDim.x + blockIdx.x;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(ticket, 1) == chunks - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    for (int head = warp; head < my_heads; head += DECODE_WARPS) {
        float2 part[MAX_CHUNKS / 32];
        float m = -INFINITY, total = 0;
#pragma unroll
        for (int i = 0; i < MAX_CHUNKS / 32; i++) {
            const int c = lane + 32 * i;
            part[i] =
                c < chunks ? __ldcg(&statistics[(place + c) * slots + head]) : make_float2(-INFINITY, 0);
            m = fmaxf(m, part[i].x);
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, offset));
#pragma unroll
        for (int i = 0; i < MAX_CHUNKS / 32; i++) total += part[i].y * power_of_two(part[i].x - m);
#pragma unroll
        for (int offset = 16; offset; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
        total += power_of_two(shared_sinks[head] - m);
#pragma unroll
        for (int i = 0; i < MAX_CHUNKS / 32; i++)
            shared.weights[head][lane + 32 * i] = power_of_two(part[i].x - m) / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < my_heads * PIECES; i += 32 * DECODE_WARPS) {
        const int head = i / PIECES, dimension = i % PIECES * 4;
        const float* parts = partial + (place * slots + head) * HEAD_DIM + dimension;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 16
        for (int c = 0; c < chunks; c++) {
            const float weight = shared.weights[head][c];
            const float4 part = __ldcg(reinterpret_cast<const float4*>(parts + (size_t)c * slots * HEAD_DIM));
            sum.x += weight * part.x, sum.y += weight * part.y, sum.z += weight * part.z,
                sum.w += weight * part.w;
        }
        __half2* to = reinterpret_cast<__half2*>(target + head * HEAD_DIM + dimension);
        to[0] = __floats2half2_rn(sum.x, sum.y);
        to[1] = __floats2half2_rn(sum.z, sum.w);
    }
    if (threadIdx.x == 0) *ticket = 0;
}
