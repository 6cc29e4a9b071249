// What changes between two steps without the host, and whether numbers are finite.

// One thread per sequence of a decode batch: its drawn id becomes its token, one position on. A sequence
// whose current position lies on page 0 (a padded row) or at the end of its page table stays. A failed row's
// id (-1) becomes 0. Never launched dependently, and lets nothing start early: the next step reads what it
// writes without waiting.
extern "C" __global__ void advance(const int* __restrict__ ids, int* __restrict__ tokens,
                                   int* __restrict__ positions, int* __restrict__ lengths,
                                   const int* __restrict__ pages, int sequences, int table_width,
                                   int page_tokens) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= sequences) return;
    const int position = positions[s];
    tokens[s] = max(ids[s], 0);
    if (pages[(size_t)s * table_width + position / page_tokens] == 0 ||
        position + 1 >= table_width * page_tokens)
        return;
    positions[s] = position + 1;
    lengths[s] += 1;
}

// One thread per token of a batch: one below 0, -1 - r, becomes the id that row r drew last, 0 for a failed row.
extern "C" __global__ void feed(const int* __restrict__ ids, int* __restrict__ tokens, int count) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < count && tokens[t] < 0) tokens[t] = max(ids[-1 - tokens[t]], 0);
}

// Sets *flag to 1 where any of rows * columns numbers is a NaN or an infinity.
extern "C" __global__ void find_not_finite(const float* __restrict__ x, int rows, int columns, int* flag) {
    const size_t n = (size_t)rows * columns;
    bool bad = false;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        bad |= (__float_as_uint(x[i]) & 0x7f800000u) == 0x7f800000u;
    if (bad) *flag = 1;
}
