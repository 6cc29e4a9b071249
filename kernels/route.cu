// A router's logits to each token's experts and their weights: scores, groups, the best k, normalised; for few tokens
// in one launch with the router and the RMSNorm in front of it.
#include "mma.cuh"
#include "dense.cuh"
#include "norm.cuh"

constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int COUNTERS = 4;  // threads that find an expert's place
constexpr int PARTS = 8;     // blocks of `route_few` for a token: where there are clusters, one
#if __CUDA_ARCH__ >= 900
#define IN_CLUSTERS __cluster_dims__(PARTS)
#else
#define IN_CLUSTERS
#endif

struct Rule {
    const float* correction;    // [experts] or null
    const float* expert_scale;  // [experts] or null
    int experts, top_k, always, sigmoid, normalize;
    float scaling;
    int groups, groups_kept;
};

// The order of floats as that of whole numbers above 0; a NaN is below all.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return isnan(x) ? 1 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A block's maximum or sum in all its threads; call with all of them, once for each `shared` [WARPS].
template <class Combine> __device__ __forceinline__ float of_block(float value, float* shared, Combine combine) {
    auto of_lanes = [&](int lanes) {
#pragma unroll
        for (int offset = lanes / 2; offset; offset /= 2)
            value = combine(value, __shfl_xor_sync(~0u, value, offset));
    };
    of_lanes(32);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[threadIdx.x % WARPS];
    of_lanes(WARPS);
    return value;
}

// Words of shared memory that `choose` wants: whole quads.
__device__ __forceinline__ int room(const Rule& rule) {
    return (4 * rule.experts + 3 + rule.groups + rule.top_k + 3) / 4 * 4;
}

// Of `room` words, where `choose` wants the logits: thread e % THREADS writes that of expert e.
__device__ __forceinline__ float* logits_in(float* shared, const Rule& rule) {
    return shared + (rule.experts + 3) / 4 * 4;
}

// A block brings what `choose` reads besides the logits.
__device__ __forceinline__ void prepare(const Rule& rule, float* shared) {
    float* const corrections = logits_in(shared, rule) + rule.experts;
#pragma unroll 1
    for (int e = threadIdx.x; e < rule.experts; e += THREADS) {
        if (rule.correction) corrections[e] = rule.correction[e];
        if (rule.expert_scale) corrections[rule.experts + e] = rule.expert_scale[e];
    }
}

// A block, for one token, after `prepare`. All sums in a fixed order; of equal scores the lowest index; a NaN last, so
// that ids are distinct whatever the logits. Behind the chosen experts come those that every token takes. Loops are
// not unrolled: a step's kernels share the instruction cache.
__device__ __forceinline__ void choose(const Rule& rule, float* shared, int* ids, float* weights) {
    __shared__ float maxima[WARPS], totals[WARPS];
    const int experts = rule.experts, groups = rule.groups, quads = (experts + 3) / 4;
    float *const ranked = shared, *const scores = logits_in(shared, rule), *const corrections = scores + experts;
    float *const expert_scales = corrections + experts, *const best_two = expert_scales + experts;
    int* const chosen = reinterpret_cast<int*>(best_two + groups);
    const float infinity = __int_as_float(0x7f800000);

    float most = 0.0f, sum = 1.0f;
    if (!rule.sigmoid) {
        auto larger = [](float x, float y) { return x > y || isnan(x) ? x : y; };  // NaN, if one is: so are all weights
        most = -infinity;
#pragma unroll 1
        for (int e = threadIdx.x; e < experts; e += THREADS) most = larger(most, scores[e]);
        most = of_block(most, maxima, larger);
        // Normalising divides what a softmax divides by out again.
        if (!rule.normalize || rule.correction) {
            sum = 0.0f;
#pragma unroll 1
            for (int e = threadIdx.x; e < experts; e += THREADS) sum += expf(scores[e] - most);
            sum = of_block(sum, totals, [](float x, float y) { return x + y; });
        }
    }
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        const float power = expf(rule.sigmoid ? -scores[e] : scores[e] - most);
        const float score = (rule.sigmoid ? 1.0f : power) / (rule.sigmoid ? 1.0f + power : sum);
        scores[e] = score;
        ranked[e] = rule.correction ? score + corrections[e] : score;
    }

    if (groups > 1) {
        __syncthreads();
        const int size = experts / groups;
#pragma unroll 1
        for (int group = threadIdx.x; group < groups; group += THREADS) {
            float first = -infinity, second = -infinity;
#pragma unroll 1
            for (int e = group * size; e < (group + 1) * size; e++) {
                if (ranked[e] > first) second = first, first = ranked[e];
                else if (ranked[e] > second) second = ranked[e];
            }
            best_two[group] = size > 1 ? first + second : first;
        }
        __syncthreads();
        // A group is kept if fewer than groups_kept others are before it.
#pragma unroll 1
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            const int own = e / size;
            int ahead = 0;
#pragma unroll 1
            for (int group = 0; group < groups; group++)
                ahead += best_two[group] > best_two[own] || (best_two[group] == best_two[own] && group < own);
            if (ahead >= rule.groups_kept) ranked[e] = -infinity;
        }
    }

#pragma unroll 1
    for (int e = threadIdx.x; e < 4 * quads; e += THREADS)
        ranked[e] = __uint_as_float(e < experts ? ordered(ranked[e]) : 0);
    __syncthreads();
    // An expert's place is how many are before it: of those in front of its own quad, the equal ones, too.
#pragma unroll 1
    for (int base = 0; base < experts; base += THREADS / COUNTERS) {
        const int e = min(base + (int)threadIdx.x / COUNTERS, experts - 1), own_quad = e / 4;
        const unsigned own = __float_as_uint(ranked[e]);
        int place = 0;
#pragma unroll 2
        for (int q = threadIdx.x % COUNTERS; q < quads; q += COUNTERS) {
            const uint4 other = reinterpret_cast<const uint4*>(ranked)[q];
            const unsigned most_behind = own - (q < own_quad);
            place += (other.x > most_behind) + (other.y > most_behind) + (other.z > most_behind) +
                     (other.w > most_behind);
        }
        if (4 * own_quad + (int)threadIdx.x % COUNTERS < e)
            place += __float_as_uint(ranked[4 * own_quad + threadIdx.x % COUNTERS]) == own;
#pragma unroll
        for (int offset = COUNTERS / 2; offset; offset /= 2) place += __shfl_xor_sync(~0u, place, offset);
        if (place < rule.top_k) chosen[place] = e;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    float total = 0.0f;
#pragma unroll 1
    for (int slot = threadIdx.x; slot < rule.top_k; slot += 32) total += scores[chosen[slot]];
    const float scale = rule.normalize ? rule.scaling / (warp_sum(total) + 1e-20f) : rule.scaling;
#pragma unroll 1
    for (int slot = threadIdx.x; slot < rule.top_k + rule.always; slot += 32) {
        int expert = experts + slot - rule.top_k;
        float weight = 1.0f;
        if (slot < rule.top_k) {
            expert = chosen[slot];
            weight = scores[expert] * scale;
            if (rule.expert_scale) weight *= expert_scales[expert];
        }
        ids[slot] = expert;
        weights[slot] = weight;
    }
}

#define RULE_PARAMETERS                                                                                                \
    const float *correction, const float *expert_scale, int experts, int top_k, int always, int sigmoid,               \
        int normalize, float scaling, int groups, int groups_kept
#define RULE {correction, expert_scale, experts, top_k, always, sigmoid, normalize, scaling, groups, groups_kept}

// One block per token. logits [T][experts]; ids, weights [T][top_k + always]. Dynamic shared memory: `room`.
extern "C" __global__ void __launch_bounds__(THREADS)
    route(const float* logits, int* ids, float* weights, RULE_PARAMETERS) {
    extern __shared__ __align__(16) float shared[];
    const Rule rule = RULE;
    dependents_may_start();
    prepare(rule, shared);
    wait_for_predecessor();
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += THREADS)
        logits_in(shared, rule)[e] = logits[(size_t)blockIdx.x * experts + e];
    const size_t first = (size_t)blockIdx.x * (top_k + always);
    choose(rule, shared, ids + first, weights + first);
}

// Few tokens: x float32 [T][K] -> norm -> router -> choice, grid (PARTS, T). A token's blocks share out the tiles of 64
// columns: block `part` takes tiles part, part + PARTS, ... of all experts, the first of which it reads before the
// predecessor is done. What its columns add to the logits, and their squares, it hands to the token's first block, which
// adds the parts and chooses: through shared memory in a cluster, else through `partial`, and the block that is done last
// does it (tickets [T], zero before and after). A token's result depends on nothing but its own row. On the way the row
// is normed as the experts take it: fp16 `normed_rows` [T][K], times factor.
//
// Dynamic shared memory, floats: `room`, then twice the columns [tiles of a part][64], what `partial` has of a
// token, and twice [experts]. A row tile's tiles are shared by 2^sharing warps.
// partial, floats: [T] times logits [PARTS << sharing][row_tiles * 16], squares [PARTS].
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 2)
    route_few(const float* x, unsigned K, const float* __restrict__ norm, float eps,
              const float* __restrict__ experts_norm, float experts_eps, float factor, __half* normed_rows,
              const unsigned char* __restrict__ tiles, const float* __restrict__ row_scale,
              const float* __restrict__ bias, int row_tiles, int sharing, float* partial, int* tickets, int* ids,
              float* weights, RULE_PARAMETERS) {
    constexpr int FRAGMENTS = DENSE_K / 16, HELD = 2 / WEIGHT_PLANES;  // HELD: a warp's tiles that are read ahead
    extern __shared__ __align__(16) float shared[];
    __shared__ float warp_squares[WARPS];
    const Rule rule = RULE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const unsigned part = blockIdx.x, token = blockIdx.y, k_tiles = (K + DENSE_K - 1) / DENSE_K;
    const unsigned most = (k_tiles + PARTS - 1) / PARTS * DENSE_K;  // columns of a part
    const int own = (k_tiles + PARTS - 1 - part) / PARTS, stride = row_tiles * 16;
    float *const columns = shared + room(rule), *const gains = columns + most, *const inbox = gains + most;
    float *const all_squares = inbox + (PARTS << sharing) * stride, *const scales = all_squares + PARTS;
    float* const biases = scales + experts;
    auto column = [&](unsigned i) { return (part + i / DENSE_K * PARTS) * DENSE_K + i % DENSE_K; };
    x += (size_t)token * K, normed_rows += (size_t)token * K;
    dependents_may_start();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif

    // This warp takes tiles j0, j0 + sharers, ... of this part's, of every (WARPS / sharers)-th row tile.
    const int sharers = 1 << sharing, j0 = warp & (sharers - 1);
    int row_tile = warp >> sharing;
    uint4 raw[HELD][WEIGHT_PLANES * FRAGMENTS];
    auto tile_of = [&](int j) {
        return tiles + ((size_t)row_tile * k_tiles + part + j * PARTS) * WEIGHT_PLANES * DENSE_PLANE;
    };
    auto load = [&](uint4 (&to)[WEIGHT_PLANES * FRAGMENTS], int j) {
        const unsigned char* tile = tile_of(j) + lane * 16;
#pragma unroll
        for (int i = 0; i < WEIGHT_PLANES * FRAGMENTS; i++) to[i] = load_once(tile + i * 512);
    };
    auto load_first = [&]() {
        if (row_tile >= row_tiles) return;
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (j0 + h * sharers < own) load(raw[h], j0 + h * sharers);
#pragma unroll 1
        for (int j = j0 + HELD * sharers; j < own; j += sharers)
            if (lane < WEIGHT_PLANES * DENSE_PLANE / 128) prefetch(tile_of(j) + lane * 128);
    };
    load_first();
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < own * DENSE_K; i += THREADS) {
        const bool is_column = column(i) < K;
        columns[i] = is_column ? norm[column(i)] : 0.0f;
        gains[i] = is_column ? experts_norm[column(i)] : 0.0f;
    }
    prepare(rule, shared);
#pragma unroll 1
    for (int e = threadIdx.x; e < experts; e += THREADS) scales[e] = row_scale[e], biases[e] = bias ? bias[e] : 0.0f;
    wait_for_predecessor();

    float squares = 0.0f;
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < own * DENSE_K; i += THREADS) {
        const float value = column(i) < K ? x[column(i)] : 0.0f;
        columns[i] *= value;
        squares = fmaf(value, value, squares);
    }
    squares = of_block(squares, warp_squares, [](float x, float y) { return x + y; });

    float low, high;  // of rows g and g + 8
    auto multiply = [&](const uint4 (&tile)[WEIGHT_PLANES * FRAGMENTS], int j) {
        const float4* four = reinterpret_cast<const float4*>(columns + j * DENSE_K) + 2 * t;
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) {
            const float4 v = four[i / 2 * 8 + i % 2];
#pragma unroll
            for (int p = 0; p < WEIGHT_PLANES; p++) {
                const uint4 w = tile[p * FRAGMENTS + i];
                const float2 a = __half22float2(as_half2(w.x)), b = __half22float2(as_half2(w.z));
                const float2 c = __half22float2(as_half2(w.y)), d = __half22float2(as_half2(w.w));
                low = fmaf(a.x, v.x, fmaf(a.y, v.y, fmaf(b.x, v.z, fmaf(b.y, v.w, low))));
                high = fmaf(c.x, v.x, fmaf(c.y, v.y, fmaf(d.x, v.z, fmaf(d.y, v.w, high))));
            }
        }
    };
    // What a warp's columns add to its experts' logits.
    auto products = [&](float* parts) {
#pragma unroll 1
        while (row_tile < row_tiles) {
            low = high = 0.0f;
#pragma unroll 1
            for (int j = j0; j < own;) {
#pragma unroll
                for (int h = 0; h < HELD; h++, j += sharers) {
                    if (j >= own) break;
                    multiply(raw[h], j);
                    if (j + HELD * sharers < own) load(raw[h], j + HELD * sharers);
                }
            }
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                low += __shfl_xor_sync(~0u, low, offset);
                high += __shfl_xor_sync(~0u, high, offset);
            }
            float* const to = parts + (part * sharers + j0) * stride + row_tile * 16 + g;
            if (t == 0) to[0] = low, to[8] = high;
            row_tile += WARPS >> sharing;
            load_first();
        }
    };
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    auto in_block = [](float* p, int rank) {
        float* remote;
        asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(p), "r"(rank));
        return remote;
    };
    float* const parts = inbox;
    float* const to = in_block(inbox, 0);
    if (threadIdx.x < PARTS) in_block(all_squares + part, threadIdx.x)[0] = squares;
    products(to);
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const bool chooses = part == 0;
#else
    __shared__ int is_last;
    float* const parts = partial + (size_t)token * ((PARTS << sharing) * stride + PARTS);
    products(parts);
    if (threadIdx.x == 0) parts[(PARTS << sharing) * stride + part] = squares;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[token], 1) == PARTS - 1;
        if (is_last) tickets[token] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const bool chooses = true;
#endif
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < PARTS; p++) total += parts[(PARTS << sharing) * stride + p];
    const float mean = __fdividef(total, K), scale = factor * rsqrtf(mean + experts_eps);
    if (chooses) {
        const float inverse = rsqrtf(mean + eps);
#pragma unroll 1
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            const float* from = parts + e;
            float sum = 0.0f;
#pragma unroll 1
            for (int sharer = 0; sharer < sharers; sharer++, from += PARTS * stride)
#pragma unroll
                for (int p = 0; p < PARTS; p++) sum += from[p * stride];
            logits_in(shared, rule)[e] = sum * scales[e] * inverse + biases[e];
        }
        const unsigned first = token * (top_k + always);
        choose(rule, shared, ids + first, weights + first);
    }
#if __CUDA_ARCH__ >= 900
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < own * DENSE_K; i += THREADS)
        if (column(i) < K) normed_rows[column(i)] = __float2half_rn(x[column(i)] * scale * gains[i]);
#else
#pragma unroll 1
    for (int k = threadIdx.x; k < K; k += THREADS) normed_rows[k] = __float2half_rn(x[k] * scale * experts_norm[k]);
#endif
}
