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

// x [tokens][K] to y [slabs][padded][64]; columns past K become zero, tokens past the last stay what they are. slabs is
// even where tiles are interleaved. Each thread takes a step of 32 columns. Grid: (ceil(slabs / 2), token blocks); four
// neighbouring threads take the steps of two slabs.
extern "C" __global__ void __launch_bounds__(256)
    order(const __half* x, uint4* y, int tokens, int padded, int K, int slabs, int interleaved) {
    const int step = threadIdx.x % 4, token = blockIdx.y * 64 + threadIdx.x / 4, slab = blockIdx.x * 2 + step / 2;
    const bool aligned = K % 8 == 0;
    dependents_may_start();
    wait_for_predecessor();
    if (token >= tokens || slab >= slabs) return;
    const __half* row = x + (size_t)token * K;
    const int first = blockIdx.x * 128 + step * (interleaved ? 8 : 32), apart = interleaved ? 32 : 8;
    uint4 lanes[4];
#pragma unroll
    for (int t = 0; t < 4; t++) lanes[t] = eight(row, first + t * apart, K, aligned);
    uint4* const to = y + ((size_t)slab * padded + token) * 8;
    const int chunk = step % 2 * 4, swizzle = token % 8;
    to[chunk ^ swizzle] = make_uint4(lanes[0].x, lanes[1].x, lanes[2].x, lanes[3].x);
    to[chunk + 1 ^ swizzle] = make_uint4(lanes[0].y, lanes[1].y, lanes[2].y, lanes[3].y);
    to[chunk + 2 ^ swizzle] = make_uint4(lanes[0].z, lanes[1].z, lanes[2].z, lanes[3].z);
    to[chunk + 3 ^ swizzle] = make_uint4(lanes[0].w, lanes[1].w, lanes[2].w, lanes[3].w);
}
