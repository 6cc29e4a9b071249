// Activations to and from the order of warpgroup products (order.cuh).
#include "mma.cuh"
#include "order.cuh"

// 8 activations from column k of a row of K, zero past the end. `aligned`: K % 8 == 0.
__device__ __forceinline__ uint4 eight(const __half* row, int k, int K, bool aligned) {
    if (aligned) return k < K ? *reinterpret_cast<const uint4*>(row + k) : make_uint4(0, 0, 0, 0);
    __half values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = k + i < K ? row[k + i] : __float2half_rn(0.0f);
    return *reinterpret_cast<const uint4*>(values);
}

// A step of 32 columns of one token, by each thread; four neighbouring threads take the steps of two slabs.
__device__ __forceinline__ void order_step(const __half* row, uint4* y, int token, int swizzle, int padded, int K,
                                           int slabs, bool interleaved) {
    const int step = threadIdx.x % 4, slab = blockIdx.x * 2 + step / 2;
    const bool aligned = K % 8 == 0;
    if (slab >= slabs) return;
    const int first = blockIdx.x * 128 + step * (interleaved ? 8 : 32), apart = interleaved ? 32 : 8;
    uint4 lanes[4];
#pragma unroll
    for (int t = 0; t < 4; t++) lanes[t] = eight(row, first + t * apart, K, aligned);
    uint4* const to = y + ((size_t)slab * padded + token) * 8;
    const int chunk = step % 2 * 4;
    to[chunk ^ swizzle] = make_uint4(lanes[0].x, lanes[1].x, lanes[2].x, lanes[3].x);
    to[chunk + 1 ^ swizzle] = make_uint4(lanes[0].y, lanes[1].y, lanes[2].y, lanes[3].y);
    to[chunk + 2 ^ swizzle] = make_uint4(lanes[0].z, lanes[1].z, lanes[2].z, lanes[3].z);
    to[chunk + 3 ^ swizzle] = make_uint4(lanes[0].w, lanes[1].w, lanes[2].w, lanes[3].w);
}

// x [tokens][K] to y [slabs][padded][64]; columns past K become zero, tokens past the last stay what they are. slabs is
// even where tiles are interleaved. Grid: (ceil(slabs / 2), ceil(tokens / 64)).
extern "C" __global__ void __launch_bounds__(256)
    order(const __half* x, uint4* y, int tokens, int padded, int K, int slabs, int interleaved) {
    const int token = blockIdx.y * 64 + threadIdx.x / 4;
    dependents_may_start();
    wait_for_predecessor();
    if (token < tokens) order_step(x + (size_t)token * K, y, token, token % 8, padded, K, slabs, interleaved);
}

// The same for pairs grouped by expert: blocks of them {expert, first, end} as experts.cu makes them, each swizzled
// from its first one. Pair i is of row rows[i] of x, or (rows null) of row i. Grid: (ceil(slabs / 2), blocks, parts of
// 64 pairs).
extern "C" __global__ void __launch_bounds__(256)
    order_experts(const __half* x, const int* rows, const int4* blocks, uint4* y, int padded, int K, int slabs,
                  int interleaved) {
    dependents_may_start();
    wait_for_predecessor();
    const int4 block = blocks[blockIdx.y];
    const int number = blockIdx.z * 64 + threadIdx.x / 4, pair = block.y + number;
    if (pair < block.z)
        order_step(x + (size_t)(rows ? rows[pair] : pair) * K, y, pair, number % 8, padded, K, slabs, interleaved);
}
