// A router's logits to each token's experts and their weights: scores, groups, the best k, normalised; for few tokens
// in one launch with the router and the RMSNorm in front of it.
#include "mma.cuh"
#include "dense.cuh"
#include "norm.cuh"

constexpr int WARPS = 8, THREADS = WARPS * 32;  // of a block of `route_few`
constexpr int PARTS = 8;                         // its blocks for a token: where there are clusters, one
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

    __device__ __forceinline__ int shared_words() const { return 2 * experts + groups + top_k; }
};

// The order of floats as that of whole numbers above 0; a NaN is below all.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return isnan(x) ? 1 : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ unsigned warp_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(~0u, value);
#else
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value = max(value, __shfl_xor_sync(~0u, value, offset));
    return value;
#endif
}

// One warp, for one token. `shared`: the logits [experts], then room for what `shared_words` says. All sums in a fixed
// order; of equal scores the lowest index; a NaN last, so that ids are distinct whatever the logits.
__device__ __forceinline__ void choose(const Rule& rule, float* shared, int* ids, float* weights) {
    const int experts = rule.experts, groups = rule.groups, lane = threadIdx.x % 32;
    float *const scores = shared, *const ranked = scores + experts, *const best_two = ranked + experts;
    int* const chosen = reinterpret_cast<int*>(best_two + groups);
    const float infinity = __int_as_float(0x7f800000);

    float most = -infinity, sum = 0.0f;
    if (!rule.sigmoid) {
        for (int e = lane; e < experts; e += 32) most = fmaxf(most, scores[e]);
#pragma unroll
        for (int offset = 16; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    }
    for (int e = lane; e < experts; e += 32) {
        const float score = rule.sigmoid ? 1.0f / (1.0f + expf(-scores[e])) : expf(scores[e] - most);
        scores[e] = score;
        sum += score;
    }
    if (!rule.sigmoid) sum = warp_sum(sum);
    for (int e = lane; e < experts; e += 32) {
        if (!rule.sigmoid) scores[e] /= sum;
        ranked[e] = rule.correction ? scores[e] + rule.correction[e] : scores[e];
    }
    __syncwarp();

    if (groups > 1) {
        const int size = experts / groups;
        for (int group = lane; group < groups; group += 32) {
            float first = -infinity, second = -infinity;
            for (int e = group * size; e < (group + 1) * size; e++) {
                if (ranked[e] > first) second = first, first = ranked[e];
                else if (ranked[e] > second) second = ranked[e];
            }
            best_two[group] = size > 1 ? first + second : first;
        }
        __syncwarp();
        // A group is kept if fewer than groups_kept others are before it.
        for (int e = lane; e < experts; e += 32) {
            const int own = e / size;
            int ahead = 0;
            for (int group = 0; group < groups; group++)
                ahead += best_two[group] > best_two[own] || (best_two[group] == best_two[own] && group < own);
            if (ahead >= rule.groups_kept) ranked[e] = -infinity;
        }
    }

    for (int e = lane; e < experts; e += 32) ranked[e] = __uint_as_float(ordered(ranked[e]));  // 0 once it is taken
    unsigned best = 0;  // of this lane's own, and where
    int at = 0;
    auto look = [&]() {
        best = 0;
        for (int e = lane; e < experts; e += 32)
            if (const unsigned one = __float_as_uint(ranked[e]); one > best) best = one, at = e;
    };
    look();
    float total = 0.0f;
    for (int slot = 0; slot < rule.top_k; slot++) {
        const unsigned top = warp_max(best);
        const int index = ~warp_max(best == top ? ~at : 0);
        total += scores[index];
        if (lane == 0) chosen[slot] = index;
        if (index % 32 == lane) ranked[index] = 0.0f, look();
    }
    __syncwarp();
    for (int slot = lane; slot < rule.top_k; slot += 32) {
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

// One warp per token. logits [T][experts]; ids, weights [T][top_k]. Dynamic shared memory: Rule::shared_words.
extern "C" __global__ void __launch_bounds__(32)
    route(const float* logits, int* ids, float* weights, RULE_PARAMETERS) {
    extern __shared__ __align__(16) float shared[];
    const Rule rule = RULE;
    dependents_may_start();
    wait_for_predecessor();
    for (int e = threadIdx.x; e < experts; e += 32) shared[e] = logits[(size_t)blockIdx.x * experts + e];
    choose(rule, shared, ids + (size_t)blockIdx.x * top_k, weights + (size_t)blockIdx.x * top_k);
}

// Few tokens: x float32 [T][K] -> norm -> router -> choice, grid (PARTS, T). A token's blocks share out the tiles of 64
// columns: block `part` takes tiles part, part + PARTS, ... of all experts, the first of which it reads before the
// predecessor is done. What its columns add to the logits, and their squares, it hands to the token's first block, which
// adds the parts and chooses: through shared memory in a cluster, else through `partial`, [T][PARTS][experts + 1], and
// the block that is done last does it (tickets [T], zero before and after). A token's result depends on nothing but its
// own row. On the way the row is normed as the experts take it: fp16 `normed_rows` [T][K], times factor.
//
// Dynamic shared memory, floats: columns [tiles of a part][64], sums [row_tiles][tiles of a part][16], parts
// [PARTS][experts + 1], Rule::shared_words.
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
    const int tasks = row_tiles * own, stride = experts + 1;
    float *const columns = shared, *const sums = columns + most * DENSE_K, *const inbox = sums + row_tiles * most * 16;
    float* const scores = inbox + PARTS * stride;
    auto column = [&](int i) { return (part + i / DENSE_K * PARTS) * DENSE_K + i % DENSE_K; };
    x += (size_t)token * K;
    dependents_may_start();
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif

    uint4 raw[HELD][WEIGHT_PLANES * FRAGMENTS];
    auto tile_of = [&](int task) {
        return tiles + ((size_t)(task / own) * k_tiles + part + task % own * PARTS) * WEIGHT_PLANES * DENSE_PLANE;
    };
    auto load = [&](uint4 (&to)[WEIGHT_PLANES * FRAGMENTS], int task) {
        const unsigned char* tile = tile_of(task);
#pragma unroll
        for (int i = 0; i < WEIGHT_PLANES * FRAGMENTS; i++) to[i] = load_once(tile + (i * 32 + lane) * 16);
    };
#pragma unroll
    for (int h = 0; h < HELD; h++)
        if (warp + h * WARPS < tasks) load(raw[h], warp + h * WARPS);
#pragma unroll 1
    for (int task = warp + HELD * WARPS; task < tasks; task += WARPS) {
        const unsigned char* tile = tile_of(task);
#pragma unroll
        for (int p = 0; p < WEIGHT_PLANES; p++) prefetch(tile + p * DENSE_PLANE + lane * 64);
    }
    for (int i = threadIdx.x; i < own * DENSE_K; i += THREADS) columns[i] = column(i) < K ? norm[column(i)] : 0.0f;
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

    auto multiply = [&](const uint4 (&tile)[WEIGHT_PLANES * FRAGMENTS], int task) {
        const float4* values = reinterpret_cast<const float4*>(columns + task % own * DENSE_K);
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) {  // four columns of rows g and g + 8
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
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            low += __shfl_xor_sync(~0u, low, offset);
            high += __shfl_xor_sync(~0u, high, offset);
        }
        if (t == 0) sums[task * 16 + g] = low, sums[task * 16 + g + 8] = high;
    };
#pragma unroll 1
    for (int task = warp; task < tasks;) {
#pragma unroll
        for (int h = 0; h < HELD; h++, task += WARPS) {
            if (task >= tasks) break;
            multiply(raw[h], task);
            if (task + HELD * WARPS < tasks) load(raw[h], task + HELD * WARPS);
        }
    }
    __syncthreads();

    const float* parts = inbox;
    int first = part, step = PARTS;  // the tiles of columns that this block norms for the experts
    auto put = [&](float* to) {  // what this block has, as `to` has it for one part
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            float sum = 0.0f;
            for (int j = 0; j < own; j++) sum += sums[(e / 16 * own + j) * 16 + e % 16];
            to[e] = sum;
        }
    };
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    auto in_block = [](float* p, int rank) {
        float* remote;
        asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(p), "r"(rank));
        return remote;
    };
    put(in_block(inbox + part * stride, 0));
    if (threadIdx.x < PARTS) in_block(inbox + part * stride, threadIdx.x)[experts] = squares;
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const bool chooses = part == 0;
#else
    __shared__ int is_last;
    float* const all = partial + (size_t)token * PARTS * stride;
    put(all + part * stride);
    if (threadIdx.x == 0) all[part * stride + experts] = squares;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[token], 1) == PARTS - 1;
        if (is_last) tickets[token] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    parts = all, first = 0, step = 1;
    const bool chooses = true;
#endif
    float total = 0.0f;
#pragma unroll
    for (int p = 0; p < PARTS; p++) total += parts[p * stride + experts];
    const float mean = total / K;
    if (chooses) {
        for (int e = threadIdx.x; e < experts; e += THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (int p = 0; p < PARTS; p++) sum += parts[p * stride + e];
            scores[e] = sum * scores[e] / sqrtf(mean + eps) + scores[experts + e];
        }
        __syncthreads();
        if (warp == 0) {
            choose(rule, scores, ids + (size_t)token * top_k, weights + (size_t)token * top_k);
            return;
        }
    }
    const float scale = factor / sqrtf(mean + experts_eps);
    const int begin = chooses ? 32 : 0, threads = THREADS - begin;
    for (int i = threadIdx.x - begin; i < (k_tiles - first + step - 1) / step * DENSE_K; i += threads) {
        const int k = (first + i / DENSE_K * step) * DENSE_K + i % DENSE_K;
        if (k < K) normed_rows[(size_t)token * K + k] = __float2half_rn(x[k] * scale * experts_norm[k]);
    }
}
