// Linears with NVFP4 weights: E2M1 codes, an E4M3 scale for 16 of them, float32 scales per row in the epilogue.
//
// A tile is 16 rows x 128 columns in 1152 bytes: the codes (fp4.cuh), then four scale bytes per lane (row g: two blocks,
// row g+8: two).
//
// Decoding is exact. A code is its value * 2^-14; an E4M3 number shifted left by 7 is its value * 2^-8, and is made * 2^7
// first, because then scale * code is exact in fp16 for every pair (their product has 6 significant bits and stays clear
// of the subnormals' end). 2^7 remains for the row.
#include "linear.cuh"
#include "fp4.cuh"

struct Nvfp4Tile : Fp4Codes {
    static constexpr int BYTES = CODE_BYTES + 128;
    struct Raw { uint4 low, high; unsigned scales; };

    template <class Source = Shared>
    static __device__ __forceinline__ void load(Raw& raw, const unsigned char* tile, int lane) {
        raw.low = Source::read(tile + lane * 16);
        raw.high = Source::read(tile + 512 + lane * 16);
        raw.scales = reinterpret_cast<const unsigned*>(tile + CODE_BYTES)[lane];
    }
    static __device__ __forceinline__ void load_pair(Raw& raw, const unsigned char* tile, int lane, int pair) {
        if (pair == 0) load(raw, tile, lane);
    }

    // Scale `block` of a lane's four, in both halves, times 2^7. Those of a row are made together.
    static __device__ __forceinline__ __half2 scale(const Raw& raw, int block) {
        const __half2 both = __hmul2(as_half2(__byte_perm(raw.scales, 0, block < 2 ? 0x4140 : 0x4342) << 7),
                                     as_half2(0x78007800u));
        return block % 2 ? __high2half2(both) : __low2half2(both);
    }

    template <int PLANE>
    static __device__ __forceinline__ void decode(const Raw& raw, int step, unsigned (&a)[2][4]) {
        scaled(word(raw.low, step), scale(raw, step / 2), word(raw.high, step), scale(raw, 2 + step / 2), a);
    }

    static __device__ __forceinline__ float2 row_scale(const Raw&) { return make_float2(1.0f, 1.0f); }
};

LINEAR_ENTRIES(Nvfp4Tile)

#ifdef FEW_WARPS
// Rows as they lie in a checkpoint (codes [experts][rows][K/2], scales [experts][rows][K/16], from row `row` of the part)
// into the tiles of experts of row_tiles each. grid (rows, experts). largest [experts]: the largest squared norm of a
// row, global scale left out.
extern "C" __global__ void repack(const unsigned char* codes, const unsigned char* scales, unsigned char* tiles,
                                  int row, int K, int first, int gated_part, int row_tiles, unsigned* largest) {
    const int packed = packed_row(row + blockIdx.x, first, gated_part), k_tiles = (K + 127) / 128, blocks = K / 16;
    const size_t from = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    const uint2* source = reinterpret_cast<const uint2*>(codes + from * (K / 2));
    scales += from * blocks;
    tiles += (size_t)blockIdx.y * row_tiles * k_tiles * Nvfp4Tile::BYTES;
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
            const float s = __half2float(__ushort_as_half(scale << 7)) * 4194304.0f;  // scale: 2^8, code: 2^14
            sum += (Nvfp4Tile::squares(words[2 * b]) + Nvfp4Tile::squares(words[2 * b + 1])) * s * s;
        }
        *reinterpret_cast<uint4*>(tile + high * 512 + lane * 16) = make_uint4(words[0], words[1], words[2], words[3]);
        *reinterpret_cast<unsigned short*>(tile + Nvfp4Tile::CODE_BYTES + lane * 4 + high * 2) = bytes;
    }
    record_norm(sum, largest + blockIdx.y);
}
#endif
