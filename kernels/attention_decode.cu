// Attention of one new token per sequence over pages, split along the keys (Flash-Decoding, Dao et al. 2023).
#include "attention_tiles.cuh"
#include "inbox.cuh"
#include "order.cuh"

constexpr int WARP_HEADS = HEADS / WARPS;  // that one warp opens
constexpr int LATER_TURNS = 5;  // whose keys and values are brought to L2 ahead of the predecessor, if not closer
constexpr int CHAINS = HEAD_DIM <= 256 ? 2 : 1;  // of products that wait for each other, as far as registers suffice
constexpr int SHARE_STRIDE = HEAD_DIM + 4;  // of a warp's share of a head: a quad's heads lie in different banks
constexpr int MAX_CHUNKS = 64;  // of one sequence
constexpr float LOWEST = -1e30f;  // below every score; the largest of no scores
// Registers of blocks that are not small have room for keys and values that are read ahead of the predecessor. Where
// they have more, what follows it runs once before it, too; else shares lie where tiles waited.
constexpr bool AHEAD = HEAD_DIM <= 256 && !SMALL;
constexpr bool REHEARSED = CLUSTER > 1 && HEAD_DIM <= 128 && !SMALL, ALIASED = !REHEARSED;
constexpr int LEAD = STAGED && !SMALL;  // turns by which what is staged is ahead of what registers hold
constexpr int MOST_BLOCKS = SMALL && 128 % PART_DIM == 0 ? 4 : 3;
// Blocks of an SM that registers are left for.
constexpr int BLOCKS = WARPS > 4 || PART_DIM > 128 || HEAD_TILES > 1 || REHEARSED ? 2 : MOST_BLOCKS;

// An address that is computed here, and not where it is used.
__device__ __forceinline__ const __half* known(const __half* p) {
    asm volatile("" : "+l"(p));
    return p;
}

// a / b, which are positive, below a million: 0.5 / b is more than the division lacks.
__device__ __forceinline__ int quotient(int a, int b) { return __fdividef(a + 0.5f, b); }

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
        const float inverse = __fdividef(factor, total + power_of_two(sink - largest));
        return make_uint2(as_bits(__floats2half2_rn(values.x * inverse, values.y * inverse)),
                          as_bits(__floats2half2_rn(values.z * inverse, values.w * inverse)));
    }
};

// grid (kv_heads * tiles of a group's heads, S, chunks), block THREADS, clusters of CLUSTER blocks. The keys that a
// sequence sees are cut into chunks of whole turns by its own length alone: `spread` of them while that is at most
// short_turns for each, then more, at most max_chunks. Blocks beyond them end at once, so the grid holds for every
// length that the page table allows. The block of the last chunk writes the new key and value. A cluster has all
// chunks: its blocks bring their shares to each other's shared memory, and each adds up a slice of the numbers. Without
// clusters, chunks meet in `partial` [S, gridDim.x, gridDim.z, heads of a block, HEAD_DIM] and statistics (the same
// without HEAD_DIM), and the block that finishes last adds them; `tickets` [S, gridDim.x] is zero before and after.
// Both add alike, chunk by chunk, so neither clusters nor SMALL change a result.
//
// SMALL blocks are for grids of more blocks than half the chip's multiprocessors: four share one, and two find places
// beside a linear's block and begin to read while it computes. They bring nothing to L2 ahead: for Llama-3.1-8B's eight
// sequences that cost 2 us of a layer, as it takes the linear bandwidth.
//
// Keys are tiled as rows (S^T = K q^T), so up to eight query heads cost one pass of the tensor cores. Sequences with
// several new tokens are attention_prefill's.
//
// ordered: 0, or twice the padded tokens of order.cuh, plus one if interleaved: how the output lies.
//
// What pages hold times a power of two and the layer's scale is the key or value: key_factor and value_factor turn what
// came into what is stored, scale_log2 has the keys' way back, and out_factor the values'.
//
// Launched dependently, it reads lengths, pages and remembered keys and values before it waits. That is safe
// because no kernel that writes them lets its dependents start early, except this one, and a step's last
// kernel (advance) and first (embed) are never launched dependently.
extern "C" __global__ void
#if CLUSTER > 1
    __cluster_dims__(1, 1, CLUSTER)
#endif
    __launch_bounds__(THREADS, BLOCKS)
    attention_decode(const __half* qkv, Kv* keys, Kv* values,
                     const int* __restrict__ starts, const int* __restrict__ lengths,
                     const int* __restrict__ pages, int table_width, int group, int kv_heads,
                     int others, const float* q_norm, float q_eps, const float* k_norm, float k_eps,
                     const float* v_norm, float v_eps, const float2* rope, float value_scale, float scale_log2,
                     int window, const float* __restrict__ sinks, float key_factor, float value_factor,
                     float out_factor, int spread, int short_turns, int max_chunks, float* partial,
                     float2* statistics, int* tickets, int ordered, __half* __restrict__ out) {
    constexpr int PIECES = HEAD_DIM / 4;  // of a head: four dimensions each
    // What waits there while keys are gone through: scores, for the warps with other dimensions, and tiles. At the very
    // end, the chunks' weights.
    union Waiting {
        struct {
            float4 scores[SPLIT > 1 ? 2 : 1][SPLIT > 1 ? WARPS : 1][32];
            Kv keys[WARPS][STAGED ? TILE * KEY_STRIDE : 16], values[WARPS][STAGED ? TILE * VALUE_STRIDE : 16];
        };
        float2 weights[HEADS][MAX_CHUNKS];
    };
    extern __shared__ __align__(16) unsigned char dynamic_shared[];
    Waiting& shared = *reinterpret_cast<Waiting*>(dynamic_shared);
    const int heads = group * kv_heads, slots = min(group, HEADS);  // room for heads
    // [KEY_WARPS][slots][SHARE_STRIDE]: the warps' shares; if aliased, they come when nothing waits any more.
    float* const shares = reinterpret_cast<float*>(dynamic_shared + (ALIASED ? 0 : sizeof(Waiting)));
    const int share_bytes = KEY_WARPS * slots * SHARE_STRIDE * sizeof(float);
    __shared__ __align__(16) __half shared_q[HEADS][HEAD_DIM + 8];
    __shared__ __align__(16) Kv newest[2][HEAD_DIM];                       // the new key and value
#if CLUSTER > 1
    // slots * PIECES + CLUSTER: this block's slice of each chunk's share
    float4* const inbox = reinterpret_cast<float4*>(
        dynamic_shared + (ALIASED ? max((int)sizeof(Waiting), share_bytes) : (int)sizeof(Waiting) + share_bytes));
    __shared__ float2 inbox_statistics[CLUSTER][HEADS];
    __shared__ unsigned long long inbox_barrier;
    __shared__ int shared_slice;
    __shared__ float shared_per_slice;
#endif
    __shared__ float2 shared_statistics[KEY_WARPS][HEADS];  // (largest score, sum)
    __shared__ float shared_sinks[HEADS];
    // What follows the keys reads these there, as they would take registers: the token, the first of its columns,
    // chunks of the sequence, heads of this block and room for heads.
    __shared__ struct { int token, column, chunks, heads, slots; } after;
    __shared__ int last;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be the same for its lanes: no register of each
    const int key_warp = warp / SPLIT, first_dimension = warp % SPLIT * PART_DIM;
    int kv_head = blockIdx.x, first_head = 0;
    while (kv_head >= kv_heads) kv_head -= kv_heads, first_head += HEADS;
    const int my_heads = min(group - first_head, HEADS);
    const int sequence = blockIdx.y, chunk = blockIdx.z;
    dependents_may_start();
#if CLUSTER > 1
    inbox_open(&inbox_barrier);
#endif
    const int token = fetch(starts + sequence), length = fetch(lengths + sequence);
    const bool mine = fetch(starts + sequence + 1) - token == 1;
    const int lowest = window ? max(0, length - window) : 0;
    const int first_turn = (unsigned)lowest / TURN;
    const int turns = max(1, (int)((unsigned)max(length + TURN - 1, 0) / TURN) - first_turn);
    const int chunks = min(turns, min(max_chunks, max(spread, quotient(turns + short_turns - 1, short_turns))));
    if (!mine || chunk >= chunks) {
        wait_for_predecessor();
        return;
    }
    auto put = [&](int token, int column, uint2 four) {
        if (ordered) {
            unsigned* const words = reinterpret_cast<unsigned*>(out);
            words[ordered_word(column, token, ordered / 2, ordered % 2, token % 8)] = four.x;
            words[ordered_word(column + 2, token, ordered / 2, ordered % 2, token % 8)] = four.y;
        } else *reinterpret_cast<uint2*>(out + (size_t)token * heads * HEAD_DIM + column) = four;
    };
    if (length <= 0) {  // a padded row without a context
        wait_for_predecessor();
#pragma unroll 1
        for (int i = threadIdx.x; i < my_heads * PIECES; i += THREADS)
            put(token, (kv_head * group + first_head) * HEAD_DIM + i * 4, make_uint2(0, 0));
        return;
    }
    const int* table = pages + (size_t)sequence * table_width;
    const int each = quotient(turns, chunks), rest = turns - each * chunks;
    const int begin = (first_turn + chunk * each + min(chunk, rest)) * TURN;
    const int end = min(length, begin + (each + (chunk < rest)) * TURN);

    KeyRow k[2];
    ValueTile v;
    int key = begin + key_warp * TILE;
    if (key + TILE <= lowest) key += TURN;
    // Pages are looked up turns before they are needed; at first, each lane knows a turn's.
    auto page_of = [&](int from) { return from < end ? fetch(table + (unsigned)from / PAGE) : 0; };
    const int page_of_lane = page_of(key + lane * TURN);
    auto place_in = [&](int page, int from) {
        return head_in_page(page, kv_heads, kv_head, (unsigned)from % PAGE) + first_dimension;
    };
    auto first_places = [&](int turn) { return place_in(__shfl_sync(~0u, page_of_lane, turn), key + turn * TURN); };
    auto load_keys = [&](size_t place) {
        k[0].load(keys + place + g * HEAD_DIM, t);
        k[1].load(keys + place + (g + 8) * HEAD_DIM, t);
    };
    if (AHEAD && key < end) {
        const size_t place = first_places(0);
        load_keys(place);
        v.load(values + place, g, t);
    }
    // A tile, the first or that behind the one in registers, is on its way to shared memory: keys and values in turns,
    // so that of two copies the older one is what is needed.
    auto stage_keys = [&](int from, size_t place) {
        if (from < end) stage(shared.keys[warp], KEY_STRIDE, keys + place);
        copy_commit();
    };
    auto stage_values = [&](int from, size_t place) {
        if (from < end) stage(shared.values[warp], VALUE_STRIDE, values + place);
        copy_commit();
    };
    auto take_keys = [&] {
        copy_wait<1>();
        __syncwarp();
        k[0].load_shared(&shared.keys[warp][g * KEY_STRIDE], t);
        k[1].load_shared(&shared.keys[warp][(g + 8) * KEY_STRIDE], t);
        __syncwarp();
    };
    auto take_values = [&] {
        copy_wait<1>();
        __syncwarp();
        v.load_staged(shared.values[warp], g, t);
        __syncwarp();
    };
    if (STAGED) {
        const size_t place = first_places(AHEAD);
        stage_keys(key + AHEAD * TURN, place);
        stage_values(key + AHEAD * TURN, place);
    }
    // Of what is fetched, or staged, in the loop first, and of what follows.
    int next_page = __shfl_sync(~0u, page_of_lane, 1 + LEAD), later_page = __shfl_sync(~0u, page_of_lane, 2 + LEAD);
    // The last warps open the new key and value, beside their queries.
    const bool opens_value = warp == WARPS - 2, opens_newest = chunk == chunks - 1 && warp >= WARPS - 2;
    const float* newest_norm = opens_newest && others ? opens_value ? v_norm : k_norm : nullptr;
#pragma unroll 1
    for (int turn = AHEAD + STAGED; !SMALL && turn < LATER_TURNS && key + turn * TURN < end; turn++) {
        const size_t place = first_places(turn);
        for (int i = lane * 128; i < TILE * PART_DIM * (int)sizeof(Kv); i += 32 * 128) {
            const int at = i + first_dimension * (TILE - 1) * (int)sizeof(Kv);  // each warp its part
            prefetch(reinterpret_cast<const char*>(keys + place) + at);
            prefetch(reinterpret_cast<const char*>(values + place) + at);
        }
    }
#if CLUSTER > 1
    if (threadIdx.x == 0) {
        const int pieces = my_heads * PIECES, slice = (pieces + chunks - 1) / chunks;
        const int first_piece = chunk * slice, end_piece = min(first_piece + slice, pieces);
        const int slice_heads = (end_piece - 1) / PIECES - first_piece / PIECES + 1;
        const int bytes = (end_piece - first_piece) * sizeof(float4) + slice_heads * sizeof(float2);
        inbox_expect(&inbox_barrier, first_piece < pieces ? chunks * bytes : 0);
        shared_slice = slice, shared_per_slice = 1.0f / slice;
    }
    inboxes_wait_open();
#endif
    if (threadIdx.x == 0)
        after = {token, (kv_head * group + first_head) * HEAD_DIM, chunks, my_heads, slots};
    if (threadIdx.x < my_heads)
        shared_sinks[threadIdx.x] = sink_score(sinks, kv_head * group + first_head + threadIdx.x);
    const __half* row = qkv + (size_t)token * (heads + others) * HEAD_DIM;
    const __half* const q_row = known(row + (kv_head * group + first_head + warp) * HEAD_DIM);
    const __half* const newest_row = known(row + (heads + (opens_value ? others - kv_heads : 0) + kv_head) * HEAD_DIM);

    auto slot_of = [&](int chunk, int head) {  // where memory holds what a chunk knows of a head
        return (((size_t)blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z + chunk) * after.slots + head;
    };
    // Weights wash a kernel's code out of L2 and of the caches for instructions, and it comes back slowly. So all that
    // follows runs once before the predecessor is done, on what happens to be there, and without effects.
#pragma unroll 1
    for (int real = !REHEARSED; real < 2; real++) {
        const int newest_page = opens_newest ? fetch(table + (length - 1) / PAGE) : 0;
        Head newest_weight;
        if (newest_norm) newest_weight.load(reinterpret_cast<const float2*>(newest_norm));
        Opening opening;
        opening.load(q_norm, rope, length - 1);
        if (real) wait_for_predecessor();
        Head head[WARP_HEADS], newest_head;
#pragma unroll
        for (int i = 0; i < WARP_HEADS; i++)
            if (warp + i * WARPS < my_heads)
                head[i].load_half(q_row + i * WARPS * HEAD_DIM);
        if (opens_newest && others) newest_head.load_half(newest_row);
#pragma unroll
        for (int i = 0; i < WARP_HEADS; i++) {
            __half* to = shared_q[warp + i * WARPS];
            if (warp + i * WARPS < my_heads) {
                opening.open(head[i], q_eps, value_scale);
                head[i].store(to, 1.0f);
            } else {
                for (int j = lane; j < HALF_DIM; j += 32) reinterpret_cast<unsigned*>(to)[j] = 0;
            }
        }
        if (opens_newest) {
            Kv* store = opens_value ? values : keys;
            store += head_in_page(newest_page, kv_heads, kv_head, (length - 1) % PAGE);
            if (others) {
                if (newest_norm) newest_head.norm(newest_weight, opens_value ? v_eps : k_eps, value_scale);
                if (rope && !opens_value) newest_head.rotate(opening.rotation);
                newest_head.store(newest[opens_value], opens_value ? value_factor : key_factor);
                if (real) newest_head.store(store, opens_value ? value_factor : key_factor);
            } else {
                for (int i = lane; i < HEAD_DIM * (int)sizeof(Kv) / 16; i += 32)
                    reinterpret_cast<uint4*>(newest[opens_value])[i] = read_now(reinterpret_cast<uint4*>(store) + i);
            }
        }
        __syncthreads();
        if (!AHEAD && !SMALL && key < end) {
            if (STAGED) {
                const size_t place = first_places(1);
                take_keys();
                stage_keys(key + TURN, place);
                take_values();
                stage_values(key + TURN, place);
            } else {
                const size_t place = first_places(0);
                load_keys(place);
                v.load(values + place, g, t);
            }
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
        for (; key < end; key += TURN) {
            const int next = key + TURN, new_row = length - 1 - key;
            const bool more = real && next < end;
            const size_t next_place = place_in(next_page, next + LEAD * TURN);
            auto put_newest_value = [&] {  // behind its row weights are zero, but need numbers
#pragma unroll
                for (int r = 0; r < 4; r++)
                    if (new_row <= ValueTile::key(r, t)) v.load_shared(r, newest[1] + first_dimension, g);
            };
            if (SMALL) {
                take_keys();
                stage_keys(next, next_place);
            }
            if (new_row < TILE) {  // memory may lack this row
                if (new_row == g) k[0].load_shared(newest[0] + first_dimension, t);
                if (new_row == g + 8) k[1].load_shared(newest[0] + first_dimension, t);
                if (!SMALL) put_newest_value();
            }
            float s[HEAD_TILES][4] = {}, odd[HEAD_TILES][4] = {};
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
                    if (d + 1 < PART_DIM / 16) mma(CHAINS > 1 ? odd[n] : s[n], a2, q.z, q.w);
                }
            }
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
                for (int i = 0; CHAINS > 1 && i < 4; i++) s[n][i] += odd[n][i];
            if (LEAD && more) {
                take_keys();
                stage_keys(next + TURN, next_place);
            } else if (!SMALL && more) load_keys(next_place);
            if (SPLIT > 1) {  // two sets of room: a warp writes one again only after the others have read it
                const int turn = key / TURN % 2;
                shared.scores[turn][warp][lane] = make_float4(s[0][0], s[0][1], s[0][2], s[0][3]);
                barrier_wait(1 + key_warp, 32 * SPLIT);
                s[0][0] = s[0][1] = s[0][2] = s[0][3] = 0;
#pragma unroll
                for (int other = 0; other < SPLIT; other++) {
                    const float4 theirs = shared.scores[turn][key_warp * SPLIT + other][lane];
                    s[0][0] += theirs.x, s[0][1] += theirs.y, s[0][2] += theirs.z, s[0][3] += theirs.w;
                }
            }

            unsigned p[HEAD_TILES][2];
#pragma unroll
            for (int n = 0; n < HEAD_TILES; n++) {
                float shrink[2];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int position = key + g + i / 2 * 8;
                    s[n][i] = position < length && position >= lowest ? s[n][i] * scale_log2 : -INFINITY;
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
            if (SMALL) {
                take_values();
                stage_values(next, next_place);
                if (new_row < TILE) put_newest_value();
            }
#pragma unroll
            for (int m = 0; m < PART_DIM / 16; m++) {
                const uint2 low = v.operand(0, m), high = v.operand(2, m);
                const unsigned a[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
                for (int n = 0; n < HEAD_TILES; n++) mma(o[n][m], a, p[n][0], p[n][1]);
            }
            if (LEAD && more) {
                take_values();
                stage_values(next + TURN, next_place);
            } else if (!SMALL && more) v.load(values + next_place, g, t);
            if (!real) break;
            next_page = later_page;
            later_page = page_of(next + (2 + LEAD) * TURN);
        }

        const int slots = after.slots;
        if (ALIASED && (SPLIT > 1 || STAGED)) __syncthreads();  // scores and tiles lie where shares go
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
                if (head >= after.heads) continue;
                float* to = shares + (key_warp * slots + head) * SHARE_STRIDE;
                to += first_dimension;
#pragma unroll
                for (int m = 0; m < PART_DIM / 16; m++) {
                    if (m < ValueTile::PAIRED) {  // two tiles at a time: the four dimensions are neighbours
                        if (m % 2 == 0)
                            *reinterpret_cast<float4*>(to + ValueTile::dimension(m, g)) =
                                make_float4(o[n][m][i], o[n][m][i + 2], o[n][m + 1][i], o[n][m + 1][i + 2]);
                    } else {
                        *reinterpret_cast<float2*>(to + ValueTile::dimension(m, g)) =
                            make_float2(o[n][m][i], o[n][m][i + 2]);
                    }
                }
            }
        }
        __syncthreads();
        // The warps' shares of the chunk, added in their order.
#pragma unroll 1
        for (int i = threadIdx.x; i < after.heads * PIECES; i += THREADS) {
            const int head = i / PIECES, dimension = i % PIECES * 4;
            float m = LOWEST;
#pragma unroll
            for (int w = 0; w < KEY_WARPS; w++) m = fmaxf(m, shared_statistics[w][head].x);
            Merged sum;
#pragma unroll
            for (int w = 0; w < KEY_WARPS; w++) {
                const float2 share = shared_statistics[w][head];
                const float* o = shares + (w * slots + head) * SHARE_STRIDE + dimension;
                sum.add(power_of_two(share.x - m), share.y, *reinterpret_cast<const float4*>(o));
            }
            if (!real) continue;
#if CLUSTER > 1
            const int slice = shared_slice, owner = (i + 0.5f) * shared_per_slice;  // exact for so few
            const int at = i - owner * slice;
            inbox_store(&inbox[chunk * slice + at], &inbox_barrier, owner, sum.values);
            if (at == 0 || dimension == 0)
                inbox_store(&inbox_statistics[chunk][head], &inbox_barrier, owner, make_float2(m, sum.total));
#else
            if (after.chunks == 1) {
                put(after.token, after.column + 4 * i, sum.halves(m, shared_sinks[head], out_factor));
                continue;
            }
            const size_t slot = slot_of(chunk, head);
            *reinterpret_cast<float4*>(partial + slot * HEAD_DIM + dimension) = sum.values;
            if (dimension == 0) statistics[slot] = make_float2(m, sum.total);
#endif
        }
        const int all = after.chunks;
#if CLUSTER > 1
        const int slice = shared_slice, first_piece = blockIdx.z * slice;
        const int end_piece = min(first_piece + slice, after.heads * PIECES);
        if (real) inbox_wait(&inbox_barrier);
#pragma unroll 1
        for (int i = first_piece + threadIdx.x; i < end_piece; i += THREADS) {
            const int head = i / PIECES, dimension = i % PIECES * 4;
            float m = LOWEST;
            float2 share[CLUSTER];
#pragma unroll
            for (int c = 0; c < CLUSTER; c++) {  // none is waited for
                share[c] = inbox_statistics[min(c, all - 1)][head];
                m = fmaxf(m, share[c].x);
            }
            Merged sum;
#pragma unroll
            for (int c = 0; c < CLUSTER; c++) {
                const float4 part = inbox[min(c, all - 1) * slice + i - first_piece];
                sum.add(c < all ? power_of_two(share[c].x - m) : 0.0f, share[c].y, part);
            }
            if (real) put(after.token, after.column + 4 * i, sum.halves(m, shared_sinks[head], out_factor));
        }
#else
        if (all == 1) return;
        // The last block to arrive adds the chunks.
        int* ticket = tickets + sequence * gridDim.x + blockIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) last = take_ticket(ticket) == all - 1;
        __syncthreads();
        if (!last) return;
        for (int head = warp; head < after.heads; head += WARPS) {
            float2 share[MAX_CHUNKS / 32];
            float m = LOWEST;
#pragma unroll
            for (int i = 0; i < MAX_CHUNKS / 32; i++) {
                const int c = lane + 32 * i;
                share[i] = c < all ? __ldcg(&statistics[slot_of(c, head)]) : make_float2(LOWEST, 0);
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
        for (int i = threadIdx.x; i < after.heads * PIECES; i += THREADS) {
            const int head = i / PIECES, dimension = i % PIECES * 4;
            const float* parts = partial + slot_of(0, head) * HEAD_DIM + dimension;
            Merged sum;
#pragma unroll 16
            for (int c = 0; c < all; c++) {
                const float2 weight = shared.weights[head][c];
                const float* part = parts + (size_t)c * slots * HEAD_DIM;
                sum.add(weight.x, weight.y, __ldcg(reinterpret_cast<const float4*>(part)));
            }
            const float largest = shared_statistics[0][head].x;
            put(after.token, after.column + 4 * i, sum.halves(largest, shared_sinks[head], out_factor));
        }
        if (threadIdx.x == 0) *ticket = 0;
#endif
    }
}
