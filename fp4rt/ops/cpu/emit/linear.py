"""Matrix products over rows of packed weights: straight from them for few tokens, from a decoded panel for many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from fp4rt.ops.cpu.emit.builder import (
    FLOAT, FLOATS, I1, I8, I64, INTS, LANES, ROWS, Builder, entry, function, i64, loop, splat,
)
from fp4rt.ops.cpu.emit.formats import FP4, LAYOUTS, NVFP4, dense_values, e2m1, fp4_scales, odd_words
from fp4rt.ops.cpu.runtime import TIER

# Tokens -> rows of one register tile; as many sums as the registers hold.
_TILES = {
    "avx512": {NVFP4: {1: 4, 2: 4, 4: 2}, None: {1: 4, 2: 4, 4: 4}},
    "avx2": {NVFP4: {1: 2, 2: 1}, None: {1: 4, 2: 4, 4: 2}},
    "portable": {NVFP4: {1: 2, 2: 1}, None: {1: 4, 2: 4, 4: 2}},
}[TIER]
TILE_TOKENS = {"avx512": 6, "avx2": 3, "portable": 3}[TIER]  # tokens of one tile of a many-token product

# -- A walk along rows --------------------------------------------------------------------------------------------


class _Walk:
    """A loop over the chunks of some rows, then once over a zero-padded copy of what follows the last whole one.

    The body is emitted once, between `enter` and `leave`; `state` are the vectors carried from chunk to chunk.
    """

    def __init__(self, b: Builder, kind: int, codes: list[ir.Value], scales: list[ir.Value], moving: ir.Value,
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
        zero = i64(0)
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
            b.prefetch(b.add(ahead_codes, i64(line)))
        for line in range(0, n * layout.scale_bytes if following and kind in FP4 else 0, 64):
            b.prefetch(b.add(ahead_scales, i64(line)))

    def _pad(self, size: int) -> ir.Value:
        buffer = self._b.alloca(ir.ArrayType(I8, size))
        buffer.align = 64
        return self._b.ptrtoint(buffer, I64)

    def _copy_tail(self, row: ir.Value, buffer: ir.Value, size: int, whole: ir.Value, tail: ir.Value) -> None:
        b = self._b
        for offset in range(0, size, LANES):
            b.put(splat(I8, 0), buffer, offset)
        source = b.add(row, b.mul(whole, i64(size)))
        b.intrinsic("llvm.memcpy.p0.p0.i64", ir.VoidType(), b.at(buffer, I8), b.at(source, I8), tail,
                    ir.Constant(I1, 0))

    def leave(self, state: list[ir.Value]) -> list[ir.Value]:
        """Close the loop; the builder goes on behind it. Returns the state after the last chunk."""
        b, layout = self._b, self._layout
        n, total = len(self.codes), len(self._phis)
        rows = n * (2 if layout.scale_bytes else 1)
        steps = [layout.code_bytes] * n + [layout.scale_bytes] * (rows - n)
        steps += [self._step, n * layout.code_bytes, n * layout.scale_bytes, -1]
        following = [b.add(phi, i64(step)) for phi, step in zip(self._phis, steps)]
        following += [self._phis[len(steps)], *state]
        end = b.block
        b.cbranch(b.icmp_signed(">", following[len(steps) - 1], i64(0)), self._loop, self._check)
        for phi, check, value in zip(self._phis, self._ends, following):
            phi.add_incoming(value, end)
            check.add_incoming(value, end)
        b.position_at_end(self._check)
        once_more = [*self._tails, *self._ends[rows:rows + 3], i64(1), ir.Constant(I1, 0),
                     *self._ends[total - len(state):]]
        b.cbranch(self._ends[len(steps)], self._loop, self._done)
        for phi, value in zip(self._phis, once_more):
            phi.add_incoming(value, self._check)
        b.position_at_end(self._done)
        return self._ends[total - len(state):]


def _row_sums(b: Builder, vectors: list[ir.Value]) -> ir.Value:
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
        last = b.sub(count, i64(1))
        index = [b.minimum(b.add(first, i64(r)), last) for r in range(rows)]
        ahead = rows * (2 if kind in FP4 else 1)  # rows: about 8 KiB at K = 2048
        following = [b.add(base, b.mul(b.add(first, i64(ahead)), stride))
                     for base, stride in ((codes, code_stride), (scales, scale_stride))]
        walk = _Walk(b, kind, [b.add(codes, b.mul(i, code_stride)) for i in index],
                     [b.add(scales, b.mul(i, scale_stride)) for i in index], x, LAYOUTS[kind].elements * 4,
                     whole, code_tail, scale_tail, [splat(FLOAT, 0.0)] * (rows * tokens), following)
        x_rows = [b.add(walk.moving, b.mul(x_stride, i64(t))) for t in range(tokens)]
        sums = {(r, t): walk.state[r * tokens + t] for r in range(rows) for t in range(tokens)}
        if kind in FP4:
            odd = odd_words(b, whole)
            block_scales = [fp4_scales(b, kind, address) for address in walk.scales]
            for u in range(2):
                dwords = [b.get(address, INTS, u * LANES * 4) for address in walk.codes]
                inner = {}
                for k in range(8):
                    values = [e2m1(b, word, k, odd) for word in dwords]
                    for t in range(tokens):
                        xv = b.get(x_rows[t], FLOATS, (u * 8 + k) * LANES * 4)
                        for r in range(rows):
                            inner[r, t] = b.muladd(values[r], xv, inner[r, t]) if k else b.fmul(values[r], xv)
                sums = {(r, t): b.muladd(inner[r, t], block_scales[r][u], total) for (r, t), total in sums.items()}
        else:
            for pair in range(2):
                values = [dense_values(b, kind, *addresses, pair) for addresses in zip(walk.codes, walk.scales)]
                for i in range(2):
                    for t in range(tokens):
                        xv = b.get(x_rows[t], FLOATS, (pair * 2 + i) * LANES * 4)
                        for r in range(rows):
                            sums[r, t] = b.muladd(values[r][i], xv, sums[r, t])
        totals = walk.leave(list(sums.values()))
        for t in range(tokens):
            b.put(_row_sums(b, [totals[r * tokens + t] for r in range(rows)]),
                  b.add(b.add(y, b.mul(first, i64(4))), b.mul(y_stride, i64(t))))

    return emit


def _emit_dot_rows(b, kind, tokens, *args):
    addresses, x, x_stride, y, y_stride, rows = args[:4], args[4], args[5], args[10], args[11], args[9]
    done, other = (b.function.append_basic_block(name) for name in ("end", "other"))
    switch = b.switch(b.add(b.mul(kind, i64(8)), tokens), other)
    for each in LAYOUTS:
        tiles = _TILES[NVFP4 if each in FP4 else None]
        for count in (1, 2, 4):
            part = max(t for t in tiles if t <= count)
            height = tiles[part]
            block = b.function.append_basic_block(f"case{each}.{count}")
            switch.add_case(i64(each * 8 + count), block)
            b.position_at_end(block)
            dot = function(f"dot.{each}.{height}x{part}", 13, _emit_dot(each, height, part))

            def group(at, _):
                for t in range(0, count, part):
                    inputs, outputs = (b.add(base, b.mul(stride, i64(t))) for base, stride in (
                        (x, x_stride), (y, y_stride)))
                    for first in range(0, ROWS, height):
                        b.call(dot, [*addresses, inputs, *args[5:10], outputs, y_stride, b.add(at[0], i64(first))])
                return []

            groups = b.sdiv(b.add(rows, i64(ROWS - 1)), i64(ROWS))
            loop(b, groups, [i64(0)], [ROWS], [], group)
            b.branch(done)
    b.position_at_end(other)
    b.unreachable()
    b.position_at_end(done)


# dot_rows(kind, tokens, codes, code_stride, scales, scale_stride, x, x_stride, whole, code_tail, scale_tail, rows, y,
# y_stride): y[t, r] = sum of row r times x[t], for 1, 2 or 4 tokens. x: float32 rows x_stride bytes apart, in the order
# above, zero beyond the row's end. y: float32 rows y_stride bytes apart, with room for `rows` rounded up to ROWS.
dot_rows = entry("dot_rows", 14, _emit_dot_rows)


# -- Many tokens: a panel of decoded rows, times all tokens -------------------------------------------------------


def _emit_decode(kind: int) -> Callable[..., None]:
    def emit(b, codes, scales, whole, code_tail, scale_tail, out):
        walk = _Walk(b, kind, [codes], [scales], out, LAYOUTS[kind].elements * 4, whole, code_tail, scale_tail, [])
        if kind in FP4:
            odd = odd_words(b, whole)
            for u, scale in enumerate(fp4_scales(b, kind, walk.scales[0])):
                dwords = b.get(walk.codes[0], INTS, u * LANES * 4)
                for k in range(8):
                    b.put(b.fmul(e2m1(b, dwords, k, odd), scale), walk.moving, (u * 8 + k) * LANES * 4)
        else:
            for pair in range(2):
                for i, value in enumerate(dense_values(b, kind, walk.codes[0], walk.scales[0], pair)):
                    b.put(value, walk.moving, (pair * 2 + i) * LANES * 4)
        walk.leave([])

    return emit


def _emit_decode_row(b, kind, *args):
    done, other = (b.function.append_basic_block(name) for name in ("end", "other"))
    switch = b.switch(kind, other)
    for each in LAYOUTS:
        block = b.function.append_basic_block(f"case{each}")
        switch.add_case(i64(each), block)
        b.position_at_end(block)
        b.call(function(f"decode.{each}", 6, _emit_decode(each)), args)
        b.branch(done)
    b.position_at_end(other)
    b.unreachable()
    b.position_at_end(done)


# decode_row(kind, codes, scales, whole, code_tail, scale_tail, out): the values of one row in the order above,
# float32, block scales applied, zero beyond the end.
decode_row = entry("decode_row", 7, _emit_decode_row)


def _emit_tile(b, w, w_stride, x, x_stride, vectors, y, y_stride):
    w_rows = [b.add(w, b.mul(w_stride, i64(r))) for r in range(ROWS)]
    x_rows = [b.add(x, b.mul(x_stride, i64(t))) for t in range(TILE_TOKENS)]

    def body(addresses, sums):
        weights = [b.get(address) for address in addresses[:ROWS]]
        tokens = [b.get(address) for address in addresses[ROWS:]]
        return [b.muladd(wv, xv, sums[t * ROWS + r]) for t, xv in enumerate(tokens) for r, wv in enumerate(weights)]

    sums = loop(b, vectors, w_rows + x_rows, [LANES * 4] * (ROWS + TILE_TOKENS),
                 [splat(FLOAT, 0.0)] * (ROWS * TILE_TOKENS), body)
    for t in range(TILE_TOKENS):
        address = b.add(y, b.mul(y_stride, i64(t)))
        partial = _row_sums(b, sums[t * ROWS:(t + 1) * ROWS])
        b.put(b.fadd(b.get(address, partial.type), partial), address)


# tile(w, w_stride, x, x_stride, vectors, y, y_stride): y[t, r] += w[r] . x[t] for ROWS rows and TILE_TOKENS tokens of
# `vectors` times LANES float32.
tile = entry("tile", 7, _emit_tile)
