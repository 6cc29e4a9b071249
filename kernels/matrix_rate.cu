// Multiplies what is on the chip already and does nothing else: the matrix rate that prefill can be measured against.
#include "mma.cuh"
#if WARPGROUPS
#include "wgmma.cuh"
#endif

// Halves of either sign between 0.5 and 2, all bits of their fractions in use: a chip that multiplies zeros draws less
// power, and so runs faster, than one that multiplies a model's numbers.
__device__ __forceinline__ unsigned two_halves(unsigned seed) {
    seed = (seed ^ seed >> 16) * 0x7feb352du;
    seed = (seed ^ seed >> 15) * 0x846ca68bu;
    return (seed ^ seed >> 16) & 0x87ff87ffu | 0x38003800u;
}

// Each warp multiplies 16 rows of PRODUCTS * 16 columns of fp16 by COLUMNS columns, `rounds` times, into float32 sums.
// WARPGROUPS (-D): 1, four warps together by warpgroup products, with the columns in shared memory; 0, each warp with
// its own columns in registers. A sum goes to `out` if it is what no sum is, so that the compiler leaves none out.
constexpr int PRODUCTS = 4;
#if WARPGROUPS
constexpr int THREADS = 256, COLUMNS = 128;
#else
constexpr int THREADS = 512, COLUMNS = 32;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply(int rounds, float* out) {
    unsigned a[PRODUCTS][4];
#pragma unroll
    for (int i = 0; i < PRODUCTS * 4; i++) a[i / 4][i % 4] = two_halves(threadIdx.x * 64 + i);
    float sums[COLUMNS / 2] = {};
#if WARPGROUPS
    __shared__ __align__(1024) unsigned columns[COLUMNS][32];  // 64 halves of each
    for (int i = threadIdx.x; i < COLUMNS * 32; i += THREADS) columns[i / 32][i % 32] = two_halves(~i);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    const unsigned long long b = swizzled_columns(shared_address(columns));
#pragma unroll 1
    for (int round = 0; round < rounds; round++) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) wgmma<COLUMNS>(sums, a[i], b + 2 * i, true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_settled(sums);
    }
#else
    unsigned b[2][COLUMNS / 8][2];
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) b[i % 2][i / 4][i / 2 % 2] = two_halves(~(threadIdx.x * 64 + i));
#pragma unroll 1
    for (int round = 0; round < rounds; round++)
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
                mma(reinterpret_cast<float(&)[4]>(sums[4 * n]), a[i], b[i % 2][n][0], b[i % 2][n][1]);
#endif
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++) total += sums[i];
    if (total == 1.0f / 3.0f) *out = total;
}
