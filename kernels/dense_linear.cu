// Linears with BF16, F16 (WEIGHT_PLANES = 1) and F32 (2) weights, held as fp16 times a power of two per row.
#include "dense.cuh"
#include "linear.cuh"

struct DenseTile {
    static constexpr int K = DENSE_K, PLANES = WEIGHT_PLANES, BYTES = DENSE_PLANE * PLANES;
    static constexpr bool BLOCK_SCALED = false, FRAGMENTS = true;
    struct Raw { uint4 a[4 * PLANES]; };

    template <class Source = Shared>
    static __device__ __forceinline__ void load(Raw& raw, const unsigned char* tile, int lane) {
#pragma unroll
        for (int i = 0; i < 4 * PLANES; i++) raw.a[i] = Source::read(tile + (i * 32 + lane) * 16);
    }
    static __device__ __forceinline__ void load_pair(Raw& raw, const unsigned char* tile, int lane, int) {
        load(raw, tile, lane);
    }

    template <int PLANE>
    static __device__ __forceinline__ void decode(const Raw& raw, int step, unsigned (&a)[2][4]) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint4 v = raw.a[PLANE * 4 + 2 * step + m];
            a[m][0] = v.x; a[m][1] = v.y; a[m][2] = v.z; a[m][3] = v.w;
        }
    }

    static __device__ __forceinline__ float2 row_scale(const Raw&) { return make_float2(1.0f, 1.0f); }
    static __device__ __forceinline__ int position(int c) { return c; }
};

LINEAR_ENTRIES(DenseTile)

#ifdef FEW_WARPS
enum Source { BF16 = 0, F16 = 1, F32 = 2 };

// Rows as they lie in a checkpoint ([experts][rows][K] of `source`, from row `row` of the part) into the tiles of
// experts of row_tiles each, scaled so that the largest value of a row lies in [2^14, 2^15). grid (rows, experts).
// largest [experts]: the largest squared norm of a row.
extern "C" __global__ void repack(const void* data, int source, unsigned char* tiles, int row, int K, int first,
                                  int gated_part, int row_tiles, float* row_scale, unsigned* largest) {
    __shared__ float warps[32];
    const int packed = packed_row(row + blockIdx.x, first, gated_part), k_tiles = (K + DENSE_K - 1) / DENSE_K;
    const size_t start = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * K;
    tiles += (size_t)blockIdx.y * row_tiles * k_tiles * DenseTile::BYTES;
    auto value = [&](int k) {
        if (k >= K) return 0.0f;
        if (source == F32) return reinterpret_cast<const float*>(data)[start + k];
        const unsigned bits = reinterpret_cast<const unsigned short*>(data)[start + k];
        return source == BF16 ? __uint_as_float(bits << 16) : __half2float(__ushort_as_half(bits));
    };

    float most = 0.0f;
    for (int k = threadIdx.x; k < K; k += blockDim.x) most = fmaxf(most, fabsf(value(k)));
#pragma unroll
    for (int offset = 16; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
    __syncthreads();
    for (int w = 0; w < blockDim.x / 32; w++) most = fmaxf(most, warps[w]);
    const int exponent = max((int)(__float_as_uint(most) >> 23) - 127, -100);  // a zero row is as good as any small one
    const float up = __uint_as_float((127 + 14 - exponent) << 23), down = __uint_as_float((127 - 14 + exponent) << 23);

    float sum = 0.0f;
    for (int k = threadIdx.x * 2; k < k_tiles * DENSE_K; k += blockDim.x * 2) {
        const float v[2] = {value(k), value(k + 1)};
        sum += v[0] * v[0] + v[1] * v[1];
        unsigned char* at = tiles + dense_offset(packed, k, k_tiles, WEIGHT_PLANES);
        const __half2 high = __floats2half2_rn(v[0] * up, v[1] * up);
        *reinterpret_cast<__half2*>(at) = high;
        if (WEIGHT_PLANES == 2) {
            const float2 h = __half22float2(high);
            *reinterpret_cast<__half2*>(at + DENSE_PLANE) = __floats2half2_rn(v[0] * up - h.x, v[1] * up - h.y);
        }
    }
    if (threadIdx.x == 0) row_scale[(size_t)blockIdx.y * row_tiles * 16 + packed] = down;
    record_norm(sum, largest + blockIdx.y);
}
#endif
