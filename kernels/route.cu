// A router's logits to each token's experts and their weights: scores, groups, the best k, normalised; for few tokens
// in one launch with the router and the RMSNorm in front of it.
#include "mma.cuh"
#include "dense.cuh"
#include "norm.cuh"

constexpr int WARPS = 8, THREADS = WARPS * 32;
constexpr int PARTS = 8;  // blocks of `route_few` for a token: where there are clusters, one
#if __CUDA_ARCH__ >= 900
#define IN_CLUSTERS __cluster_dims__(PARTS)
#else
#define IN_CLUSTERS
#endif

struct Rule {
    const float* correction;    // [experts] or null
    const float* expert_scale;  // [experts] or null
    int experts, top_k, sigmoid, normalize;
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
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value = combine(value, __shfl_xor_sync(~0u, value, offset));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) value = combine(value, shared[w]);
    return value;
}

// A block, for one token. `shared`: 2 * experts + groups + top_k words, the first of which are the logits: thread
// e % THREADS wrote that of expert e. All sums in a fixed order; of equal scores the lowest index; a NaN last, so that ids
// are distinct whatever the logits.
__device__ __forceinline__ void choose(const Rule& rule, float* shared, int* ids, float* weights) {
    __shared__ float maxima[WARPS], totals[WARPS];
    const int experts = rule.experts, groups = rule.groups;
    float *const scores = shared, *const ranked = scores + experts, *const best_two = ranked + experts;
    int* const chosen = reinterpret_cast<int*>(best_two + groups);
    const float infinity = __int_as_float(0x7f800000);

    float most = -infinity, sum = 0.0f;
    if (!rule.sigmoid) {
        for (int e = threadIdx.x; e < experts; e += THREADS) most = fmaxf(most, scores[e]);
        most = of_block(most, maxima, [](float x, float y) { return fmaxf(x, y); });
    }
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        const float score = rule.sigmoid ? 1.0f / (1.0f + expf(-scores[e])) : expf(scores[e] - most);
        scores[e] = score;
        sum += score;
    }
    if (!rule.sigmoid) sum = of_block(sum, totals, [](float x, float y) { return x + y; });
    for (int e = threadIdx.x; e < experts; e += THREADS) {
        if (!rule.sigmoid) scores[e] /= sum;
        ranked[e] = rule.correction ? scores[e] + rule.correction[e] : scores[e];
    }

    if (groups > 1) {
        __syncthreads();
        const int size = experts / groups;
        for (int group = threadIdx.x; group < groups; group += THREADS) {
            float first = -infinity, second = -infinity;
            for (int e = group * size; e < (group + 1) * size; e++) {
                if (ranked[e] > first) second = first, first = ranked[e];
                else if (ranked[e] > second) second = ranked[e];
            }
            best_two[group] = size > 1 ? first + second : first;
        }
        __syncthreads();
        // A group is kept if fewer than groups_kept others are before it.
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            const int own = e / size;
            int ahead = 0;
            for (int group = 0; group < groups; group++)
                ahead += best_two[group] > best_two[own] || (best_two[group] == best_two[own] && group < own);
            if (ahead >= rule.groups_kept) ranked[e] = -infinity;
        }
    }

    for (int e = threadIdx.x; e < experts; e += THREADS) ranked[e] = __uint_as_float(ordered(ranked[e]));
    __syncthreads();
    // An expert's place is how many are before it. Two threads count for each.
    for (int first = 0; first < experts; first += THREADS / 2) {
        const int e = first + threadIdx.x / 2;
        const unsigned own = e < experts ? __float_as_uint(ranked[e]) : 0;
        int place = 0;
#pragma unroll 8
        for (int other = threadIdx.x % 2; other < experts; other += 2)
            place += __float_as_uint(ranked[other]) > own - (other < e);
        place += __shfl_xor_sync(~0u, place, 1);
        if (e < experts && place < rule.top_k && threadIdx.x % 2 == 0) chosen[place] = e;
    }
    __syncthreads();
    float total = 0.0f;
    if (rule.normalize && threadIdx.x < rule.top_k)
        for (int slot = 0; slot < rule.top_k; slot++) total += scores[chosen[slot]];
    for (int slot = threadIdx.x; slot < rule.top_k; slot += THREADS) {
        const int expert = chosen[slot];
        float weight = scores[expert];
        if (rule.normalize) weight /= total + 1e-20f;
        weight *= rule.scaling;
        ids[slot] = expert;
        weights[slot] = rule.expert_scale ? weight * rule.expert_scale[expert] : weight;
    }
}

#define RULE_PARAMETERS                                                                                                \
    const float *correction, const float *expert_scale, int experts, int top_k, int sigmoid, int normalize,            \
        float scaling, int groups, int groups_kept
#define RULE {correction, expert_scale, experts, top_k, sigmoid, normalize, scaling, groups, groups_kept}

// One block per token. logits [T][experts]; ids, weights [T][top_k]. Dynamic shared memory: as `choose` wants it.
extern "C" __global__ void __launch_bounds__(THREADS)
    route(const float* logits, int* ids, float* weights, RULE_PARAMETERS) {
    extern __shared__ __align__(16) float shared[];
    const Rule rule = RULE;
    dependents_may_start();
    wait_for_predecessor();
    for (int e = threadIdx.x; e < experts; e += THREADS) shared[e] = logits[(size_t)blockIdx.x * experts + e];
    choose(rule, shared, ids + (size_t)blockIdx.x * top_k, weights + (size_t)blockIdx.x * top_k);
}

// Few tokens: x float32 [T][K] -> norm -> router -> choice, grid (PARTS, T). A token's blocks share out the tiles of 64
// columns: block `part` takes tiles part, part + PARTS, ... of all experts, the first of which it reads before the
// predecessor is done. What its columns add to the logits, and their squares, it hands to the token's first block, which
// adds the parts and chooses: through shared memory in a cluster, else through `partial`, and the block that is done last
// does it (tickets [T], zero before and after). A token's result depends on nothing but its own row. On the way the row
// is normed as the experts take it: fp16 `normed_rows` [T][K], times factor.
//
// Dynamic shared memory, floats: columns [tiles of a part][64], what `partial` has of a token, what `choose` wants.
// partial, floats: [T] times logits [PARTS * sharers][row_tiles * 16], squares [PARTS].
extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 2)
    route_few(const float* x, int K, const float* __restrict__ norm, float eps, const float* __restrict__ experts_norm,
              float experts_eps, float factor, __half* normed_rows, const unsigned char* __restrict__ tiles,
              const float* __restrict__ row_scale, const float* __restrict__ bias, int row_tiles, float* partial,
              int* tickets, int* ids, float* weights, RULE_PARAMETERS) {
    constexpr int FRAGMENTS = DENSE_K / 16, HELD = 4 / WEIGHT_PLANES;  // HELD: a warp's tiles that are read ahead
    extern __shared__ __align__(16) float shared[];
    __shared__ float warp_squares[WARPS];
    const Rule rule = RULE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int part = blockIdx.x, token = blockIdx.y, k_tiles = (K + DENSE_K - 1) / DENSE_K;
    const int most = (k_tiles + PARTS - 1) / PARTS, own = max(0, (k_tiles - part + PARTS - 1) / PARTS);
    const int stride = row_tiles * 16;
    float *const columns = shared, *const inbox = columns + most * DENSE_K;
    auto column = [&](int i) { return (part + i / DENSE_K * PARTS) * DENSE_K + i % DENSE_K; };
    x += (size_t)token * K;
    dependents_may_start();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif

    // `sharers` warps share a row tile's tiles: this one takes j0, j0 + sharers, ... of this part's, of every
    // (WARPS / sharers)-th row tile.
    const int sharers = max(1, WARPS / row_tiles), j0 = warp % sharers;
    int row_tile = warp / sharers;
    float *const all_squares = inbox + PARTS * sharers * stride, *const scores = all_squares + PARTS;
    uint4 raw[HELD][WEIGHT_PLANES * FRAGMENTS];
    auto load = [&](uint4 (&to)[WEIGHT_PLANES * FRAGMENTS], int j) {
        const size_t at = (size_t)row_tile * k_tiles + part + j * PARTS;
        const unsigned char* tile = tiles + at * WEIGHT_PLANES * DENSE_PLANE;
#pragma unroll
        for (int i = 0; i < WEIGHT_PLANES * FRAGMENTS; i++) to[i] = load_once(tile + (i * 32 + lane) * 16);
    };
    auto load_first = [&]() {
#pragma unroll
        for (int h = 0; h < HELD; h++)
            if (row_tile < row_tiles && j0 + h * sharers < own) load(raw[h], j0 + h * sharers);
    };
    load_first();
    for (int i = threadIdx.x; i < own * DENSE_K; i += THREADS) {
        columns[i] = column(i) < K ? norm[column(i)] : 0.0f;
        if (i % 32 == 0 && column(i) < K) prefetch(experts_norm + column(i));
    }
    for (int e = threadIdx.x; e < experts; e += THREADS) {  // for the block that chooses
        scores[e] = row_scale[e], scores[experts + e] = bias ? bias[e] : 0.0f;
        if (correction && e % 32 == 0) prefetch(correction + e);
        if (expert_scale && e % 32 == 0) prefetch(expert_scale + e);
    }
    wait_for_predecessor();

    float squares = 0.0f;
    for (int i = threadIdx.x; i < own * DENSE_K; i += THREADS) {
        const float value = column(i) < K ? x[column(i)] : 0.0f;
        columns[i] *= value;
        squares = fmaf(value, value, squares);
    }
    squares = block_sum<WARPS>(squares, warp_squares);

    float low, high;  // of rows g and g + 8
    auto multiply = [&](const uint4 (&tile)[WEIGHT_PLANES * FRAGMENTS], int j) {
        const float4* values = reinterpret_cast<const float4*>(columns + j * DENSE_K);
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) {
            const float4 v = values[i / 2 * 8 + 2 * t + i % 2];
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
        for (; row_tile < row_tiles; row_tile += WARPS / sharers, load_first()) {
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
        }
    };
    int first = part, step = PARTS;  // the tiles of columns that this block norms for the experts
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
    float* const parts = partial + (size_t)token * (PARTS * sharers * stride + PARTS);
    products(parts);
    if (threadIdx.x == 0) parts[PARTS * sharers * stride + part] = squares;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[token], 1) == PARTS - 1;
        if (is_last) tickets[token] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    first = 0, step = 1;
    const bool chooses = true;
#endif
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < PARTS; p++) total += parts[PARTS * sharers * stride + p];
    const float mean = total / K;
    if (chooses) {
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            float sum = 0.0f;
#pragma unroll 8
            for (int p = 0; p < PARTS * sharers; p++) sum += parts[p * stride + e];
            scores[e] = sum * scores[e] / sqrtf(mean + eps) + scores[experts + e];
        }
        choose(rule, scores, ids + (size_t)token * top_k, weights + (size_t)token * top_k);
    }
    const float scale = factor / sqrtf(mean + experts_eps);
    for (int i = threadIdx.x; i < (k_tiles - first + step - 1) / step * DENSE_K; i += THREADS) {
        const int k = (first + i / DENSE_K * step) * DENSE_K + i % DENSE_K;
        if (k < K) normed_rows[(size_t)token * K + k] = __float2half_rn(x[k] * scale * experts_norm[k]);
    }
}
