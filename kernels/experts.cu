// What a mixture of experts needs around its linears: tokens grouped by expert, and the weighted sum of their outputs.
#include "mma.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

// The sum over the block's threads, in all of them; call with all threads, `shared` [WARPS].
__device__ __forceinline__ int block_sum(int value, int* shared) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) value += shared[w];
    return value;
}

// A counting sort of (token, slot) pairs by expert that keeps their order; block e places those of expert e.
// places[pair]: its place in the sorted order; rows[place]: pair / pairs_of_x, its row of the activations. blocks: for
// each block_size places or fewer of one expert below in_blocks, {expert, first place, end, 0}; the rest up to
// max_blocks is empty. ids outside 0 .. E-1 would belong to nobody. Dynamic shared memory: int [E].
extern "C" __global__ void __launch_bounds__(THREADS)
    group_by_expert(const int* ids, int pairs, int pairs_of_x, int in_blocks, int block_size, int max_blocks,
                    int* places, int* rows, int4* blocks) {
    extern __shared__ int counts[];
    __shared__ int partial[2][WARPS];
    const int expert = blockIdx.x, experts = gridDim.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    dependents_may_start();
    wait_for_predecessor();
    for (int e = threadIdx.x; e < experts; e += THREADS) counts[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < pairs; i += THREADS) atomicAdd(&counts[ids[i]], 1);  // whole numbers: any order
    __syncthreads();

    int before = 0, blocks_before = 0;
    auto blocks_of = [&](int e) { return e < in_blocks ? (counts[e] + block_size - 1) / block_size : 0; };
    for (int e = threadIdx.x; e < expert; e += THREADS) {
        before += counts[e];
        blocks_before += blocks_of(e);
    }
    const int first = block_sum(before, partial[0]), first_block = block_sum(blocks_before, partial[1]);
    const int end = first + counts[expert], end_block = first_block + blocks_of(expert);
    const int last = expert == experts - 1 ? max_blocks : end_block;
    for (int b = first_block + threadIdx.x; b < last; b += THREADS) {
        const int from = first + (b - first_block) * block_size;
        blocks[b] = b < end_block ? make_int4(expert, from, min(from + block_size, end), 0) : make_int4(0, 0, 0, 0);
    }

    __syncthreads();  // `partial` is used anew
    int place = first;
    for (int start = 0, turn = 0; start < pairs && place < end; start += THREADS, turn ^= 1) {
        const int pair = start + threadIdx.x;
        const bool mine = pair < pairs && ids[pair] == expert;
        const unsigned warp_mine = __ballot_sync(~0u, mine);
        if (lane == 0) partial[turn][warp] = __popc(warp_mine);
        __syncthreads();
        int own = place + __popc(warp_mine & ((1u << lane) - 1));
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) own += partial[turn][w];
            place += partial[turn][w];
        }
        if (mine) {
            places[pair] = own;
            rows[own] = pair / pairs_of_x;
        }
    }
}

__device__ __forceinline__ float as_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float as_float(float value) { return value; }

// out[token][n] = sum over its slots, in order, of shares[pair] * y[places[pair]][n], y times in_factor. Float added to
// what is there (add), or fp16 times out_factor. One block per token. Dynamic shared memory: float and int [slots].
template <class T>
__device__ __forceinline__ void sum_outputs(const T* y, const int* places, const float* shares, void* out, int slots,
                                            int N, int add, float in_factor, float out_factor) {
    extern __shared__ float weights[];
    int* const rows = reinterpret_cast<int*>(weights + slots);
    const size_t token = blockIdx.x;
    dependents_may_start();
    wait_for_predecessor();
    for (int s = threadIdx.x; s < slots; s += THREADS) {
        weights[s] = shares[token * slots + s] * in_factor;
        rows[s] = places[token * slots + s];
    }
    __syncthreads();
    for (int n = threadIdx.x; n < N; n += THREADS) {
        float sum = 0.0f;
        for (int s = 0; s < slots; s++) sum = fmaf(weights[s], as_float(y[(size_t)rows[s] * N + n]), sum);
        const size_t at = token * N + n;
        if (add) reinterpret_cast<float*>(out)[at] += sum;
        else reinterpret_cast<__half*>(out)[at] = __float2half_rn(sum * out_factor);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sum_slots(const __half* y, const int* places, const float* shares, void* out, int slots, int N, int add,
              float in_factor, float out_factor) {
    sum_outputs(y, places, shares, out, slots, N, add, in_factor, out_factor);
}

// With the bits of the kernel for a few tokens.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_float_slots(const float* y, const int* places, const float* shares, void* out, int slots, int N, int add,
                    float in_factor, float out_factor) {
    sum_outputs(y, places, shares, out, slots, N, add, in_factor, out_factor);
}

// y[r][k] = x[r / pairs_of_x][k] * scale[ids[pair]][k] * factor, fp16, one block per pair; r is places[pair], or the
// pair itself.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_pairs(const __half* x, const int* ids, const int* places, const float* scale, __half* y, int pairs_of_x,
                int K, float factor) {
    const int pair = blockIdx.x;
    dependents_may_start();
    wait_for_predecessor();
    const size_t row = places ? places[pair] : pair;
    scale += (size_t)ids[pair] * K;
    for (int k = threadIdx.x; k < K; k += THREADS)
        y[row * K + k] = __float2half_rn(__half2float(x[row / pairs_of_x * K + k]) * (scale[k] * factor));
}
