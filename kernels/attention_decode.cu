// Attention of one new token per sequence over pages, split along the keys (Flash-Decoding, Dao et al. 2023).
#include "attention.cuh"
#include "order.cuh"

#ifndef HEAD_TILES
#define HEAD_TILES 1
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef BLOCKS
#define BLOCKS 3
#endif
constexpr int DECODE_WARPS = 4;
constexpr int THREADS = 32 * DECODE_WARPS;
constexpr int SPLIT = HEAD_DIM > 256 ? 2 : 1;  // warps that share keys, each with its part of the dimensions
constexpr int PART_DIM = HEAD_DIM / SPLIT;
constexpr int KEY_WARPS = DECODE_WARPS / SPLIT;
constexpr int TILE = 16;                      // keys of one warp at a time
constexpr int DECODE_HEADS = 8 * HEAD_TILES;  // query heads of one block
constexpr int DECODE_BLOCKS = HEAD_DIM > 128 || HEAD_TILES > 1 ? 2 : BLOCKS;  // of an SM that registers are left for
constexpr int LATER_TILES = 3;  // of a warp that are brought to L2 before the predecessor has ended
constexpr int WARP_HEADS = DECODE_HEADS / DECODE_WARPS;  // that one warp opens
constexpr int MAX_CHUNKS = 64;  // of one sequence
constexpr float LOWEST = -1e30f;  // below every score; the largest of no scores

// A head's PART_DIM numbers as a lane holds them for the tensor cores. Which dimension is which k of a
// product does not matter as long as both operands agree, so lane t of a quad takes 8 neighbours of every 32
// (4 of a last 16).
constexpr int WIDE = PART_DIM / 32, NARROW = PART_DIM % 32 / 16;

// Heads of up to 256 dimensions have registers for keys and values that are read ahead of the predecessor, those of up
// to 128 for what opens them, too.
constexpr bool AHEAD = SPLIT == 1, PREPARED = HEAD_DIM <= 128;
template <class T> __device__ __forceinline__ T fetch(const T* p) { return AHEAD ? __ldcg(p) : *p; }

// 8, 4 and 2 numbers.
#if KV_FP8
using Eight = uint2;
using Four = unsigned;
using Two = unsigned short;
#else
using Eight = uint4;
using Four = uint2;
using Two = unsigned;
#endif

// Two k steps of a row of queries as operand B, read where they are used: registers are for keys and values to come.
__device__ __forceinline__ uint4 query_steps(const __half* row, int pair, int t) {
    uint4 q;
    if (pair < WIDE)
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w)
            : "r"((unsigned)__cvta_generic_to_shared(row + 32 * pair + 8 * t)));
    else
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(q.x), "=r"(q.y)
            : "r"((unsigned)__cvta_generic_to_shared(row + 32 * pair + 4 * t)));
    if (!KV_FP8) return q;
    return make_uint4(__byte_perm(q.x, q.y, 0x5410), __byte_perm(q.x, q.y, 0x7632),
                      __byte_perm(q.z, q.w, 0x5410), __byte_perm(q.z, q.w, 0x7632));
}

// A row of keys as half of operand A.
struct KeyRow {
    Eight wide[WIDE + 1];
    Four narrow;

    __device__ __forceinline__ void load(const Kv* row, int t) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) wide[j] = fetch(reinterpret_cast<const Eight*>(row + 32 * j + 8 * t));
        if (NARROW) narrow = fetch(reinterpret_cast<const Four*>(row + 32 * WIDE + 4 * t));
    }
    __device__ __forceinline__ void load_shared(const Kv* row, int t) {
#pragma unroll
        for (int j = 0; j < WIDE; j++) wide[j] = *reinterpret_cast<const Eight*>(row + 32 * j + 8 * t);
        if (NARROW) narrow = *reinterpret_cast<const Four*>(row + 32 * WIDE + 4 * t);
    }
    __device__ __forceinline__ uint2 step(int k) const {
#if KV_FP8
        uint2 pair;
        from_e4m3(k == 2 * WIDE ? narrow : k % 2 ? wide[k / 2].y : wide[k / 2].x, pair.x, pair.y);
        return pair;
#else
        if (k == 2 * WIDE) return narrow;
        return k % 2 ? make_uint2(wide[k / 2].z, wide[k / 2].w) : make_uint2(wide[k / 2].x, wide[k / 2].y);
#endif
    }
};

// Rows 2t, 2t+1, 2t+8, 2t+9 of a tile of 16 values: lane g of the eight takes W neighbouring dimensions of
// every 8 W. As operand A of value^T * probability^T, pair i of the four rows becomes rows g and g+8 of a
// 16-row tile, which are the dimensions W g + 2i and W g + 2i + 1.
struct ValueTile {
    static constexpr int FULL = PART_DIM / 64, HALF = PART_DIM % 64 / 32, QUARTER = PART_DIM % 32 / 16;
    Eight full[4][FULL + 1];
    Four half[4];
    Two quarter[4];

    static __device__ __forceinline__ int key(int r, int t) { return 2 * t + r % 2 + r / 2 * 8; }

    // Rows from `valid` on are zero.
    __device__ __forceinline__ void load(const Kv* tile, int g, int t, int valid) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const Kv* row = tile + key(r, t) * HEAD_DIM;
            const bool there = key(r, t) < valid;
#pragma unroll
            for (int j = 0; j < FULL; j++)
                full[r][j] = there ? fetch(reinterpret_cast<const Eight*>(row + 64 * j + 8 * g)) : Eight{};
            if (HALF) half[r] = there ? fetch(reinterpret_cast<const Four*>(row + 64 * FULL + 4 * g)) : Four{};
            if (QUARTER) quarter[r] = there ? fetch(reinterpret_cast<const Two*>(row + PART_DIM - 16 + 2 * g)) : Two{};
        }
    }
    __device__ __forceinline__ void load_shared(int r, const Kv* row, int g) {
#pragma unroll
        for (int j = 0; j < FULL; j++) full[r][j] = *reinterpret_cast<const Eight*>(row + 64 * j + 8 * g);
        if (HALF) half[r] = *reinterpret_cast<const Four*>(row + 64 * FULL + 4 * g);
        if (QUARTER) quarter[r] = *reinterpret_cast<const Two*>(row + PART_DIM - 16 + 2 * g);
    }
    // Rows r and r+1 of tile m of 16 dimensions: the first of a lane's two dimensions, and the second.
    __device__ __forceinline__ uint2 operand(int r, int m) const {
#if KV_FP8
        unsigned codes, first, second;
        if (m < 4 * FULL)
            codes = m % 4 < 2 ? interleave(full[r][m / 4].x, full[r + 1][m / 4].x, m % 2)
                              : interleave(full[r][m / 4].y, full[r + 1][m / 4].y, m % 2);
        else if (HALF && m < 4 * FULL + 2) codes = interleave(half[r], half[r + 1], m % 2);
        else codes = interleave(quarter[r], quarter[r + 1], 0);
        from_e4m3(codes, first, second);
        return make_uint2(first, second);
#else
        const unsigned a = word(r, m), b = word(r + 1, m);
        return make_uint2(interleave(a, b, 0), interleave(a, b, 1));
#endif
    }
    // The lower 16 bits of both, or the upper.
    static __device__ __forceinline__ unsigned interleave(unsigned a, unsigned b, int upper) {
        return __byte_perm(a, b, upper ? 0x7632 : 0x5410);
    }
#if !KV_FP8
    __device__ __forceinline__ unsigned word(int r, int m) const {
        if (m < 4 * FULL) {
            const uint4& v = full[r][m / 4];
            return m % 4 == 0 ? v.x : m % 4 == 1 ? v.y : m % 4 == 2 ? v.z : v.w;
        }
        if (HALF && m < 4 * FULL + 2) return m == 4 * FULL ? half[r].x : half[r].y;
        return quarter[r];
    }
#endif
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

// Thread block clusters (sm_90): blocks store to each other's shared memory, and each has a barrier that counts the
// bytes that came. So nothing waits for memory at large, as a cluster's own barriers would.
#if CLUSTER > 1
__device__ __forceinline__ void inbox_open(unsigned long long* barrier) {  // by all threads
    if (threadIdx.x == 0)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;"
            :: "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void inbox_expect(unsigned long long* barrier, int bytes) {  // by one thread
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"((unsigned)__cvta_generic_to_shared(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void inboxes_wait_open() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ unsigned in_block(const void* p, int rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
    return address;
}
__device__ __forceinline__ void inbox_store(const float4* to, unsigned long long* barrier, int rank, float4 x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        :: "r"(in_block(to, rank)), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(in_block(barrier, rank)) : "memory");
}
__device__ __forceinline__ void inbox_store(const float2* to, unsigned long long* barrier, int rank, float2 x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
        :: "r"(in_block(to, rank)), "f"(x.x), "f"(x.y), "r"(in_block(barrier, rank)) : "memory");
}
__device__ __forceinline__ void inbox_wait(unsigned long long* barrier) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n\t@!done bra again;\n\t}"
        :: "r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
}
#endif

// Counts one up and says what was there; orders what this block wrote before, and what it reads after.
__device__ __forceinline__ int take_ticket(int* p) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(p) : "memory");
    return before;
}

// What several warps or chunks know of one head, added in their order: for each its largest score, its sum of powers,
// and four of its weighted values. `largest` is that of all.
struct Merged {
    float4 values = make_float4(0, 0, 0, 0);
    float total = 0;

    __device__ __forceinline__ void add(float weight, float sum, const float4& x) {
        total = fmaf(weight, sum, total);
        values.x = fmaf(weight, x.x, values.x), values.y = fmaf(weight, x.y, values.y);
        values.z = fmaf(weight, x.z, values.z), values.w = fmaf(weight, x.w, values.w);
    }
    // As the output has them; `sink` is a score without a value.
    __device__ __forceinline__ uint2 halves(float largest, float sink, float factor) const {
        const float inverse = factor / (total + power_of_two(sink - largest));
        return make_uint2(as_bits(__floats2half2_rn(values.x * inverse, values.y * inverse)),
                          as_bits(__floats2half2_rn(values.z * inverse, values.w * inverse)));
    }
};

// grid (kv_heads * row_tiles, S, chunks), block THREADS, clusters of CLUSTER chunks. A sequence's visible pages are
// cut into chunks by its own length alone: over `spread` of them while that is at most short_pages for each, then into
// more, at most max_chunks. Blocks beyond them end at once, so the grid holds for every length that the page table
// allows. The block of the last chunk writes the new key and value. Where one cluster has all chunks, its blocks bring
// their shares to each other's shared memory, and each adds up a slice of the numbers; else through `partial`
// [S, gridDim.x, gridDim.z, heads of a block, HEAD_DIM] and statistics (the same without HEAD_DIM), and the block that
// finishes last adds them. Both add alike, so clusters change no result; `tickets` [S, gridDim.x] is zero before and
// after. Keys are tiled as rows (S^T = K q^T), so up to eight query heads cost one pass of the tensor cores. Sequences
// with several new tokens are attention_prefill's.
//
// ordered: 0, or twice the padded tokens of order.cuh, plus one if interleaved: how the output lies.
//
// What pages hold times a power of two and the layer's scale is the key or value: key_factor and value_factor turn what
// came into what is stored, scale_log2 has the keys' way back, and out_factor the values'.
//
// Launched dependently, it reads lengths, pages and remembered keys and values before it waits. That is safe
// because no kernel that writes them lets its dependents start early, except this one, and a step's last
// kernel (advance) and first (embed) are never launched dependently. They are read past L1 (__ldcg), which a
// kernel that starts early may find as the step before left it.
extern "C" __global__ void
#if CLUSTER > 1
    __cluster_dims__(1, 1, CLUSTER)
#endif
    __launch_bounds__(THREADS, DECODE_BLOCKS)
    attention_decode(const __half* __restrict__ qkv, Kv* keys, Kv* values,
                     const int* __restrict__ starts, const int* __restrict__ lengths,
                     const int* __restrict__ pages, int table_width, int heads, int kv_heads,
                     int others, const float* q_norm, float q_eps, const float* k_norm, float k_eps,
                     const float* v_norm, float v_eps, const float2* rope, float value_scale, float scale_log2,
                     int window, const float* __restrict__ sinks, float key_factor, float value_factor,
                     float out_factor, int spread, int short_pages, int max_chunks, float* partial,
                     float2* statistics, int* tickets, int ordered, __half* __restrict__ out) {
    constexpr int PIECES = HEAD_DIM / 4;
    union Shared {
        float o[KEY_WARPS][DECODE_HEADS][HEAD_DIM];
        float2 weights[DECODE_HEADS][MAX_CHUNKS];
    };
    __shared__ __align__(16) Shared shared;
    __shared__ __align__(16) __half shared_q[DECODE_HEADS][HEAD_DIM + 8];
    __shared__ __align__(16) Kv newest[2][HEAD_DIM];                       // the new key and value
#if CLUSTER > 1
    __shared__ __align__(16) float4 inbox[DECODE_HEADS * PIECES + CLUSTER];  // this block's slice of each block's share
    __shared__ float2 inbox_statistics[CLUSTER][DECODE_HEADS];
    __shared__ unsigned long long inbox_barrier;
#endif
    __shared__ float2 shared_statistics[KEY_WARPS][DECODE_HEADS];  // (largest score, sum)
    __shared__ float4 shared_scores[SPLIT > 1 ? 2 : 1][DECODE_WARPS][32];  // of each part, for its other warp
    __shared__ float shared_sinks[DECODE_HEADS];
    __shared__ int last, shared_token;  // what follows the keys reads the token there: it would take a register
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int key_warp = warp / SPLIT, first_dimension = warp % SPLIT * PART_DIM;
    const int group = heads / kv_heads, row_tiles = gridDim.x / kv_heads;
    const int kv_head = blockIdx.x / row_tiles, first_head = blockIdx.x % row_tiles * DECODE_HEADS;
    const int my_heads = min(group - first_head, DECODE_HEADS);
    const int sequence = blockIdx.y, chunk = blockIdx.z;
    dependents_may_start();
#if CLUSTER > 1
    inbox_open(&inbox_barrier);
#endif
    if (!AHEAD) wait_for_predecessor();

    const int token = fetch(starts + sequence), length = fetch(lengths + sequence);
    const bool mine = fetch(starts + sequence + 1) - token == 1;
    const int lowest = window ? max(0, length - window) : 0;
    const int first_page = lowest / PAGE, visible_pages = (length + PAGE - 1) / PAGE - first_page;
    const int chunk_pages = max(1, max(min(short_pages, (visible_pages + spread - 1) / spread),
                                       (visible_pages + max_chunks - 1) / max_chunks));
    const int chunks = max(1, (visible_pages + chunk_pages - 1) / chunk_pages);
    if (!mine || chunk >= chunks) {
        wait_for_predecessor();
        return;
    }
    auto put = [&](int token, int head, int dimension, uint2 four) {
        // From the block's number, read anew: kept from above, this would take registers all along.
        int block;
        asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
        const int column = (block / row_tiles * group + block % row_tiles * DECODE_HEADS + head) * HEAD_DIM + dimension;
        if (ordered) {
            unsigned* const words = reinterpret_cast<unsigned*>(out);
            words[ordered_word(column, token, ordered / 2, ordered % 2, token % 8)] = four.x;
            words[ordered_word(column + 2, token, ordered / 2, ordered % 2, token % 8)] = four.y;
        } else *reinterpret_cast<uint2*>(out + (size_t)token * heads * HEAD_DIM + column) = four;
    };
    if (length <= 0) {  // a padded row without a context
        wait_for_predecessor();
        for (int i = threadIdx.x; i < my_heads * PIECES; i += THREADS)
            put(token, i / PIECES, i % PIECES * 4, make_uint2(0, 0));
        return;
    }
    const int* table = pages + (size_t)sequence * table_width;
    const int begin = max(lowest, (first_page + chunk * chunk_pages) * PAGE) / TILE * TILE;
    const int end = min(length, (first_page + (chunk + 1) * chunk_pages) * PAGE);

    KeyRow k[2];
    ValueTile v;
    int key = begin + key_warp * TILE;
    auto place_of = [&](int from) {
        return head_in_page(fetch(table + from / PAGE), kv_heads, kv_head, from % PAGE) + first_dimension;
    };
    auto load_keys = [&](size_t place) {
        k[0].load(keys + place + g * HEAD_DIM, t);
        k[1].load(keys + place + (g + 8) * HEAD_DIM, t);
    };
    if (AHEAD && key < end) {
        const size_t place = place_of(key);
        load_keys(place);
        v.load(values + place, g, t, min(end, length - 1) - key);  // the new token's row comes later
    }
    // The last warps open the new key and value, beside their queries.
    const bool opens_value = warp == DECODE_WARPS - 2, opens_newest = chunk == chunks - 1 && warp >= DECODE_WARPS - 2;
    const float* newest_norm = opens_value ? v_norm : k_norm;
    if (opens_newest && newest_norm && 32 * lane < HEAD_DIM) prefetch(newest_norm + 32 * lane);
    Opening opening;
    if (PREPARED) opening.load(q_norm, rope, length - 1);
#pragma unroll(PREPARED ? LATER_TILES : 1)
    for (int turn = 1; AHEAD && turn <= LATER_TILES; turn++) {
        const int later = key + turn * KEY_WARPS * TILE;
        if (later < end) {
            const size_t place = place_of(later);
            for (int i = lane * 128; i < TILE * HEAD_DIM * (int)sizeof(Kv); i += 32 * 128) {
                prefetch(reinterpret_cast<const char*>(keys + place) + i);
                prefetch(reinterpret_cast<const char*>(values + place) + i);
            }
        }
    }
    if (threadIdx.x == 0) shared_token = token;
    if (threadIdx.x < my_heads)
        shared_sinks[threadIdx.x] = sink_score(sinks, kv_head * group + first_head + threadIdx.x);

    if (AHEAD) wait_for_predecessor();
    if (!PREPARED) opening.load(q_norm, rope, length - 1);
    const __half* row = qkv + (size_t)token * (heads + others) * HEAD_DIM;
    Head head[WARP_HEADS], newest_head;
#pragma unroll
    for (int i = 0; i < WARP_HEADS; i++)
        if (warp + i * DECODE_WARPS < my_heads)
            head[i].load_half(row + (kv_head * group + first_head + warp + i * DECODE_WARPS) * HEAD_DIM);
    auto load_newest = [&] {
        newest_head.load_half(row + (heads + (opens_value ? others - kv_heads : 0) + kv_head) * HEAD_DIM);
    };
    if (PREPARED && opens_newest && others) load_newest();
#pragma unroll
    for (int i = 0; i < WARP_HEADS; i++) {
        __half* to = shared_q[warp + i * DECODE_WARPS];
        if (warp + i * DECODE_WARPS < my_heads) {
            opening.open(head[i], q_eps, value_scale);
            head[i].store(to, 1.0f);
        } else {
            for (int j = lane; j < HALF_DIM; j += 32) reinterpret_cast<unsigned*>(to)[j] = 0;
        }
    }
    if (opens_newest) {
        const int page = fetch(table + (length - 1) / PAGE);
        const size_t place = head_in_page(page, kv_heads, kv_head, (length - 1) % PAGE);
        Kv* store = (opens_value ? values : keys) + place;
        if (others) {
            if (!PREPARED) load_newest();
            if (newest_norm) {
                Head weight;
                weight.load(reinterpret_cast<const float2*>(newest_norm));
                newest_head.norm(weight, opens_value ? v_eps : k_eps, value_scale);
            }
            if (rope && !opens_value) newest_head.rotate(opening.rotation);
            newest_head.store(newest[opens_value], opens_value ? value_factor : key_factor);
            newest_head.store(store, opens_value ? value_factor : key_factor);
        } else {
            for (int i = lane; i < HEAD_DIM * (int)sizeof(Kv) / 16; i += 32)
                reinterpret_cast<uint4*>(newest[opens_value])[i] = __ldcg(reinterpret_cast<const uint4*>(store) + i);
        }
    }
    __syncthreads();
    if (AHEAD) {
        const int new_row = length - 1 - key;
        if (key < end && new_row < TILE) {
            if (new_row == g) k[0].load_shared(newest[0] + first_dimension, t);
            if (new_row == g + 8) k[1].load_shared(newest[0] + first_dimension, t);
#pragma unroll
            for (int r = 0; r < 4; r++)
                if (new_row == ValueTile::key(r, t)) v.load_shared(r, newest[1] + first_dimension, g);
        }
    } else if (key < end) {
        const size_t place = place_of(key);
        load_keys(place);
        v.load(values + place, g, t, end - key);
    }

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
        float s[HEAD_TILES][4] = {};
#pragma unroll
        for (int d = 0; d < PART_DIM / 16; d += 2) {
            const uint2 upper = k[0].step(d), lower = k[1].step(d);
            const unsigned a[4] = {upper.x, lower.x, upper.y, lower.y};
            const uint2 upper2 = k[0].step(d + 1), lower2 = k[1].step(d + 1);
            const unsigned a2[4] = {upper2.x, lower2.x, upper2.y, lower2.y};
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                const uint4 q = query_steps(shared_q[8 * n + g] + first_dimension, d / 2, t);
                mma(s[n], a, q.x, q.y);
                if (d + 1 < PART_DIM / 16) mma(s[n], a2, q.z, q.w);
            }
        }
        if (next < end) load_keys(place_of(next));
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
            const uint2 low = v.operand(0, m), high = v.operand(2, m);
            const unsigned a[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) mma(o[n][m], a, p[n][0], p[n][1]);
        }
        if (next < end) v.load(values + place_of(next), g, t, end - next);
    }

    // The warps' shares of the chunk, added in their order.
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
    // A piece is four dimensions of a head.
    const int pieces = my_heads * PIECES, slots = min(group, DECODE_HEADS);  // room for heads in `partial`
    const size_t room = ((size_t)sequence * gridDim.x + blockIdx.x) * gridDim.z;  // of chunk 0
    const bool exchange = CLUSTER > 1 && chunks <= CLUSTER;
    const int slice = (pieces + chunks - 1) / chunks;  // pieces of one block of the cluster
    const int first_piece = chunk * slice, end_piece = min(first_piece + slice, pieces);
#if CLUSTER > 1
    if (exchange && chunks > 1) {
        if (threadIdx.x == 0) {
            const int slice_heads = (end_piece - 1) / PIECES - first_piece / PIECES + 1;
            const int bytes = (end_piece - first_piece) * sizeof(float4) + slice_heads * sizeof(float2);
            inbox_expect(&inbox_barrier, first_piece < pieces ? chunks * bytes : 0);
        }
        inboxes_wait_open();
    }
#endif
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
        const int head = i / PIECES, dimension = i % PIECES * 4;
        float m = LOWEST;
#pragma unroll
        for (int w = 0; w < KEY_WARPS; w++) m = fmaxf(m, shared_statistics[w][head].x);
        Merged sum;
#pragma unroll
        for (int w = 0; w < KEY_WARPS; w++) {
            const float2 share = shared_statistics[w][head];
            const float4* o = reinterpret_cast<const float4*>(&shared.o[w][head][dimension]);
            sum.add(power_of_two(share.x - m), share.y, *o);
        }
        if (chunks == 1) {
            put(shared_token, head, dimension, sum.halves(m, shared_sinks[head], out_factor));
#if CLUSTER > 1
        } else if (exchange) {
            const int owner = i / slice, at = i % slice;
            inbox_store(&inbox[first_piece + at], &inbox_barrier, owner, sum.values);
            if (at == 0 || dimension == 0)
                inbox_store(&inbox_statistics[chunk][head], &inbox_barrier, owner, make_float2(m, sum.total));
#endif
        } else {
            const size_t slot = (room + chunk) * slots + head;
            *reinterpret_cast<float4*>(partial + slot * HEAD_DIM + dimension) = sum.values;
            if (dimension == 0) statistics[slot] = make_float2(m, sum.total);
        }
    }
    if (chunks == 1) return;
#if CLUSTER > 1
    if (exchange) {
        inbox_wait(&inbox_barrier);
        for (int i = first_piece + threadIdx.x; i < end_piece; i += THREADS) {
            const int head = i / PIECES, dimension = i % PIECES * 4;
            float m = LOWEST;
#pragma unroll
            for (int c = 0; c < CLUSTER; c++)
                if (c < chunks) m = fmaxf(m, inbox_statistics[c][head].x);
            Merged sum;
#pragma unroll
            for (int c = 0; c < CLUSTER; c++) {
                if (c >= chunks) break;
                const float2 share = inbox_statistics[c][head];
                sum.add(power_of_two(share.x - m), share.y, inbox[c * slice + i - first_piece]);
            }
            put(shared_token, head, dimension, sum.halves(m, shared_sinks[head], out_factor));
        }
        return;
    }
#endif

    // The last block to arrive adds the chunks.
    int* ticket = tickets + sequence * gridDim.x + blockIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) last = take_ticket(ticket) == chunks - 1;
    __syncthreads();
    if (!last) return;
    for (int head = warp; head < my_heads; head += DECODE_WARPS) {
        float2 share[MAX_CHUNKS / 32];
        float m = LOWEST;
#pragma unroll
        for (int i = 0; i < MAX_CHUNKS / 32; i++) {
            const int c = lane + 32 * i;
            share[i] = c < chunks ? __ldcg(&statistics[(room + c) * slots + head]) : make_float2(LOWEST, 0);
            m = fmaxf(m, share[i].x);
        }
#pragma unroll
        for (int offset = 16; offset; offset /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, offset));
#pragma unroll
        for (int i = 0; i < MAX_CHUNKS / 32; i++)
            shared.weights[head][lane + 32 * i] = make_float2(power_of_two(share[i].x - m), share[i].y);
        if (lane == 0) shared_statistics[0][head].x = m;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
        const int head = i / PIECES, dimension = i % PIECES * 4;
        const float* parts = partial + (room * slots + head) * HEAD_DIM + dimension;
        Merged sum;
#pragma unroll 16
        for (int c = 0; c < chunks; c++) {
            const float2 weight = shared.weights[head][c];
            sum.add(weight.x, weight.y, __ldcg(reinterpret_cast<const float4*>(parts + (size_t)c * slots * HEAD_DIM)));
        }
        put(shared_token, head, dimension, sum.halves(shared_statistics[0][head].x, shared_sinks[head], out_factor));
    }
    if (threadIdx.x == 0) *ticket = 0;
}
