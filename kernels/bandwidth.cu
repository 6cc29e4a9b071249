// Reads memory and does nothing else: the bandwidth that decode can be measured against.
#include "mma.cuh"

// Every 16 bytes of `data` once, four loads on the way per thread; the sum keeps the compiler from leaving them out.
extern "C" __global__ void __launch_bounds__(512) read_stream(const uint4* data, int count, unsigned* out) {
    unsigned sum = 0;
    const int stride = gridDim.x * blockDim.x;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            v[j] = i + j * stride < count ? load_once(data + i + j * stride) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 4; j++) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (sum == 0x9e3779b9u) *out = sum;
}
