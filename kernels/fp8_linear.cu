// Linears with FP8 (E4M3) weights: float32 scales per row in the epilogue, or per block of rows and 128 columns.
//
// A tile is 16 rows x 128 columns in 2048 bytes, [4][lane][16 bytes]: rows g, steps 0..1 and 2..3, then rows g+8 the
// same. With BLOCK_SCALES, 16 float32 follow, one for each row. In a step, lane 4 * g + t owns columns 8t .. 8t+7.
//
// Decoding is exact: E4M3's sign at bit 15 and its other bits at 13..7 of an fp16 are its value * 2^-8.
#include "linear.cuh"

struct Fp8Tile {
    static constexpr int K = 128, BYTES = BLOCK_SCALES ? 2112 : 2048, PLANES = 1;
    static constexpr bool BLOCK_SCALED = BLOCK_SCALES, FRAGMENTS = false;
    struct Raw { uint4 codes[4]; float2 scale; };

    template <class Source = Shared>
    static __device__ __forceinline__ void load(Raw& raw, const unsigned char* tile, int lane) {
        load_pair<Source>(raw, tile, lane, 0);
        load_pair<Source>(raw, tile, lane, 1);
    }
    template <class Source = Shared>
    static __device__ __forceinline__ void load_pair(Raw& raw, const unsigned char* tile, int lane, int pair) {
        raw.codes[pair] = Source::read(tile + (pair * 32 + lane) * 16);
        raw.codes[2 + pair] = Source::read(tile + ((2 + pair) * 32 + lane) * 16);
        load_scale(raw, tile, lane);
    }
    static __device__ __forceinline__ void load_scale(Raw& raw, const unsigned char* tile, int lane) {
        if constexpr (BLOCK_SCALED) {
            const float* scales = reinterpret_cast<const float*>(tile + 2048);
            raw.scale = make_float2(scales[lane / 4], scales[lane / 4 + 8]);
        }
    }

    static __device__ __forceinline__ float2 row_scale(const Raw& raw) { return raw.scale; }
    static __device__ __forceinline__ int position(int c) { return c; }

    // Four codes to two pairs: those of bytes 1 and 3 stand almost where they belong.
    static __device__ __forceinline__ void spread(unsigned w, unsigned& first, unsigned& second) {
        first = (w & 0x80008000u) | ((w >> 1) & 0x3f803f80u);
        second = ((w << 8) & 0x80008000u) | ((w << 7) & 0x3f803f80u);
    }
    static __device__ __forceinline__ unsigned arrange(unsigned codes) { return __byte_perm(codes, 0, 0x1302); }

    template <int PLANE>
    static __device__ __forceinline__ void decode(const Raw& raw, int step, unsigned (&a)[2][4]) {
        const uint4 low = raw.codes[step / 2], high = raw.codes[2 + step / 2];
        spread(step % 2 ? low.z : low.x, a[0][0], a[0][2]);
        spread(step % 2 ? low.w : low.y, a[1][0], a[1][2]);
        spread(step % 2 ? high.z : high.x, a[0][1], a[0][3]);
        spread(step % 2 ? high.w : high.y, a[1][1], a[1][3]);
    }
};

LINEAR_ENTRIES(Fp8Tile)

#ifdef FEW_WARPS
// Rows as they lie in a checkpoint (codes [experts][rows][K], from row `row` of the part) into the tiles of experts of
// row_tiles each. Scale (r / bn, k / bk) of a part is the (r / bn * columns + k / bk)-th of its scale_count. grid
// (rows, experts). largest [experts]: the largest squared norm of a row, scales included.
extern "C" __global__ void repack(const unsigned char* codes, const float* scales, unsigned char* tiles, int row, int K,
                                  int bn, int bk, int columns, int scale_count, int first, int gated_part,
                                  int row_tiles, unsigned* largest) {
    const int packed = packed_row(row + blockIdx.x, first, gated_part), k_tiles = (K + 127) / 128;
    const unsigned char* source = codes + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * K;
    scales += (size_t)blockIdx.y * scale_count + (size_t)((row + blockIdx.x) / bn) * columns;
    tiles += (size_t)blockIdx.y * row_tiles * k_tiles * Fp8Tile::BYTES;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < k_tiles * 16; i += blockDim.x) {  // 8 columns at a time: step i / 4, lane's t = i % 4
        const int high = packed % 16 / 8, lane = packed % 8 * 4 + i % 4, step = i % 16 / 4, k = i * 8;
        unsigned char* tile = tiles + ((size_t)(packed / 16) * k_tiles + i / 16) * Fp8Tile::BYTES;
        unsigned words[2] = {};
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (k + j < K) words[j / 4] |= (unsigned)source[k + j] << (j % 4 * 8);
        const float scale = k < K ? scales[k / bk] : 0.0f;
        float part = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const unsigned code = words[j / 4] >> (j % 4 * 8) & 0xff;
            const float s = BLOCK_SCALES || k + j >= K ? scale : scales[(k + j) / bk];
            const float v = (code & 0x7f) == 0x7f ? __int_as_float(0x7fc00000)  // NaN
                                                  : __half2float(__ushort_as_half((code & 0x7f) << 7)) * 256.0f * s;
            part += v * v;
        }
        sum += part;
        uint2* out = reinterpret_cast<uint2*>(tile + (high * 2 + step / 2) * 512 + lane * 16 + step % 2 * 8);
        *out = make_uint2(Fp8Tile::arrange(words[0]), Fp8Tile::arrange(words[1]));
        if (BLOCK_SCALES && i % 16 == 0) reinterpret_cast<float*>(tile + 2048)[packed % 16] = scale;
    }
    record_norm(sum, largest + blockIdx.y);
}
#endif
