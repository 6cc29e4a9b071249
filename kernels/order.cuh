// Activations in the order of warpgroup products: slabs of 64 columns, [slab][token][64 halves], for linears of sm_90a.
//
// A step of 32 columns is one 16-byte chunk of 8 columns for each lane t of a quad; in a fragment, k runs over the
// lanes' first pairs of columns, then over their second ones, and so on. So pair p of lane t is word t of the step's
// chunk p. A slab is two steps; chunk c of a token lies at c ^ (token % 8), the products' 128-byte swizzle. INTERLEAVED
// tiles (4-bit codes) give lane t 32 neighbouring columns of 128, 8 for each of four steps; others give it 8 of every 32.

// Where columns `column` and the next (an even one first) of a token lie, in words of two halves. padded: tokens of a
// slab. swizzle: the token's number % 8 from the first one that a block computes with.
__device__ __forceinline__ size_t ordered_word(int column, int token, int padded, bool interleaved, int swizzle) {
    const unsigned c = column % 128u, outer = c / 32, inner = c / 8 % 4, pair = c / 2 % 4;
    const unsigned step = interleaved ? inner : outer, t = interleaved ? outer : inner;
    const unsigned slab = column / 128u * 2 + step / 2, chunk = step % 2 * 4 + pair;
    return (((size_t)slab * padded + token) * 8 + (chunk ^ swizzle)) * 4 + t;
}
