"""The inner loops in LLVM vector code, emitted with llvmlite and callable from Numba functions.

Compilers do not find these by themselves: decoding E2M1 by a table held in a register is what brings a matrix-vector
product to the speed of memory. All arithmetic is float32 and decoded values are exact. Addresses and byte counts are
int64, nothing needs to be aligned. One row's sum is always made in the same order, whatever else is computed with it.

How a weight is read, L lanes at a time (L: float32 values in one vector register):
- NVFP4 in chunks of 16 L codes: 2 L dwords of eight codes. Lane j of dword vector u, shifted right by 4 k, has the
  code of element 8 (u L + j) + k in its low nibble: a lookup that reads only the low bits needs no mask. The
  activations lie in that order, [chunk][u][k][lane]. Lanes 2b and 2b+1 share one block scale, which multiplies the
  sum of eight products, so L scales are decoded for 16 L codes.
- FP8, BF16, F16 and F32 in chunks of 4 L elements, in their natural order.
- E4M3 becomes a float16 of 2^-8 times its value by moving bits, subnormals included; whoever multiplies by the
  tensor's or row's scale restores the 2^8.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fp4rt.batch import PAGE_TOKENS
from fp4rt.formats.nvfp4 import E2M1
from fp4rt.ops.cpu.runtime import TIER, load_machine_code

NVFP4, FP8, FP8_BLOCK, BF16, F16, F32, MXFP4 = range(7)  # FP8_BLOCK: a float32 scale for each element's column
FP4 = (NVFP4, MXFP4)  # alike but for the scales: E4M3 or E8M0, one for 16 codes in both

LANES = 16 if TIER == "avx512" else 8
ROWS = 4  # rows that one call of dot_rows or tile computes

# Tokens -> rows of one register tile; as many sums as the registers hold.
_TILES = {
    "avx512": {NVFP4: {1: 4, 2: 4, 4: 2}, None: {1: 4, 2: 4, 4: 4}},
    "avx2": {NVFP4: {1: 2, 2: 1}, None: {1: 4, 2: 4, 4: 2}},
    "portable": {NVFP4: {1: 2, 2: 1}, None: {1: 4, 2: 4, 4: 2}},
}[TIER]
TILE_TOKENS = {"avx512": 6, "avx2": 3, "portable": 3}[TIER]  # tokens of one tile of a many-token product
_WIDE = {"avx512": 4, "avx2": 2, "portable": 2}[TIER]        # vectors of one tile of `outer`


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

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_VF = ir.VectorType(_F32, LANES)
_VI = ir.VectorType(_I32, LANES)


def _i64(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _splat(kind: ir.Type, value: float | int | Sequence, lanes: int = LANES) -> ir.Constant:
    """A vector constant of one value, or of the values given; integers as their signed value."""
    values = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value] * lanes
    if isinstance(kind, ir.IntType):
        values = [v - (1 << kind.width) if v >= 1 << (kind.width - 1) else v for v in values]
    else:
        values = [float(v) for v in values]
    return ir.Constant(ir.VectorType(kind, len(values)), [ir.Constant(kind, v) for v in values])


class _Builder(ir.IRBuilder):
    """IRBuilder with addresses as int64."""

    def at(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.inttoptr(address, kind.as_pointer())

    def get(self, address: ir.Value, kind: ir.Type = _VF, offset: int = 0) -> ir.Value:
        value = super().load(self.at(self.add(address, _i64(offset)), kind))
        value.align = 1
        return value

    def put(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        super().store(value, self.at(self.add(address, _i64(offset)), value.type)).align = 1

    def intrinsic(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        function = self.module.globals.get(name) or ir.Function(
            self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.call(function, args)

    def muladd(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c, fused where the processor can."""
        return self.intrinsic(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def prefetch(self, address: ir.Value) -> None:
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), self.at(address, _I8), *(
            ir.Constant(_I32, flag) for flag in (0, 0, 1)))  # read, used once, data

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector of one float32 in all lanes."""
        one = self.insert_element(_splat(_F32, 0.0), value, ir.Constant(_I32, 0))
        return self.pick(one, one, [0] * LANES)

    def pick(self, a: ir.Value, b: ir.Value, indices: Sequence[int]) -> ir.Value:
        return self.shuffle_vector(a, b, _splat(_I32, list(indices)))


_MODULE = ir.Module("fp4rt")  # filled by `_machine_code`; cached code is loaded without emitting anything
_ENTRIES: dict[str, tuple[int, Callable[..., None]]] = {}


def _function(name: str, count: int, emit: Callable[..., None]) -> ir.Function:
    """The function `name` of `count` int64 arguments, emitted the first time it is asked for."""
    if name in _MODULE.globals:
        return _MODULE.globals[name]
    function = ir.Function(_MODULE, ir.FunctionType(ir.VoidType(), [_I64] * count), name)
    builder = _Builder(function.append_basic_block("entry"))
    emit(builder, *function.args)
    builder.ret_void()
    return function


def _entry(name: str, count: int, emit: Callable[..., None]):
    """A Numba intrinsic of `count` int64 arguments: a call of the machine code that `emit` stands for."""
    name = f"fp4rt_{name}"
    _ENTRIES[name] = count, emit

    def typer(context, *args):
        def generate(target, builder, signature, values):
            function = builder.module.globals.get(name) or ir.Function(
                builder.module, ir.FunctionType(ir.VoidType(), [_I64] * count), name)
            builder.call(function, values)
            return target.get_dummy_value()

        return types.void(*[types.int64] * count), generate

    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD  # Numba reads the arity from the signature
    typer.__signature__ = inspect.Signature(
        [inspect.Parameter(each, positional) for each in ("context", *(f"a{i}" for i in range(count)))])
    typer.__name__ = typer.__qualname__ = name
    return intrinsic(typer)


def _assembly() -> str:
    """All entries as LLVM assembly."""
    for name, (count, emit) in _ENTRIES.items():
        _function(name, count, emit)
    return str(_MODULE)


# -- Decoding -----------------------------------------------------------------------------------------------------


def _e4m3(b: _Builder, codes: ir.Value) -> ir.Value:
    """E4M3 bits [n] to float32, times 2^-8; NaN codes do not occur (refused where weights are read)."""
    n = codes.type.count
    if TIER != "portable":
        wide = b.shl(b.sext(codes, ir.VectorType(_I16, n)), _splat(_I16, 7, n))
        half = b.bitcast(b.and_(wide, _splat(_I16, 0xBF80, n)), ir.VectorType(ir.HalfType(), n))
        return b.fpext(half, ir.VectorType(_F32, n))
    ints = ir.VectorType(_I32, n)
    wide = b.zext(codes, ints)
    magnitude = b.and_(wide, _splat(_I32, 0x7F, n))
    normal = b.add(b.shl(magnitude, _splat(_I32, 20, n)), _splat(_I32, (127 - 7 - 8) << 23, n))
    small = b.fmul(b.sitofp(magnitude, ir.VectorType(_F32, n)), _splat(_F32, 2.0**-17, n))
    bits = b.select(b.icmp_signed("<", magnitude, _splat(_I32, 8, n)), b.bitcast(small, ints), normal)
    sign = b.and_(b.shl(wide, _splat(_I32, 24, n)), _splat(_I32, 0x80000000, n))
    return b.bitcast(b.or_(bits, sign), ir.VectorType(_F32, n))


def _f16(b: _Builder, bits: ir.Value) -> ir.Value:
    """float16 bits to float32, infinities and NaN included."""
    if TIER != "portable":
        return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), _VF)
    wide = b.zext(bits, _VI)
    magnitude = b.and_(wide, _splat(_I32, 0x7FFF))
    shifted = b.shl(magnitude, _splat(_I32, 13))
    value = b.add(shifted, _splat(_I32, (127 - 15) << 23))
    value = b.select(b.icmp_signed("<", magnitude, _splat(_I32, 0x400)),
                     b.bitcast(b.fmul(b.sitofp(magnitude, _VF), _splat(_F32, 2.0**-24)), _VI), value)
    value = b.select(b.icmp_signed(">=", magnitude, _splat(_I32, 0x7C00)),
                     b.or_(shifted, _splat(_I32, 0x7F800000)), value)
    sign = b.and_(b.shl(wide, _splat(_I32, 16)), _splat(_I32, 0x80000000))
    return b.bitcast(b.or_(value, sign), _VF)


def _odd_words(b: _Builder, number: ir.Value) -> ir.Value:
    """The mask of the upper word of each dword, for AVX-512, made from a number below 2^60.

    LLVM must not know it: for a constant it takes an AND behind the lookup instead of the lookup's own zeroing mask.
    """
    bits = b.trunc(b.or_(b.lshr(number, _i64(60)), _i64(0xAAAAAAAA)), _I32)
    return b.bitcast(bits, ir.VectorType(_I1, 32))


def _e2m1(b: _Builder, dwords: ir.Value, k: int, odd: ir.Value) -> ir.Value:
    """The value of nibble k of each dword. odd: what `_odd_words` gave."""
    if TIER == "avx512" and k >= 4:  # a lookup of words reads bits 16-20 of dword >> 4 (k - 4): half as many shifts
        words = ir.VectorType(_I16, 2 * LANES)
        index = b.lshr(dwords, _splat(_I32, 4 * (k - 4))) if k > 4 else dwords
        table = _splat(_I16, [int(bits) >> 16 for bits in E2M1.view(np.uint32)] * 2)
        upper = b.intrinsic("llvm.x86.avx512.permvar.hi.512", words, table, b.bitcast(index, words))
        return b.bitcast(b.select(odd, upper, _splat(_I16, 0, 2 * LANES)), _VF)
    index = b.lshr(dwords, _splat(_I32, 4 * k)) if k else dwords
    if TIER == "avx512":
        return b.intrinsic("llvm.x86.avx512.permvar.sf.512", _VF, _splat(_F32, E2M1), index)
    high = b.shl(dwords, _splat(_I32, 28 - 4 * k)) if k < 7 else dwords
    sign = b.and_(high, _splat(_I32, 0x80000000))
    if TIER == "avx2":  # the table has the eight magnitudes: only three bits are read
        value = b.bitcast(b.intrinsic("llvm.x86.avx2.permps", _VF, _splat(_F32, E2M1[:8]), index), _VI)
    else:  # from 2 on, the three bits are exponent and mantissa; 0 and 1 stand for 0 and 0.5
        magnitude = b.and_(index, _splat(_I32, 7))
        half = _splat(_I32, int(np.float32(0.5).view(np.uint32)))
        normal = b.add(b.shl(magnitude, _splat(_I32, 22)), half)
        small = b.and_(b.sub(_splat(_I32, 0), magnitude), half)
        value = b.select(b.icmp_signed("<", magnitude, _splat(_I32, 2)), small, normal)
    return b.bitcast(b.xor(value, sign), _VF)


def _fp4_scales(b: _Builder, kind: int, address: ir.Value) -> list[ir.Value]:
    """The scales of a chunk's two dword vectors, each for two lanes. E8M0 is a float32's exponent (0: no 2^-127)."""
    codes = b.get(address, ir.VectorType(_I8, LANES))
    scales = _e4m3(b, codes) if kind == NVFP4 else b.bitcast(b.shl(b.zext(codes, _VI), _splat(_I32, 23)), _VF)
    return [b.pick(scales, scales, [u * LANES // 2 + lane // 2 for lane in range(LANES)]) for u in range(2)]


def _dense(b: _Builder, kind: int, codes: ir.Value, scales: ir.Value, pair: int) -> list[ir.Value]:
    """Vectors 2 pair and 2 pair + 1 of a chunk of FP8, BF16, F16 or F32."""
    first = pair * 2 * LANES
    if kind in (FP8, FP8_BLOCK):
        both = _e4m3(b, b.get(codes, ir.VectorType(_I8, 2 * LANES), first))
        values = [b.pick(both, both, range(at, at + LANES)) for at in (0, LANES)]
        if kind == FP8_BLOCK:
            values = [b.fmul(value, b.get(scales, _VF, (first + i * LANES) * 4)) for i, value in enumerate(values)]
        return values
    if kind == F32:
        return [b.get(codes, _VF, (first + i * LANES) * 4) for i in range(2)]
    bits = [b.get(codes, ir.VectorType(_I16, LANES), (first + i * LANES) * 2) for i in range(2)]
    if kind == F16:
        return [_f16(b, each) for each in bits]
    return [b.bitcast(b.shl(b.zext(each, _VI), _splat(_I32, 16)), _VF) for each in bits]


# -- A walk along rows --------------------------------------------------------------------------------------------


class _Walk:
    """A loop over the chunks of some rows, then once over a zero-padded copy of what follows the last whole one.

    The body is emitted once, between `enter` and `leave`; `state` are the vectors carried from chunk to chunk.
    """

    def __init__(self, b: _Builder, kind: int, codes: list[ir.Value], scales: list[ir.Value], moving: ir.Value,
                 step: int, whole: ir.Value, code_tail: ir.Value, scale_tail: ir.Value, state: list[ir.Value],
                 following: Sequence[ir.Value] = ()):
        """codes, scales: the rows' addresses. moving: an address that advances by `step` bytes for each chunk.

        whole: complete chunks. code_tail, scale_tail: bytes that follow them in each row. following: where the codes
        and the scales of the next rows begin, to be fetched meanwhile (the hardware's own prefetchers follow one row,
        and stop at its page's end).
        """
        layout = self._layout = LAYOUTS[kind]
        self._b, self._step = b, step
        function = b.function
        copy, self._loop, self._check, self._done = (
            function.append_basic_block(name) for name in ("copy", "loop", "check", "done"))
        zero = _i64(0)
        padded = [[self._pad(size) for _ in rows] for rows, size in
                  ((codes, layout.code_bytes), (scales, layout.scale_bytes)) if size]
        has_tail = b.icmp_signed(">", code_tail, zero)
        start = function.append_basic_block("start")
        b.cbranch(has_tail, copy, start)
        b.position_at_end(copy)
        for rows, buffers, size, tail in ((codes, padded[0], layout.code_bytes, code_tail),
                                          (scales, padded[-1], layout.scale_bytes, scale_tail)):
            for row, buffer in zip(rows, buffers) if size else ():
                self._copy_tail(row, buffer, size, whole, tail)
        b.branch(start)
        b.position_at_end(start)
        carried = [*codes, *(scales if layout.scale_bytes else []), moving, *(following or [zero] * 2), whole, has_tail,
                   *state]
        b.cbranch(b.icmp_signed(">", whole, zero), self._loop, self._check)
        b.position_at_end(self._loop)
        self._phis = [b.phi(value.type) for value in carried]
        b.position_at_end(self._check)
        self._ends = [b.phi(value.type) for value in carried]
        for phi, end, value in zip(self._phis, self._ends, carried):
            phi.add_incoming(value, start)
            end.add_incoming(value, start)
        b.position_at_end(self._loop)
        n = len(codes)
        self.codes = self._phis[:n]
        self.scales = self._phis[n:2 * n] if layout.scale_bytes else scales
        self.moving = self._phis[-len(state) - 5]
        self.state = self._phis[len(carried) - len(state):]
        self._tails = [b_ for group in padded for b_ in group]
        ahead_codes, ahead_scales = self._phis[-len(state) - 4:len(carried) - len(state) - 2]
        for line in range(0, n * layout.code_bytes if following else 0, 64):
            b.prefetch(b.add(ahead_codes, _i64(line)))
        for line in range(0, n * layout.scale_bytes if following and kind in FP4 else 0, 64):
            b.prefetch(b.add(ahead_scales, _i64(line)))

    def _pad(self, size: int) -> ir.Value:
        buffer = self._b.alloca(ir.ArrayType(_I8, size))
        buffer.align = 64
        return self._b.ptrtoint(buffer, _I64)

    def _copy_tail(self, row: ir.Value, buffer: ir.Value, size: int, whole: ir.Value, tail: ir.Value) -> None:
        b = self._b
        for offset in range(0, size, LANES):
            b.put(_splat(_I8, 0), buffer, offset)
        source = b.add(row, b.mul(whole, _i64(size)))
        b.intrinsic("llvm.memcpy.p0.p0.i64", ir.VoidType(), b.at(buffer, _I8), b.at(source, _I8), tail,
                    ir.Constant(_I1, 0))

    def leave(self, state: list[ir.Value]) -> list[ir.Value]:
        """Close the loop; the builder goes on behind it. Returns the state after the last chunk."""
        b, layout = self._b, self._layout
        n, total = len(self.codes), len(self._phis)
        rows = n * (2 if layout.scale_bytes else 1)
        steps = [layout.code_bytes] * n + [layout.scale_bytes] * (rows - n)
        steps += [self._step, n * layout.code_bytes, n * layout.scale_bytes, -1]
        following = [b.add(phi, _i64(step)) for phi, step in zip(self._phis, steps)]
        following += [self._phis[len(steps)], *state]
        end = b.block
        b.cbranch(b.icmp_signed(">", following[len(steps) - 1], _i64(0)), self._loop, self._check)
        for phi, check, value in zip(self._phis, self._ends, following):
            phi.add_incoming(value, end)
            check.add_incoming(value, end)
        b.position_at_end(self._check)
        once_more = [*self._tails, *self._ends[rows:rows + 3], _i64(1), ir.Constant(_I1, 0),
                     *self._ends[total - len(state):]]
        b.cbranch(self._ends[len(steps)], self._loop, self._done)
        for phi, value in zip(self._phis, once_more):
            phi.add_incoming(value, self._check)
        b.position_at_end(self._done)
        return self._ends[total - len(state):]


def _loop(b: _Builder, count: ir.Value, addresses: list[ir.Value], steps: Sequence[ir.Value | int],
          state: list[ir.Value], body: Callable[[list[ir.Value], list[ir.Value]], list[ir.Value]]) -> list[ir.Value]:
    """body(addresses, state) -> state, count (at least 1) times; addresses advance by their steps."""
    before = b.block
    loop, done = (b.function.append_basic_block(name) for name in ("loop", "done"))
    b.branch(loop)
    b.position_at_end(loop)
    initial = [count, *addresses, *state]
    phis = [b.phi(value.type) for value in initial]
    for phi, value in zip(phis, initial):
        phi.add_incoming(value, before)
    split = 1 + len(addresses)
    state = body(phis[1:split], phis[split:])
    steps = [step if isinstance(step, ir.Value) else _i64(step) for step in steps]
    following = [b.sub(phis[0], _i64(1)), *(b.add(a, s) for a, s in zip(phis[1:split], steps)), *state]
    for phi, value in zip(phis, following):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed(">", following[0], _i64(0)), loop, done)
    b.position_at_end(done)
    return state


def _row_sums(b: _Builder, vectors: list[ir.Value]) -> ir.Value:
    """The sums of the lanes of 1, 2 or 4 vectors, as one vector; lanes are paired alike for each count."""
    segment = LANES  # lanes that still stand for one sum
    while segment > 1:
        half, count = segment // 2, vectors[0].type.count
        low = [lane for lane in range(count) if lane % segment < half]
        pairs = list(zip(vectors[::2], vectors[1::2])) or [(vectors[0], vectors[0])]
        if len(vectors) > 1:
            low += [lane + count for lane in low]
        high = [lane + half for lane in low]
        vectors = [b.fadd(b.pick(first, second, low), b.pick(first, second, high)) for first, second in pairs]
        segment = half
    return vectors[0]


# -- Few tokens: products straight from the packed weight ---------------------------------------------------------


def _emit_dot(kind: int, rows: int, tokens: int) -> Callable[..., None]:
    """rows x tokens products; see dot_rows. `first`: the tile's first row among those of the call."""

    def emit(b, codes, code_stride, scales, scale_stride, x, x_stride, whole, code_tail, scale_tail, count, y, y_stride,
             first):
        last = b.sub(count, _i64(1))
        index = [b.minimum(b.add(first, _i64(r)), last) for r in range(rows)]
        ahead = rows * (2 if kind in FP4 else 1)  # rows: about 8 KiB at K = 2048
        following = [b.add(base, b.mul(b.add(first, _i64(ahead)), stride))
                     for base, stride in ((codes, code_stride), (scales, scale_stride))]
        walk = _Walk(b, kind, [b.add(codes, b.mul(i, code_stride)) for i in index],
                     [b.add(scales, b.mul(i, scale_stride)) for i in index], x, LAYOUTS[kind].elements * 4,
                     whole, code_tail, scale_tail, [_splat(_F32, 0.0)] * (rows * tokens), following)
        x_rows = [b.add(walk.moving, b.mul(x_stride, _i64(t))) for t in range(tokens)]
        sums = {(r, t): walk.state[r * tokens + t] for r in range(rows) for t in range(tokens)}
        if kind in FP4:
            odd = _odd_words(b, whole)
            block_scales = [_fp4_scales(b, kind, address) for address in walk.scales]
            for u in range(2):
                dwords = [b.get(address, _VI, u * LANES * 4) for address in walk.codes]
                inner = {}
                for k in range(8):
                    values = [_e2m1(b, word, k, odd) for word in dwords]
                    for t in range(tokens):
                        xv = b.get(x_rows[t], _VF, (u * 8 + k) * LANES * 4)
                        for r in range(rows):
                            inner[r, t] = b.muladd(values[r], xv, inner[r, t]) if k else b.fmul(values[r], xv)
                sums = {(r, t): b.muladd(inner[r, t], block_scales[r][u], total) for (r, t), total in sums.items()}
        else:
            for pair in range(2):
                values = [_dense(b, kind, *addresses, pair) for addresses in zip(walk.codes, walk.scales)]
                for i in range(2):
                    for t in range(tokens):
                        xv = b.get(x_rows[t], _VF, (pair * 2 + i) * LANES * 4)
                        for r in range(rows):
                            sums[r, t] = b.muladd(values[r][i], xv, sums[r, t])
        totals = walk.leave(list(sums.values()))
        for t in range(tokens):
            b.put(_row_sums(b, [totals[r * tokens + t] for r in range(rows)]),
                  b.add(b.add(y, b.mul(first, _i64(4))), b.mul(y_stride, _i64(t))))

    return emit


def _emit_dot_rows(b, kind, tokens, *args):
    addresses, x, x_stride, y, y_stride, rows = args[:4], args[4], args[5], args[10], args[11], args[9]
    done, other = (b.function.append_basic_block(name) for name in ("end", "other"))
    switch = b.switch(b.add(b.mul(kind, _i64(8)), tokens), other)
    for each in LAYOUTS:
        tiles = _TILES[NVFP4 if each in FP4 else None]
        for count in (1, 2, 4):
            part = max(t for t in tiles if t <= count)
            height = tiles[part]
            block = b.function.append_basic_block(f"case{each}.{count}")
            switch.add_case(_i64(each * 8 + count), block)
            b.position_at_end(block)
            dot = _function(f"dot.{each}.{height}x{part}", 13, _emit_dot(each, height, part))

            def group(at, _):
                for t in range(0, count, part):
                    inputs, outputs = (b.add(base, b.mul(stride, _i64(t))) for base, stride in (
                        (x, x_stride), (y, y_stride)))
                    for first in range(0, ROWS, height):
                        b.call(dot, [*addresses, inputs, *args[5:10], outputs, y_stride, b.add(at[0], _i64(first))])
                return []

            groups = b.sdiv(b.add(rows, _i64(ROWS - 1)), _i64(ROWS))
            _loop(b, groups, [_i64(0)], [ROWS], [], group)
            b.branch(done)
    b.position_at_end(other)
    b.unreachable()
    b.position_at_end(done)


# dot_rows(kind, tokens, codes, code_stride, scales, scale_stride, x, x_stride, whole, code_tail, scale_tail, rows, y,
# y_stride): y[t, r] = sum of row r times x[t], for 1, 2 or 4 tokens. x: float32 rows x_stride bytes apart, in the order
# above, zero beyond the row's end. y: float32 rows y_stride bytes apart, with room for `rows` rounded up to ROWS.
dot_rows = _entry("dot_rows", 14, _emit_dot_rows)


# -- Many tokens: a panel of decoded rows, times all tokens -------------------------------------------------------


def _emit_decode(kind: int) -> Callable[..., None]:
    def emit(b, codes, scales, whole, code_tail, scale_tail, out):
        walk = _Walk(b, kind, [codes], [scales], out, LAYOUTS[kind].elements * 4, whole, code_tail, scale_tail, [])
        if kind in FP4:
            odd = _odd_words(b, whole)
            for u, scale in enumerate(_fp4_scales(b, kind, walk.scales[0])):
                dwords = b.get(walk.codes[0], _VI, u * LANES * 4)
                for k in range(8):
                    b.put(b.fmul(_e2m1(b, dwords, k, odd), scale), walk.moving, (u * 8 + k) * LANES * 4)
        else:
            for pair in range(2):
                for i, value in enumerate(_dense(b, kind, walk.codes[0], walk.scales[0], pair)):
                    b.put(value, walk.moving, (pair * 2 + i) * LANES * 4)
        walk.leave([])

    return emit


def _emit_decode_row(b, kind, *args):
    done, other = (b.function.append_basic_block(name) for name in ("end", "other"))
    switch = b.switch(kind, other)
    for each in LAYOUTS:
        block = b.function.append_basic_block(f"case{each}")
        switch.add_case(_i64(each), block)
        b.position_at_end(block)
        b.call(_function(f"decode.{each}", 6, _emit_decode(each)), args)
        b.branch(done)
    b.position_at_end(other)
    b.unreachable()
    b.position_at_end(done)


# decode_row(kind, codes, scales, whole, code_tail, scale_tail, out): the values of one row in the order above,
# float32, block scales applied, zero beyond the end.
decode_row = _entry("decode_row", 7, _emit_decode_row)


def _emit_tile(b, w, w_stride, x, x_stride, vectors, y, y_stride):
    w_rows = [b.add(w, b.mul(w_stride, _i64(r))) for r in range(ROWS)]
    x_rows = [b.add(x, b.mul(x_stride, _i64(t))) for t in range(TILE_TOKENS)]

    def body(addresses, sums):
        weights = [b.get(address) for address in addresses[:ROWS]]
        tokens = [b.get(address) for address in addresses[ROWS:]]
        return [b.muladd(wv, xv, sums[t * ROWS + r]) for t, xv in enumerate(tokens) for r, wv in enumerate(weights)]

    sums = _loop(b, vectors, w_rows + x_rows, [LANES * 4] * (ROWS + TILE_TOKENS),
                 [_splat(_F32, 0.0)] * (ROWS * TILE_TOKENS), body)
    for t in range(TILE_TOKENS):
        address = b.add(y, b.mul(y_stride, _i64(t)))
        partial = _row_sums(b, sums[t * ROWS:(t + 1) * ROWS])
        b.put(b.fadd(b.get(address, partial.type), partial), address)


# tile(w, w_stride, x, x_stride, vectors, y, y_stride): y[t, r] += w[r] . x[t] for ROWS rows and TILE_TOKENS tokens of
# `vectors` times LANES float32.
tile = _entry("tile", 7, _emit_tile)


# -- Elementwise --------------------------------------------------------------------------------------------------


def _exp(b: _Builder, x: ir.Value) -> ir.Value:
    """e^x within 2 units in the last place; 0 below -87.3, limited above 88.3; NaN stays NaN.

    e^x = 2^n e^r with n = round(x / ln 2), r in two parts (Cody and Waite 1980), e^r by its Taylor series to r^7.
    """
    lowest, highest = _splat(_F32, np.float32(-87.3)), _splat(_F32, np.float32(88.3))
    bounded = b.select(b.fcmp_ordered("<", x, lowest), lowest, x)
    bounded = b.select(b.fcmp_ordered(">", bounded, highest), highest, bounded)
    shifter = _splat(_F32, 1.5 * 2.0**23)  # adding it rounds to an integer, which then lies in the low bits
    rounded = b.muladd(bounded, _splat(_F32, np.float32(1 / np.log(2))), shifter)
    n = b.fsub(rounded, shifter)
    r = b.muladd(n, _splat(_F32, -0.693359375), bounded)
    r = b.muladd(n, _splat(_F32, np.float32(2.12194440e-4)), r)
    power = _splat(_F32, np.float32(1 / 5040))
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        power = b.muladd(power, r, _splat(_F32, np.float32(1 / divisor)))
    exponent = b.shl(b.add(b.bitcast(rounded, _VI), _splat(_I32, 127)), _splat(_I32, 23))
    value = b.fmul(power, b.bitcast(exponent, _VF))
    return b.select(b.fcmp_ordered("<", x, lowest), _splat(_F32, 0.0), value)


def _emit_silu_mul(b, gate, up, vectors):
    def body(addresses, _):
        g, u = b.get(addresses[0]), b.get(addresses[1])
        divisor = b.fadd(_splat(_F32, 1.0), _exp(b, b.fsub(_splat(_F32, -0.0), g)))
        b.put(b.fmul(b.fdiv(g, divisor), u), addresses[0])
        return []

    _loop(b, vectors, [gate, up], [LANES * 4] * 2, [], body)


# silu_mul(gate, up, vectors): gate = gate / (1 + e^-gate) * up, `vectors` times LANES float32.
silu_mul = _entry("silu_mul", 3, _emit_silu_mul)


# -- Attention ----------------------------------------------------------------------------------------------------


def _emit_outer(width: int, rescaled: bool) -> Callable[..., None]:
    """ROWS x (width * LANES) of c = a b, or c = scale c + a b."""

    def emit(b, a, a_stride, matrix, b_stride, depth, c, c_stride, scale):
        a_rows = [b.add(a, b.mul(a_stride, _i64(r))) for r in range(ROWS)]
        c_rows = [b.add(c, b.mul(c_stride, _i64(r))) for r in range(ROWS)]

        sums = [_splat(_F32, 0.0)] * (ROWS * width)
        if rescaled:
            sums = [b.fmul(b.get(row, _VF, v * LANES * 4), factor) for r, row in enumerate(c_rows)
                    for factor in [b.spread(b.get(scale, _F32, 4 * r))] for v in range(width)]

        def body(addresses, sums):
            columns = [b.get(addresses[ROWS], _VF, v * LANES * 4) for v in range(width)]
            factors = [b.spread(b.get(address, _F32)) for address in addresses[:ROWS]]
            return [b.muladd(factors[r], columns[v], sums[r * width + v]) for r in range(ROWS) for v in range(width)]

        sums = _loop(b, depth, [*a_rows, matrix], [4] * ROWS + [b_stride], sums, body)
        for r, row in enumerate(c_rows):
            for v in range(width):
                b.put(sums[r * width + v], row, v * LANES * 4)

    return emit


WIDE_COLUMNS, NARROW_COLUMNS = _WIDE * LANES, (16 // LANES) * LANES
# outer(a, a_stride, b, b_stride, depth, c, c_stride, scale): c = a b for ROWS rows, `depth` (at least 1) and
# WIDE_COLUMNS columns, in float32; outer_add and outer_add_narrow (16 columns): c[r] = scale[r] c[r] + a[r] b.
outer = _entry("outer", 8, _emit_outer(_WIDE, False))
outer_add = _entry("outer_add", 8, _emit_outer(_WIDE, True))
outer_add_narrow = _entry("outer_add_narrow", 8, _emit_outer(16 // LANES, True))


def _emit_softmax_page(b, scores, highest, total, factor):
    values = [b.get(scores, _VF, v * 4) for v in range(0, PAGE_TOKENS, LANES)]
    largest = values[0]
    for value in values[1:]:
        largest = b.select(b.fcmp_ordered(">", value, largest), value, largest)
    while largest.type.count > 1:
        half = largest.type.count // 2
        low, high = b.pick(largest, largest, range(half)), b.pick(largest, largest, range(half, 2 * half))
        largest = b.select(b.fcmp_ordered(">", high, low), high, low)
    largest = b.extract_element(largest, ir.Constant(_I32, 0))
    before = b.get(highest, _F32)
    now = b.select(b.fcmp_ordered(">", largest, before), largest, before)
    b.put(now, highest)
    # While nothing is visible, any finite number keeps e^(-inf - x) = 0 from becoming NaN.
    finite = b.select(b.fcmp_ordered("==", now, ir.Constant(_F32, float("-inf"))), ir.Constant(_F32, 0.0), now)
    shift = b.spread(finite)
    correction = _exp(b, b.fsub(b.spread(before), shift))
    b.put(b.extract_element(correction, ir.Constant(_I32, 0)), factor)
    running = b.fmul(b.get(total), correction)
    for v, value in enumerate(values):
        power = _exp(b, b.fsub(value, shift))
        b.put(power, scores, v * LANES * 4)
        running = b.fadd(running, power)
    b.put(running, total)


# softmax_page(scores, highest, total, factor): one step of the online softmax (Milakov and Gimelshein 2018). scores
# [PAGE_TOKENS] become e^(score - highest); highest: the largest score so far; total [LANES]: partial sums of the powers
# so far; factor: what earlier outputs must be multiplied by.
softmax_page = _entry("softmax_page", 4, _emit_softmax_page)

load_machine_code("emit", _assembly, _ENTRIES)
