// Linears with MXFP4 weights: E2M1 codes, a power of two (E8M0) for 32 of them, one power of two per row at the end.
//
// A tile is 16 rows x 128 columns in 1088 bytes: the codes (fp4.cuh), then two scale bytes per lane, of row g and of
// row g+8: a lane's 32 columns are one scale block.
//
// E8M0 reaches from 2^-127 to 2^127 and fp16 does not, so a row's scales are taken relative to its largest, of a block
// that is not all zero. That one becomes 2^15, byte 30, the exponent field of an fp16; a code is its value * 2^-14, so
// the row's weights are at most 12 and nothing can overflow. A scale down to 2^-24 of the largest loses nothing: its
// smallest weight is 2^-24, the end of fp16's subnormals. Of smaller ones (byte 0 is zero) a weight is off by 2^-25 at
// most, and the row's largest weight is at least 1: that is less than the rounding of its product in float32.
#include "linear.cuh"
#include "fp4.cuh"

struct Mxfp4Tile : Fp4Codes {
    static constexpr int BYTES = CODE_BYTES + 64, TOP = 30;  // TOP: the byte of a row's largest scale
    struct Raw { uint4 low, high; unsigned scales; };

    template <class Source = Shared>
    static __device__ __forceinline__ void load(Raw& raw, const unsigned char* tile, int lane) {
        raw.low = Source::read(tile + lane * 16);
        raw.high = Source::read(tile + 512 + lane * 16);
        raw.scales = reinterpret_cast<const unsigned short*>(tile + CODE_BYTES)[lane];
    }
    static __device__ __forceinline__ void load_pair(Raw& raw, const unsigned char* tile, int lane, int pair) {
        if (pair == 0) load(raw, tile, lane);
    }

    template <int PLANE>
    static __device__ __forceinline__ void decode(const Raw& raw, int step, unsigned (&a)[2][4]) {
        scaled(word(raw.low, step), as_half2((raw.scales & 0xff) * 0x04000400u),
               word(raw.high, step), as_half2((raw.scales >> 8) * 0x04000400u), a);
    }

    static __device__ __forceinline__ float2 row_scale(const Raw&) { return make_float2(1.0f, 1.0f); }
};

LINEAR_ENTRIES(Mxfp4Tile)

#ifdef FEW_WARPS
// 2^exponent, from -149 up: the smallest ones are subnormal.
__device__ __forceinline__ float power_of_two(int exponent) {
    return exponent < -126 ? __uint_as_float(exponent < -149 ? 0 : 1u << (exponent + 149))
                           : __uint_as_float((unsigned)(exponent + 127) << 23);
}

// Rows as they lie in a checkpoint (codes [experts][rows][K/2], scales [experts][rows][K/32], from row `row` of the part)
// into the tiles of experts of row_tiles each. grid (rows, experts). largest [experts]: the largest squared norm of a row.
extern "C" __global__ void repack(const uint4* codes, const unsigned char* scales, unsigned char* tiles, int row, int K,
                                  int first, int gated_part, int row_tiles, float* row_scale, unsigned* largest) {
    __shared__ int warps[32];
    const int packed = packed_row(row + blockIdx.x, first, gated_part), k_tiles = (K + 127) / 128, blocks = K / 32;
    const size_t from = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    codes += from * blocks;
    scales += from * blocks;
    tiles += (size_t)blockIdx.y * row_tiles * k_tiles * Mxfp4Tile::BYTES;

    int top = -1;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
        const uint4 c = codes[i];
        if ((c.x | c.y | c.z | c.w) & 0x77777777u) top = max(top, (int)scales[i]);
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, offset));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
    __syncthreads();
    for (int w = 0; w < blockDim.x / 32; w++) top = max(top, warps[w]);
    if (top < 0) top = 127;  // a zero row

    float sum = 0.0f;  // in units of the tile's values
    for (int i = threadIdx.x; i < k_tiles * 4; i += blockDim.x) {
        const int lane = packed % 8 * 4 + i % 4, high = packed % 16 / 8;
        unsigned char* tile = tiles + ((size_t)(packed / 16) * k_tiles + i / 4) * Mxfp4Tile::BYTES;
        uint4 words = make_uint4(0, 0, 0, 0);
        int byte = 0;
        if (i < blocks) {
            const uint4 c = codes[i];
            words = make_uint4(Mxfp4Tile::arrange(c.x), Mxfp4Tile::arrange(c.y), Mxfp4Tile::arrange(c.z),
                               Mxfp4Tile::arrange(c.w));
            // All zero blocks may have any scale, the row's largest at most.
            byte = max(0, min((int)scales[i], top) - top + Mxfp4Tile::TOP);
            const float s = power_of_two(byte - 15), part = Mxfp4Tile::squares(words.x) + Mxfp4Tile::squares(words.y) +
                                                            Mxfp4Tile::squares(words.z) + Mxfp4Tile::squares(words.w);
            sum += scales[i] == 255 ? __int_as_float(0x7fc00000) : part * s * s;  // NaN
        }
        *reinterpret_cast<uint4*>(tile + high * 512 + lane * 16) = words;
        tile[Mxfp4Tile::CODE_BYTES + lane * 2 + high] = byte;
    }
    const float down = power_of_two(top - 127 + 14 - (Mxfp4Tile::TOP - 15));
    if (threadIdx.x == 0) row_scale[(size_t)blockIdx.y * row_tiles * 16 + packed] = down;
    record_norm(sum * down * down, largest + blockIdx.y);
}
#endif
