// E2M1 codes in tiles of 16 rows x 128 columns: how they lie and how they become fp16, for every 4-bit format.
//
// A tile begins with 1024 bytes of codes: those of rows 0..7 [lane][16 bytes], of rows 8..15 the same. Lane 4 * g + t
// owns columns 32t .. 32t+31. E2M1's sign and three other bits at bits 15 and 11..9 of an fp16 are its value * 2^-14.

struct Fp4Codes {
    static constexpr int K = 128, PLANES = 1, CODE_BYTES = 1024;
    static constexpr bool BLOCK_SCALED = false, FRAGMENTS = false;

    // The bit order in a word makes this 6 logical operations and 3 multiplications for 8 codes: see `arrange`. A
    // product has a code's sign and its other bits where they belong, and copies of them below bit 9 of a half.
    static __device__ __forceinline__ void spread(unsigned w, unsigned (&h)[4]) {
        h[0] = w & 0x8e008e00u;
        h[1] = (w << 3) & 0x8e008e00u;
        h[2] = (w & 0x40384038u) * 66 & 0x8e008e00u;
        h[3] = (w & 0x20072007u) * 516 & 0x8e008e00u;
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

    // The sum of the squares of eight arranged codes' values, times 2^-28.
    static __device__ __forceinline__ float squares(unsigned w) {
        unsigned h[4];
        float sum = 0.0f;
        spread(w, h);
#pragma unroll
        for (int p = 0; p < 4; p++) {
            float2 v = __half22float2(as_half2(h[p]));
            sum += v.x * v.x + v.y * v.y;
        }
        return sum;
    }

    static __device__ __forceinline__ unsigned word(const uint4& v, int i) {
        return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    }

    // The A fragments of a step: codes of rows g (`low`) and g+8 (`high`), each times its scale.
    static __device__ __forceinline__ void scaled(unsigned low, __half2 low_scale, unsigned high, __half2 high_scale,
                                                  unsigned (&a)[2][4]) {
        unsigned h[4];
        spread(low, h);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i / 2][i % 2 * 2] = as_bits(__hmul2(as_half2(h[i]), low_scale));
        spread(high, h);
#pragma unroll
        for (int i = 0; i < 4; i++) a[i / 2][i % 2 * 2 + 1] = as_bits(__hmul2(as_half2(h[i]), high_scale));
    }

    static __device__ __forceinline__ int position(int c) { return (c & 3) << 2 | c >> 2; }
};
