"""How the weights of each format are decoded: chunks of a row to vectors of float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from fp4rt.formats.nvfp4 import E2M1
from fp4rt.ops.cpu.emit.builder import FLOAT, FLOATS, I1, I8, I16, I32, INTS, LANES, Builder, i64, splat
from fp4rt.ops.cpu.runtime import TIER

NVFP4, FP8, FP8_BLOCK, BF16, F16, F32, MXFP4 = range(7)  # FP8_BLOCK: a float32 scale for each element's column
FP4 = (NVFP4, MXFP4)  # alike but for the scales: E4M3 or E8M0, one for 16 codes in both


@dataclass(frozen=True)
class Layout:
    """A chunk of one row: how many elements, and how many bytes of codes and of scales they take."""

    elements: int
    code_bytes: int
    scale_bytes: int


LAYOUTS = {
    NVFP4: Layout(16 * LANES, 8 * LANES, LANES),
    MXFP4: Layout(16 * LANES, 8 * LANES, LANES),
    FP8: Layout(4 * LANES, 4 * LANES, 0),
    FP8_BLOCK: Layout(4 * LANES, 4 * LANES, 16 * LANES),
    BF16: Layout(4 * LANES, 8 * LANES, 0),
    F16: Layout(4 * LANES, 8 * LANES, 0),
    F32: Layout(4 * LANES, 16 * LANES, 0),
}


def _e4m3(b: Builder, codes: ir.Value) -> ir.Value:
    """E4M3 bits [n] to float32, times 2^-8; NaN codes do not occur (refused where weights are read)."""
    n = codes.type.count
    if TIER != "portable":
        wide = b.shl(b.sext(codes, ir.VectorType(I16, n)), splat(I16, 7, n))
        half = b.bitcast(b.and_(wide, splat(I16, 0xBF80, n)), ir.VectorType(ir.HalfType(), n))
        return b.fpext(half, ir.VectorType(FLOAT, n))
    ints = ir.VectorType(I32, n)
    wide = b.zext(codes, ints)
    magnitude = b.and_(wide, splat(I32, 0x7F, n))
    normal = b.add(b.shl(magnitude, splat(I32, 20, n)), splat(I32, (127 - 7 - 8) << 23, n))
    small = b.fmul(b.sitofp(magnitude, ir.VectorType(FLOAT, n)), splat(FLOAT, 2.0**-17, n))
    bits = b.select(b.icmp_signed("<", magnitude, splat(I32, 8, n)), b.bitcast(small, ints), normal)
    sign = b.and_(b.shl(wide, splat(I32, 24, n)), splat(I32, 0x80000000, n))
    return b.bitcast(b.or_(bits, sign), ir.VectorType(FLOAT, n))


def _f16(b: Builder, bits: ir.Value) -> ir.Value:
    """float16 bits to float32, infinities and NaN included."""
    if TIER != "portable":
        return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
    wide = b.zext(bits, INTS)
    magnitude = b.and_(wide, splat(I32, 0x7FFF))
    shifted = b.shl(magnitude, splat(I32, 13))
    value = b.add(shifted, splat(I32, (127 - 15) << 23))
    value = b.select(b.icmp_signed("<", magnitude, splat(I32, 0x400)),
                     b.bitcast(b.fmul(b.sitofp(magnitude, FLOATS), splat(FLOAT, 2.0**-24)), INTS), value)
    value = b.select(b.icmp_signed(">=", magnitude, splat(I32, 0x7C00)),
                     b.or_(shifted, splat(I32, 0x7F800000)), value)
    sign = b.and_(b.shl(wide, splat(I32, 16)), splat(I32, 0x80000000))
    return b.bitcast(b.or_(value, sign), FLOATS)


def odd_words(b: Builder, number: ir.Value) -> ir.Value:
    """The mask of the upper word of each dword, for AVX-512, made from a number below 2^60.

    LLVM must not know it: for a constant it takes an AND behind the lookup instead of the lookup's own zeroing mask.
    """
    bits = b.trunc(b.or_(b.lshr(number, i64(60)), i64(0xAAAAAAAA)), I32)
    return b.bitcast(bits, ir.VectorType(I1, 32))


def e2m1(b: Builder, dwords: ir.Value, k: int, odd: ir.Value) -> ir.Value:
    """The value of nibble k of each dword. odd: what `odd_words` gave."""
    if TIER == "avx512" and k >= 4:  # a lookup of words reads bits 16-20 of dword >> 4 (k - 4): half as many shifts
        words = ir.VectorType(I16, 2 * LANES)
        index = b.lshr(dwords, splat(I32, 4 * (k - 4))) if k > 4 else dwords
        table = splat(I16, [int(bits) >> 16 for bits in E2M1.view(np.uint32)] * 2)
        upper = b.intrinsic("llvm.x86.avx512.permvar.hi.512", words, table, b.bitcast(index, words))
        return b.bitcast(b.select(odd, upper, splat(I16, 0, 2 * LANES)), FLOATS)
    index = b.lshr(dwords, splat(I32, 4 * k)) if k else dwords
    if TIER == "avx512":
        return b.intrinsic("llvm.x86.avx512.permvar.sf.512", FLOATS, splat(FLOAT, E2M1), index)
    high = b.shl(dwords, splat(I32, 28 - 4 * k)) if k < 7 else dwords
    sign = b.and_(high, splat(I32, 0x80000000))
    if TIER == "avx2":  # the table has the eight magnitudes: only three bits are read
        value = b.bitcast(b.intrinsic("llvm.x86.avx2.permps", FLOATS, splat(FLOAT, E2M1[:8]), index), INTS)
    else:  # from 2 on, the three bits are exponent and mantissa; 0 and 1 stand for 0 and 0.5
        magnitude = b.and_(index, splat(I32, 7))
        half = splat(I32, int(np.float32(0.5).view(np.uint32)))
        normal = b.add(b.shl(magnitude, splat(I32, 22)), half)
        small = b.and_(b.sub(splat(I32, 0), magnitude), half)
        value = b.select(b.icmp_signed("<", magnitude, splat(I32, 2)), small, normal)
    return b.bitcast(b.xor(value, sign), FLOATS)


def fp4_scales(b: Builder, kind: int, address: ir.Value) -> list[ir.Value]:
    """The scales of a chunk's two dword vectors, each for two lanes. E8M0 is a float32's exponent (0: no 2^-127)."""
    codes = b.get(address, ir.VectorType(I8, LANES))
    scales = _e4m3(b, codes) if kind == NVFP4 else b.bitcast(b.shl(b.zext(codes, INTS), splat(I32, 23)), FLOATS)
    return [b.pick(scales, scales, [u * LANES // 2 + lane // 2 for lane in range(LANES)]) for u in range(2)]


def dense_values(b: Builder, kind: int, codes: ir.Value, scales: ir.Value, pair: int) -> list[ir.Value]:
    """Vectors 2 pair and 2 pair + 1 of a chunk of FP8, BF16, F16 or F32."""
    first = pair * 2 * LANES
    if kind in (FP8, FP8_BLOCK):
        both = _e4m3(b, b.get(codes, ir.VectorType(I8, 2 * LANES), first))
        values = [b.pick(both, both, range(at, at + LANES)) for at in (0, LANES)]
        if kind == FP8_BLOCK:
            values = [b.fmul(value, b.get(scales, FLOATS, (first + i * LANES) * 4)) for i, value in enumerate(values)]
        return values
    if kind == F32:
        return [b.get(codes, FLOATS, (first + i * LANES) * 4) for i in range(2)]
    bits = [b.get(codes, ir.VectorType(I16, LANES), (first + i * LANES) * 2) for i in range(2)]
    if kind == F16:
        return [_f16(b, each) for each in bits]
    return [b.bitcast(b.shl(b.zext(each, INTS), splat(I32, 16)), FLOATS) for each in bits]
