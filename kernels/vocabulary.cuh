// A block's walk over one row of logits, and the largest of what its threads have found.

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr float INFINITE = 3.402823466e38f;  // the largest that is finite
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

struct Best {
    float score;
    int id;  // -1, the largest as unsigned, is nobody's: any id with the same score comes before it
};

__device__ __forceinline__ bool comes_before(Best a, Best b) {
    return a.score > b.score || (a.score == b.score && (unsigned)a.id < (unsigned)b.id);
}
__device__ __forceinline__ Best better(Best a, Best b) { return comes_before(b, a) ? b : a; }

// The larger score over the block, in every thread.
__device__ Best block_best(Best mine) {
    __shared__ Best best[WARPS];
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        mine = better(mine,
                      Best{__shfl_xor_sync(~0u, mine.score, offset), __shfl_xor_sync(~0u, mine.id, offset)});
    __syncthreads();
    if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = best[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset; offset /= 2)
        mine = better(mine,
                      Best{__shfl_xor_sync(~0u, mine.score, offset), __shfl_xor_sync(~0u, mine.id, offset)});
    return mine;
}

// visit(id, logit) for every id, each thread those of its own place modulo THREADS, with eight loads on the way.
template <class Visit>
__device__ __forceinline__ void each_logit(const float* logits, int vocabulary, Visit visit) {
    constexpr int AHEAD = 8;
    for (int first = threadIdx.x; first < vocabulary; first += AHEAD * THREADS) {
        float x[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            x[i] = first + i * THREADS < vocabulary ? logits[first + i * THREADS] : 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (first + i * THREADS < vocabulary) visit(first + i * THREADS, x[i]);
    }
}
