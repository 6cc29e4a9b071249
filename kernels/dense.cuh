// Dense weights as fp16 times one power of two per row, in tensor-core tiles: the layout, for all who read it.
//
// A tile is 16 rows x 64 columns in 2048 bytes per plane: the A fragments of four mma, [mma][lane][a0, a1, a2, a3]. In
// a step of 32 columns, lane 4 * g + t owns columns 8t .. 8t+7: the first four in mma 2 * step, the others in the next.
// PLANES = 1 holds BF16 and F16 weights: exact for all values above 2^-29 of the largest in their row. PLANES = 2 holds
// F32 as the sum of two fp16 planes, the second 2048 bytes behind the first.

constexpr int DENSE_K = 64, DENSE_PLANE = 2048;

// Byte offset of the value at (row, k) in plane 0. Columns k and k + 1 are neighbours for even k. The value is the sum
// of the planes' halves times row_scale[row]. k_tiles = ceil(K / 64). Rows are packed rows.
__device__ __forceinline__ size_t dense_offset(int row, int k, int k_tiles, int planes) {
    const int column = k % DENSE_K, lane = row % 8 * 4 + column % 32 / 8, q = column % 8;
    const size_t tile = ((size_t)(row / 16) * k_tiles + k / DENSE_K) * planes * DENSE_PLANE;
    return tile + (column / 32 * 2 + q / 4) * 512 + lane * 16 + (row % 16 / 8 + q % 4 / 2 * 2) * 4 + q % 2 * 2;
}
