"""What stands between the linears: gated activations, and the products and online softmax of attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir

from fp4rt.batch import PAGE_TOKENS
from fp4rt.ops.cpu.emit.builder import FLOAT, FLOATS, I32, INTS, LANES, ROWS, Builder, entry, i64, loop, splat
from fp4rt.ops.cpu.runtime import TIER

_WIDE = {"avx512": 4, "avx2": 2, "portable": 2}[TIER]  # vectors of one tile of `outer`


def _exp(b: Builder, x: ir.Value) -> ir.Value:
    """e^x within 2 units in the last place; 0 below -87.3, limited above 88.3; NaN stays NaN.

    e^x = 2^n e^r with n = round(x / ln 2), r in two parts (Cody and Waite 1980), e^r by its Taylor series to r^7.
    """
    lowest, highest = splat(FLOAT, np.float32(-87.3)), splat(FLOAT, np.float32(88.3))
    bounded = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)
    bounded = b.select(b.fcmp_ordered(">", bounded, highest), highest, bounded)
    shifter = splat(FLOAT, 1.5 * 2.0**23)  # adding it rounds to an integer, which then lies in the low bits
    rounded = b.muladd(bounded, splat(FLOAT, np.float32(1 / np.log(2))), shifter)
    n = b.fsub(rounded, shifter)
    r = b.muladd(n, splat(FLOAT, -0.693359375), bounded)
    r = b.muladd(n, splat(FLOAT, np.float32(2.12194440e-4)), r)
    power = splat(FLOAT, np.float32(1 / 5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        power = b.muladd(power, r, splat(FLOAT, np.float32(1 / divisor)))
    exponent = b.shl(b.add(b.bitcast(rounded, INTS), splat(I32, 127)), splat(I32, 23))
    value = b.fmul(power, b.bitcast(exponent, FLOATS))
    return b.select(b.fcmp_ordered("<", x, lowest), splat(FLOAT, 0.0), value)


def _emit_silu_mul(b, gate, up, vectors):
    def body(addresses, _):
        g, u = b.get(addresses[0]), b.get(addresses[1])
        divisor = b.fadd(splat(FLOAT, 1.0), _exp(b, b.fsub(splat(FLOAT, -0.0), g)))
        b.put(b.fmul(b.fdiv(g, divisor), u), addresses[0])
        return []

    loop(b, vectors, [gate, up], [LANES * 4] * 2, [], body)


# silu_mul(gate, up, vectors): gate = gate / (1 + e^-gate) * up, `vectors` times LANES float32.
silu_mul = entry("silu_mul", 3, _emit_silu_mul)


# -- Attention ----------------------------------------------------------------------------------------------------


def _emit_outer(width: int, rescaled: bool) -> Callable[..., None]:
    """ROWS x (width * LANES) of c = a b, or c = scale c + a b."""

    def emit(b, a, a_stride, matrix, b_stride, depth, c, c_stride, scale):
        a_rows = [b.add(a, b.mul(a_stride, i64(r))) for r in range(ROWS)]
        c_rows = [b.add(c, b.mul(c_stride, i64(r))) for r in range(ROWS)]

        sums = [splat(FLOAT, 0.0)] * (ROWS * width)
        if rescaled:
            sums = [b.fmul(b.get(row, FLOATS, v * LANES * 4), factor) for r, row in enumerate(c_rows)
                    for factor in [b.spread(b.get(scale, FLOAT, 4 * r))] for v in range(width)]

        def body(addresses, sums):
            columns = [b.get(addresses[ROWS], FLOATS, v * LANES * 4) for v in range(width)]
            factors = [b.spread(b.get(address, FLOAT)) for address in addresses[:ROWS]]
            return [b.muladd(factors[r], columns[v], sums[r * width + v]) for r in range(ROWS) for v in range(width)]

        sums = loop(b, depth, [*a_rows, matrix], [4] * ROWS + [b_stride], sums, body)
        for r, row in enumerate(c_rows):
            for v in range(width):
                b.put(sums[r * width + v], row, v * LANES * 4)

    return emit


WIDE_COLUMNS, NARROW_COLUMNS = _WIDE * LANES, (16 // LANES) * LANES
# outer(a, a_stride, b, b_stride, depth, c, c_stride, scale): c = a b for ROWS rows, `depth` (at least 1) and
# WIDE_COLUMNS columns, in float32; outer_add and outer_add_narrow (16 columns): c[r] = scale[r] c[r] + a[r] b.
outer = entry("outer", 8, _emit_outer(_WIDE, False))
outer_add = entry("outer_add", 8, _emit_outer(_WIDE, True))
outer_add_narrow = entry("outer_add_narrow", 8, _emit_outer(16 // LANES, True))


def _emit_softmax_page(b, scores, highest, total, factor):
    values = [b.get(scores, FLOATS, v * 4) for v in range(0, PAGE_TOKENS, LANES)]
    largest = values[0]
    for value in values[1:]:
        largest = b.select(b.fcmp_ordered(">", value, largest), value, largest)
    while largest.type.count > 1:
        half = largest.type.count // 2
        low, high = b.pick(largest, largest, range(half)), b.pick(largest, largest, range(half, 2 * half))
        largest = b.select(b.fcmp_ordered(">", high, low), high, low)
    largest = b.extract_element(largest, ir.Constant(I32, 0))
    before = b.get(highest, FLOAT)
    now = b.select(b.fcmp_ordered(">", largest, before), largest, before)
    b.put(now, highest)
    # While nothing is visible, any finite number keeps e^(-inf - x) = 0 from becoming NaN.
    finite = b.select(b.fcmp_ordered("==", now, ir.Constant(FLOAT, float("-inf"))), ir.Constant(FLOAT, 0.0), now)
    shift = b.spread(finite)
    correction = _exp(b, b.fsub(b.spread(before), shift))
    b.put(b.extract_element(correction, ir.Constant(I32, 0)), factor)
    running = b.fmul(b.get(total), correction)
    for v, value in enumerate(values):
        power = _exp(b, b.fsub(value, shift))
        b.put(power, scores, v * LANES * 4)
        running = b.fadd(running, power)
    b.put(running, total)


# softmax_page(scores, highest, total, factor): one step of the online softmax (Milakov and Gimelshein 2018). scores
# [PAGE_TOKENS] become e^(score - highest); highest: the largest score so far; total [LANES]: partial sums of the powers
# so far; factor: what earlier outputs must be multiplied by.
softmax_page = entry("softmax_page", 4, _emit_softmax_page)
