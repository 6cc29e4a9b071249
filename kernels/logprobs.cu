// Log-probabilities of a row's chosen token and of its likeliest ones, from the logits as the model gave them.
//
// Every sum has one order, and every maximum breaks ties to the lowest id: the same logits give the same bits.
#include "vocabulary.cuh"

// The sum over the block, in one order, in every thread.
__device__ float block_sum(float mine) {
    __shared__ float partial[WARPS];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = partial[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
    return mine;
}

// grid R, block THREADS: out [R, 1 + 2 * top], as ops.Ops.logprobs says. top <= vocabulary. A thread holds the best
// two of its own ids: it seldom has to look through them again, as the likeliest few are rarely three in one thread.
extern "C" __global__ void __launch_bounds__(THREADS)
    logprobs(const float* __restrict__ logits, const int* __restrict__ ids, float* __restrict__ out, int vocabulary,
             int top) {
    logits += (size_t)blockIdx.x * vocabulary, out += (size_t)blockIdx.x * (1 + 2 * top);
    const int chosen = ids[blockIdx.x];
    const Best nobody{-infinity(), -1};
    Best first = nobody, second = nobody, taken{infinity(), -1};
    bool finite = true;
    auto look = [&] {  // for what comes after `taken`
        each_logit(logits, vocabulary, [&](int id, float logit) {
            finite = finite && fabsf(logit) <= INFINITE;
            const Best found{logit, id};
            if (!comes_before(taken, found)) return;
            second = better(second, comes_before(found, first) ? first : found);
            first = better(first, found);
        });
    };
    look();
    taken = block_best(first);
    const float largest = taken.score;
    float sum = 0;
    each_logit(logits, vocabulary, [&](int, float logit) { sum += expf(logit - largest); });
    const double log_sum = (double)largest + log((double)block_sum(sum));
    if (!__syncthreads_and(finite && chosen >= 0)) {
        if (threadIdx.x < 1 + 2 * top) out[threadIdx.x] = __int_as_float(0x7fffffff);
        return;
    }
    if (threadIdx.x == 0) out[0] = (float)(logits[chosen] - log_sum);
#pragma unroll 1
    for (int i = 0; i < top; i++) {
        if (threadIdx.x == 0) out[1 + i] = (float)taken.id, out[1 + top + i] = (float)(taken.score - log_sum);
        if (first.id == taken.id) {
            first = second, second = nobody;
            if (first.id < 0) look();
        }
        taken = block_best(first);
    }
}
