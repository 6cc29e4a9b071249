// Linears with NVFP4 weights: E2M1 codes, an E4M3 scale for 16 of them, float32 scales per row in the epilogue.
//
// A tile is 16 rows x 128 columns in 1152 bytes: codes of rows 0..7 [lane][16 bytes], of rows 8..15 the same, then four
// scale bytes per lane (row g: two blocks, row g+8: two). Lane 4 * g + t owns columns 32t .. 32t+31, two scale blocks.
//
// Decoding is exact. E2M1's sign and three other bits at bits 15 and 11..9 of an fp16 are its value * 2^-14; an E4M3
// number shifted left by 7 is its value * 2^-8, and is made * 2^7 first, because then scale * code is exact in fp16 for
// every pair (their product has 6 significant bits and stays clear of the subnormals' end). 2^7 remains for the row.
#include "linear.cuh"

struct Nvfp4Tile {
    static constexpr int K = 128, BYTES = 1152, PLANES = 1;
    static constexpr bool BLOCK_SCALED = false;
    struct Raw { uint4 low, high; unsigned scales; };

    static __device__ __forceinline__ void load(Raw& raw, const unsigned char* tile, int lane) {
        raw.low = reinterpret_cast<const uint4*>(tile)[lane];
        raw.high = reinterpret_cast<const uint4*>(tile + 512)[lane];
        raw.scales = reinterpret_cast<const unsigned*>(tile + 1024)[lane];
    }
    static __device__ __forceinline__ void load_pair(Raw& raw, const unsigned char* tile, int lane, int pair) {
        if (pair == 0) load(raw, tile, lane);
    }

    // Scale `block` of a lane's four, in both halves, times 2^7.
    static __device__ __forceinline__ __half2 scale(const Raw& raw, int block) {
        return __hmul2(as_half2(__byte_perm(raw.scales, 0, 0x4040 + 0x0101 * block) << 7), as_half2(0x78007800u));
    }

    // The bit order in a word makes this 11 integer operations for 8 codes: see `arrange`.
    static __device__ __forceinline__ void spread(unsigned w, unsigned (&h)[4]) {
        h[0] = w & 0x8e008e00u;
        h[1] = (w << 3) & 0x8e008e00u;
        h[2] = ((w << 1) & 0x80008000u) | ((w << 6) & 0x0e000e00u);
        h[3] = ((w << 2) & 0x80008000u) | ((w << 9) & 0x0e000e00u);
    }

    // Eight codes in checkpoint order (nibble i is column i) to the order `spread` wants: columns 2p and 2p+1 in the
    // low and high half, their signs at bits 15, 12, 14, 13 and their other bits from bit 9, 6, 3, 0 for p = 0..3.
    static __device__ __forceinline__ unsigned arrange(unsigned codes) {
        const int sign[4] = {15, 12, 14, 13};
        unsigned w = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            unsigned code = codes >> (4 * i) & 15, p = i / 2, half = (i % 2) * 16;
            w |= (code >> 3) << (sign[p] + half) | (code & 7) << (9 - 3 * p + half);
        }
        return w;
    }

    template <int PLANE>
    static __device__ __forceinline__ void decode(const Raw& raw, int step, unsigned (&a)[2][4]) {
        const unsigned low[4] = {raw.low.x, raw.low.y, raw.low.z, raw.low.w};
        const unsigned high[4] = {raw.high.x, raw.high.y, raw.high.z, raw.high.w};
        unsigned h[4];
        spread(low[step], h);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i / 2][i % 2 * 2] = as_bits(__hmul2(as_half2(h[i]), scale(raw, step / 2)));
        spread(high[step], h);
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i / 2][i % 2 * 2 + 1] = as_bits(__hmul2(as_half2(h[i]), scale(raw, 2 + step / 2)));
    }

    static __device__ __forceinline__ float2 row_scale(const Raw&) { return make_float2(1.0f, 1.0f); }
    static __device__ __forceinline__ int position(int c) { return (c & 3) << 2 | c >> 2; }
};

LINEAR_ENTRIES(Nvfp4Tile)

#ifndef MANY_STAGES
// Rows as they lie in a checkpoint (codes [rows][K/2], scales [rows][K/16], from row `row` of the part) into tiles.
// One block per row. `largest`: the largest squared norm of a row, global scale left out.
extern "C" __global__ void repack(const unsigned char* codes, const unsigned char* scales, unsigned char* tiles,
                                  int row, int K, int first, int gated_part, unsigned* largest) {
    const int packed = packed_row(row + blockIdx.x, first, gated_part), k_tiles = (K + 127) / 128, blocks = K / 16;
    const uint2* source = reinterpret_cast<const uint2*>(codes + (size_t)blockIdx.x * (K / 2));
    scales += (size_t)blockIdx.x * blocks;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < k_tiles * 4; i += blockDim.x) {
        const int lane = packed % 8 * 4 + i % 4, high = packed % 16 / 8;
        unsigned char* tile = tiles + ((size_t)(packed / 16) * k_tiles + i / 4) * Nvfp4Tile::BYTES;
        unsigned words[4] = {}, bytes = 0;
#pragma unroll
        for (int b = 0; b < 2; b++) {
            if (2 * i + b >= blocks) continue;
            const uint2 pair = source[2 * i + b];
            const unsigned scale = scales[2 * i + b];
            words[2 * b] = Nvfp4Tile::arrange(pair.x);
            words[2 * b + 1] = Nvfp4Tile::arrange(pair.y);
            bytes |= scale << (8 * b);
            float part = 0.0f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                unsigned h[4];
                Nvfp4Tile::spread(words[2 * b + j], h);
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    float2 v = __half22float2(as_half2(h[p]));
                    part += v.x * v.x + v.y * v.y;
                }
            }
            const float s = __half2float(__ushort_as_half(scale << 7)) * 4194304.0f;  // scale: 2^8, code: 2^14
            sum += part * s * s;
        }
        *reinterpret_cast<uint4*>(tile + high * 512 + lane * 16) = make_uint4(words[0], words[1], words[2], words[3]);
        *reinterpret_cast<unsigned short*>(tile + 1024 + lane * 4 + high * 2) = bytes;
    }
    record_norm(sum, largest);
}
#endif
