// RMSNorm (Zhang and Sennrich 2019) of a row by a whole block: the same bits in every kernel of as many threads.

// The sum over a warp, in all its lanes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

// The sum over a block of WARPS warps, in all its threads; call with all of them, once for each `shared` [WARPS].
template <int WARPS> __device__ __forceinline__ float block_sum(float value, float* shared) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += shared[i];
    return total;
}

// This warp's share of each row's sum of squares, in all its lanes. A row is d floats, or null. The rows' loads are
// under way at the same time; a row's result does not depend on the others.
template <int BLOCK, int ROWS>
__device__ __forceinline__ void warp_squares(float (&squares)[ROWS], const float* const (&rows)[ROWS], int d) {
    const int quads = d % 4 ? 0 : d / 4;  // rows of other sizes are not aligned to 16 bytes
#pragma unroll
    for (int r = 0; r < ROWS; r++) squares[r] = 0.0f;
#pragma unroll 2
    for (int i = threadIdx.x; i < quads; i += BLOCK) {
        float4 v[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            v[r] = rows[r] ? reinterpret_cast<const float4*>(rows[r])[i] : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            squares[r] = fmaf(v[r].x, v[r].x, fmaf(v[r].y, v[r].y, fmaf(v[r].z, v[r].z, fmaf(v[r].w, v[r].w,
                              squares[r]))));
    }
#pragma unroll 1
    for (int i = 4 * quads + threadIdx.x; i < d; i += BLOCK) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (rows[r]) squares[r] = fmaf(rows[r][i], rows[r][i], squares[r]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) squares[r] = warp_sum(squares[r]);
}

// What a row is divided by, from its warps' squares, `stride` apart.
template <int WARPS>
__device__ __forceinline__ float row_length(const float* squares, int stride, int d, float eps) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += squares[i * stride];
    return sqrtf(total / d + eps);
}

// Four neighbours to fp16.
__device__ __forceinline__ uint2 normed(float4 x, float scale, float4 weight) {
    return make_uint2(as_bits(__floats2half2_rn(x.x * scale * weight.x, x.y * scale * weight.y)),
                      as_bits(__floats2half2_rn(x.z * scale * weight.z, x.w * scale * weight.w)));
}
