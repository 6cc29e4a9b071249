// A router's logits to each token's experts and their weights: scores, groups, the best k, normalised.
#include "mma.cuh"

// The best of a warp's candidates: the larger value, then the lower index. A NaN is never chosen.
__device__ __forceinline__ void better(float& value, int& index, float other, int at) {
    if (other > value || (other == value && at < index)) value = other, index = at;
}
__device__ __forceinline__ void best_of_warp(float& value, int& index) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) {
        const float other = __shfl_xor_sync(~0u, value, offset);
        const int at = __shfl_xor_sync(~0u, index, offset);
        better(value, index, other, at);
    }
}

// One warp per token. logits [T][E]; ids, weights [T][top_k]. Dynamic shared memory: float scores [E], ranked [E],
// group values [groups]. correction, expert_scale [E] or null. All sums in a fixed order.
extern "C" __global__ void __launch_bounds__(32)
    route(const float* logits, const float* correction, const float* expert_scale, int* ids, float* weights,
          int experts, int top_k, int sigmoid, int normalize, float scaling, int groups, int groups_kept) {
    extern __shared__ float scores[];
    float *const ranked = scores + experts, *const best_two = ranked + experts;
    const int lane = threadIdx.x;
    const float infinity = __int_as_float(0x7f800000), nan = __int_as_float(0x7fffffff);
    dependents_may_start();
    wait_for_predecessor();
    logits += (size_t)blockIdx.x * experts;
    ids += (size_t)blockIdx.x * top_k, weights += (size_t)blockIdx.x * top_k;

    float most = -infinity, sum = 0.0f;
    if (!sigmoid) {
        for (int e = lane; e < experts; e += 32) most = fmaxf(most, logits[e]);
#pragma unroll
        for (int offset = 16; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    }
    for (int e = lane; e < experts; e += 32) {
        scores[e] = sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - most);
        sum += scores[e];
    }
    if (!sigmoid) {
#pragma unroll
        for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    }
    for (int e = lane; e < experts; e += 32) {
        if (!sigmoid) scores[e] /= sum;
        ranked[e] = correction ? scores[e] + correction[e] : scores[e];
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
            if (ahead >= groups_kept) ranked[e] = -infinity;
        }
        __syncwarp();
    }

    float total = 0.0f;
    for (int slot = 0; slot < top_k; slot++) {
        float value = -infinity;
        int index = experts;
        for (int e = lane; e < experts; e += 32) better(value, index, ranked[e], e);
        best_of_warp(value, index);
        const bool found = index < experts;  // not where logits are NaN: any expert, and a weight that shows it
        const float weight = found ? scores[index] : nan;
        total += weight;
        if (lane == 0) {
            ids[slot] = found ? index : 0;
            weights[slot] = weight;
            if (found) ranked[index] = nan;
        }
        __syncwarp();
    }
    for (int slot = lane; slot < top_k; slot += 32) {
        float weight = weights[slot];
        if (normalize) weight /= total + 1e-20f;
        weight *= scaling;
        weights[slot] = expert_scale ? weight * expert_scale[ids[slot]] : weight;
    }
}
