// Tables of tokens as the checkpoint has them: the formats a row's numbers may have.
#include "mma.cuh"

enum Format { BF16 = 0, F16 = 1, F32 = 2 };

__device__ __forceinline__ float table_value(const void* table, size_t at, int format) {
    if (format == BF16) return __uint_as_float((unsigned)static_cast<const unsigned short*>(table)[at] << 16);
    if (format == F16) return __half2float(static_cast<const __half*>(table)[at]);
    return static_cast<const float*>(table)[at];
}
