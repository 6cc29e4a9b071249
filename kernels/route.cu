// A router's logits to each token's experts and their weights: scores, groups, the best k, normalised; for few tokens
// in one launch with the router and the RMSNorm in front of it.
#include "mma.cuh"
#include "dense.cuh"
#include "norm.cuh"

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int TOKENS = WARPS;  // of a block of `route_few`: a warp chooses for each

struct Rule {
    const float* correction;    // [experts] or null
    const float* expert_scale;  // [experts] or null
    int experts, top_k, sigmoid, normalize;
    float scaling;
    int groups, groups_kept;

    __device__ __forceinline__ int shared_words() const { return 2 * experts + groups + top_k; }
};

// The order of floats as that of whole numbers; 0 is a NaN, which is below all.
__device__ __forceinline__ unsigned ordered(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
    return isnan(x) ? 0 : bits >> 31 ? ~bits : bits | 0x80000000u;
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
// order; of equal scores the lowest index; a NaN is never chosen.
__device__ __forceinline__ void choose(const Rule& rule, float* shared, int* ids, float* weights) {
    const int experts = rule.experts, groups = rule.groups, lane = threadIdx.x % 32;
    float *const scores = shared, *const ranked = scores + experts, *const best_two = ranked + experts;
    int* const chosen = reinterpret_cast<int*>(best_two + groups);
    const float infinity = __int_as_float(0x7f800000), nan = __int_as_float(0x7fffffff);

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

    unsigned best = 0;  // of this lane's own, and where
    int at = 0;
    auto look = [&]() {
        best = 0;
        for (int e = lane; e < experts; e += 32)
            if (const unsigned one = ordered(ranked[e]); one > best) best = one, at = e;
    };
    look();
    float total = 0.0f;
    for (int slot = 0; slot < rule.top_k; slot++) {
        const unsigned top = warp_max(best);
        const int index = top ? ~warp_max(best == top ? ~at : 0) : -1;  // none is left where logits are NaN
        total += index < 0 ? nan : scores[index];
        if (lane == 0) chosen[slot] = index;
        if (index >= 0 && index % 32 == lane) ranked[index] = nan, look();
    }
    __syncwarp();
    for (int slot = lane; slot < rule.top_k; slot += 32) {
        float weight = chosen[slot] < 0 ? nan : scores[chosen[slot]];  // any expert, and a weight that shows it
        const int expert = max(chosen[slot], 0);
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
    extern __shared__ float shared[];
    const Rule rule = RULE;
    dependents_may_start();
    wait_for_predecessor();
    for (int e = threadIdx.x; e < experts; e += 32) shared[e] = logits[(size_t)blockIdx.x * experts + e];
    choose(rule, shared, ids + (size_t)blockIdx.x * top_k, weights + (size_t)blockIdx.x * top_k);
}

// 8 floats of a row of K from column k, zero past the end. `aligned`: K % 8 == 0.
__device__ __forceinline__ void eight(float (&values)[8], const float* row, int k, int K, bool aligned) {
    if (aligned) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 v = k < K ? reinterpret_cast<const float4*>(row + k)[i] : make_float4(0, 0, 0, 0);
            values[4 * i] = v.x, values[4 * i + 1] = v.y, values[4 * i + 2] = v.z, values[4 * i + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = k + i < K ? row[k + i] : 0.0f;
    }
}

// Few tokens: x float32 [T][K] -> norm -> router -> choice. The router's tiles are spread over the chip, one for each
// warp, and are read before the predecessor is done. A block sums 16 experts' products with WARPS tiles of x * norm for
// TOKENS tokens and writes them to `partial`, [T][splits][row_tiles * 16 + 4], the squares of x behind them; which of a
// token's blocks is done last (tickets [T / TOKENS], zero before and after) divides by the row's length and chooses. So
// no block reads whole rows. A token's result depends on nothing but its own row.
//
// grid (row_tiles * splits + min(T, TOKENS), T / TOKENS rounded up); the blocks past row_tiles * splits norm a token
// each, as the experts take it: fp16 `normed_rows` [T][K], times factor. Dynamic shared memory: TOKENS times Rule::shared_words.
extern "C" __global__ void __launch_bounds__(THREADS)
    route_few(const float* x, int tokens, int K, const float* __restrict__ norm, float eps,
              const float* __restrict__ experts_norm, float experts_eps, float factor, __half* normed_rows,
              const unsigned char* __restrict__ tiles, const float* __restrict__ row_scale,
              const float* __restrict__ bias, int row_tiles, int splits, float* partial, int* tickets, int* ids,
              float* weights, RULE_PARAMETERS) {
    constexpr int STEPS = DENSE_K / 32, FRAGMENTS = 2 * STEPS, AT_ONCE = 12;
    constexpr int SUMS = 17;  // of a token in a block: 16 experts, and the squares
    extern __shared__ float shared[];
    __shared__ float sums[WARPS][TOKENS][SUMS];
    __shared__ int is_last;
    const Rule rule = RULE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * TOKENS, count = min(TOKENS, tokens - first), routing = row_tiles * splits;
    const int stride = row_tiles * 16 + 4;
    dependents_may_start();
    if (blockIdx.x >= routing) {
        wait_for_predecessor();
        const int token = first + blockIdx.x - routing;
        __half* const y = normed_rows + (size_t)token * K;
        if (token < tokens)
            norm_row<THREADS>(x + (size_t)token * K, experts_norm, y, K, experts_eps, factor, sums[0][0],
                              [&](int i, uint2 four) { reinterpret_cast<uint2*>(y)[i] = four; });
        return;
    }

    const int row_tile = blockIdx.x % row_tiles, split = blockIdx.x / row_tiles, kt = split * WARPS + warp;
    const int k_tiles = (K + DENSE_K - 1) / DENSE_K, k = kt * DENSE_K + 8 * t;
    const bool aligned = K % 8 == 0, mine = kt < k_tiles;
    uint4 raw[WEIGHT_PLANES][FRAGMENTS];
    float scale[STEPS][8];
    const size_t at = (size_t)row_tile * k_tiles + min(kt, k_tiles - 1);
    const unsigned char* tile = tiles + at * WEIGHT_PLANES * DENSE_PLANE;
#pragma unroll
    for (int p = 0; p < WEIGHT_PLANES; p++)
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) raw[p][i] = load_once(tile + p * DENSE_PLANE + (i * 32 + lane) * 16);
#pragma unroll
    for (int step = 0; step < STEPS; step++) eight(scale[step], norm, k + 32 * step, K, aligned);
    const int item = threadIdx.x / SUMS, row = threadIdx.x % SUMS;  // what this thread adds up: a token, an expert
    const float unit = row < 16 ? row_scale[row_tile * 16 + row] : 1.0f;
    if (blockIdx.x == 0)
        for (int e = threadIdx.x * 32; e < experts; e += THREADS * 32) {
            if (bias) prefetch(bias + e);
            if (correction) prefetch(correction + e);
            if (expert_scale) prefetch(expert_scale + e);
        }
    wait_for_predecessor();

    float low[TOKENS] = {}, high[TOKENS] = {}, squares[TOKENS] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        float rows[TOKENS][8];
#pragma unroll
        for (int token = 0; token < TOKENS; token++)
            if (token < count)
                eight(rows[token], x + (size_t)(first + token) * K, mine ? k + 32 * step : K, K, aligned);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            float w[2][4] = {};  // of rows g and g + 8, columns 4m .. 4m + 3
#pragma unroll
            for (int p = 0; p < WEIGHT_PLANES; p++) {
                const uint4 v = raw[p][2 * step + m];
                const unsigned halves[2][2] = {{v.x, v.z}, {v.y, v.w}};
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int q = 0; q < 2; q++) {
                        const float2 two = __half22float2(as_half2(halves[r][q]));
                        w[r][2 * q] += two.x, w[r][2 * q + 1] += two.y;
                    }
            }
#pragma unroll
            for (int token = 0; token < TOKENS; token++)
                if (token < count)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float own = rows[token][4 * m + i], value = own * scale[step][4 * m + i];
                        low[token] = fmaf(w[0][i], value, low[token]);
                        high[token] = fmaf(w[1][i], value, high[token]);
                        squares[token] = fmaf(own, own, squares[token]);
                    }
        }
    }
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
        if (token >= count) break;
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            low[token] += __shfl_xor_sync(~0u, low[token], offset);
            high[token] += __shfl_xor_sync(~0u, high[token], offset);
            squares[token] += __shfl_xor_sync(~0u, squares[token], offset);
        }
        if (t == 0) sums[warp][token][g] = low[token], sums[warp][token][g + 8] = high[token];
        if (lane == 0) sums[warp][token][16] = squares[token];
    }
    __syncthreads();
    if (item < count) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][item][row];
        float* to = partial + ((size_t)(first + item) * splits + split) * stride;
        if (row < 16) to[row_tile * 16 + row] = sum * unit;
        else if (row_tile == 0) to[row_tiles * 16] = sum;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&tickets[blockIdx.y], 1) == routing - 1;
        if (is_last) tickets[blockIdx.y] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();

    for (int i = threadIdx.x; i < count * experts; i += THREADS) {
        const int token = i / experts, e = i % experts;
        const float* from = partial + (size_t)(first + token) * splits * stride;
        float sum = 0.0f, total = 0.0f;
        for (int base = 0; base < splits; base += AT_ONCE) {
            float products[AT_ONCE], squared[AT_ONCE];
#pragma unroll
            for (int s = 0; s < AT_ONCE; s++) {
                const float* one = from + (base + s) * stride;
                products[s] = base + s < splits ? __ldcg(one + e) : 0.0f;
                squared[s] = base + s < splits ? __ldcg(one + row_tiles * 16) : 0.0f;
            }
#pragma unroll
            for (int s = 0; s < AT_ONCE; s++) sum += products[s], total += squared[s];
        }
        shared[token * rule.shared_words() + e] = sum / sqrtf(total / K + eps) + (bias ? bias[e] : 0.0f);
    }
    __syncthreads();
    if (warp < count)
        choose(rule, shared + warp * rule.shared_words(), ids + (size_t)(first + warp) * top_k,
               weights + (size_t)(first + warp) * top_k);
}
