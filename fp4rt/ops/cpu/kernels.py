"""The operations as compiled functions: who computes which rows, around the inner loops of emit.py.

Each is one parallel region over `threads` static shares (a many-token product and a long prompt's attention prepare
their operands in one more). No result depends on the number of threads: a thread owns whole rows of an output.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fp4rt.batch import PAGE_TOKENS
from fp4rt.ops.cpu.emit import (
    FP8_BLOCK, LANES, LAYOUTS, NARROW_COLUMNS, NVFP4, ROWS, TILE_TOKENS, WIDE_COLUMNS, decode_row, dot_rows, outer,
    outer_add, outer_add_narrow, silu_mul, softmax_page, tile,
)
from fp4rt.ops.cpu.runtime import compiled

FEW_TOKENS = 8            # up to here a product reads the packed weight for every one, two or four tokens
PADDING = 16 * LANES      # prepared activations are padded with zeros to a multiple of this
PANEL_ROWS = 32           # a panel of decoded weights: rows x columns, float32, in the second-level cache
PANEL_COLUMNS = 1024
QUERY_ROWS = 32           # query rows (tokens times heads that share a K/V head) of one attention block

# Columns of the int64 table that describes the parts of a linear. SCALES is an address, or for FP8_BLOCK an index
# into the block scales; VIEW is the prepared input that the part reads.
(KIND, ROW_COUNT, CODES, CODE_STRIDE, SCALES, SCALE_STRIDE, CODE_BYTES, SCALE_BYTES, ELEMENTS, CODE_TAIL, SCALE_TAIL,
 BLOCK_ROWS, BLOCK_COLUMNS, VIEW, FIELDS) = range(15)

_LANES, _NVFP4, _FP8_BLOCK = LANES, NVFP4, FP8_BLOCK


@njit(fastmath={"reassoc", "contract"}, inline="never")
def _sum_of_squares(x):
    total = np.float32(0)
    for value in x:
        total += value * value
    return total


@njit
def _prepare(x, norm_weight, eps, input_scale, permuted, natural, out):
    """One token's input as a part reads it: RMS-normed, scaled, permuted, padded. natural: room for PADDING more."""
    k = len(x)
    if len(norm_weight):
        inverse = np.float32(1) / np.sqrt(_sum_of_squares(x) / np.float32(k) + np.float32(eps))
        for i in range(k):
            natural[i] = x[i] * inverse * norm_weight[i]
    else:
        natural[:k] = x
    if len(input_scale):
        for i in range(k):
            natural[i] *= input_scale[i]
    natural[k:len(out)] = 0
    if not permuted:
        out[:] = natural[:len(out)]
        return
    for chunk in range(0, len(out), 16 * _LANES):
        for half in range(2):
            for k8 in range(8):
                at = chunk + (half * 8 + k8) * _LANES
                source = chunk + half * 8 * _LANES + k8
                for lane in range(_LANES):
                    out[at + lane] = natural[source + 8 * lane]


@njit
def _expand_scales(row, part, block_scales, columns, known, out):
    """The scales of ROWS rows of an FP8 weight in blocks, one float32 for each column; a row already there stays."""
    across = part[SCALE_STRIDE]
    for r in range(ROWS):
        block = min(row + r, part[ROW_COUNT] - 1) // part[BLOCK_ROWS]
        if known[r] == block:
            continue
        known[r] = block
        first = part[SCALES] + block * across
        for b in range(across):
            start = b * part[BLOCK_COLUMNS]
            out[r, start:min(start + part[BLOCK_COLUMNS], columns)] = block_scales[first + b]
        out[r, columns:] = 0


@njit
def _dot(part, row, height, block_scales, columns, known, expanded, xs, tokens, sums):
    """sums[t, r] = product of row + r and token t, for `height` rows and at most FEW_TOKENS tokens, without row scales."""
    step = ROWS if part[KIND] == _FP8_BLOCK else height
    for r in range(0, height, step):
        scales, stride = part[SCALES] + (row + r) * part[SCALE_STRIDE], part[SCALE_STRIDE]
        if part[KIND] == _FP8_BLOCK:
            _expand_scales(row + r, part, block_scales, columns, known, expanded)
            scales, stride = expanded.ctypes.data, expanded.strides[0]
        done = 0
        while done < tokens:
            count = 4 if tokens - done >= 4 else 2 if tokens - done >= 2 else 1
            dot_rows(part[KIND], count, part[CODES] + (row + r) * part[CODE_STRIDE], part[CODE_STRIDE], scales, stride,
                     xs[done:].ctypes.data, xs.strides[0], columns // part[ELEMENTS], part[CODE_TAIL],
                     part[SCALE_TAIL], min(step, height - r), sums[done, r:].ctypes.data, sums.strides[0])
            done += count


@njit
def _share(rows, share, threads):
    """The first row and the row behind the last of a thread, whole groups of ROWS except at the end."""
    groups = (rows + ROWS - 1) // ROWS
    return groups * share // threads * ROWS, min(groups * (share + 1) // threads * ROWS, rows)


@compiled(parallel=True)
def linear_few(parts, row_scale, bias, input_scales, permuted, block_scales, x, norm_weight, eps, residual, gated, out,
               prepared, threads):
    """y = x W^T with its neighbours for at most FEW_TOKENS tokens, straight from the packed weight.

    parts: int64 [parts, FIELDS]. row_scale, bias: float32 [rows of all parts]; bias may be empty. input_scales [views,
    K] or [0, 0]. permuted: bool [views]. x [T, K]; norm_weight [K] or empty. residual [T, N] or [0, 0]; may be `out`.
    prepared: scratch, float32 [views, T, K rounded up to PADDING].
    """
    tokens, columns = x.shape
    padded = prepared.shape[2]
    natural = np.empty(padded, np.float32)
    for view in range(len(permuted)):
        for t in range(tokens):
            _prepare(x[t], norm_weight, eps, input_scales[view] if len(input_scales) else row_scale[:0],
                     permuted[view], natural, prepared[view, t])
    for share in prange(threads):
        sums = np.empty((2, tokens, PANEL_ROWS), np.float32)
        known = np.empty(ROWS, np.int64)
        expanded = np.empty((ROWS, padded if np.any(parts[:, KIND] == _FP8_BLOCK) else 0), np.float32)
        offset = 0
        for index in range(1 if gated else len(parts)):
            rows = parts[index, ROW_COUNT]
            first, last = _share(rows, share, threads)
            for row in range(first, last, PANEL_ROWS):
                height = min(PANEL_ROWS, last - row)
                for each in range(2 if gated else 1):
                    part = parts[index + each]
                    known[:] = -1
                    _dot(part, row, height, block_scales, columns, known, expanded, prepared[part[VIEW]], tokens,
                         sums[each])
                _store(sums, row, height, tokens, offset, rows, row_scale, bias, gated, residual, out)
            offset += rows


@njit
def _store(sums, row, height, tokens, offset, rows, row_scale, bias, gated, residual, out):
    """Finish the sums of `height` rows and put them, or their sum with the residual, in their place."""
    for each in range(2 if gated else 1):
        at = offset + each * rows + row
        scale = row_scale[at:at + height]
        for t in range(tokens):
            for r in range(height):
                sums[each, t, r] *= scale[r]
        if len(bias):
            added = bias[at:at + height]
            for t in range(tokens):
                for r in range(height):
                    sums[each, t, r] += added[r]
    if gated:
        silu_mul(sums[0].ctypes.data, sums[1].ctypes.data, tokens * sums.shape[2] // _LANES)
    at = offset + row
    for t in range(tokens):
        if len(residual):
            for r in range(height):
                out[t, at + r] = residual[t, at + r] + sums[0, t, r]
        else:
            for r in range(height):
                out[t, at + r] = sums[0, t, r]


@compiled(parallel=True)
def linear_many(parts, row_scale, bias, input_scales, permuted, block_scales, x, norm_weight, eps, residual, gated, out,
                prepared, panels, products, threads):
    """linear_few for any number of tokens: rows are decoded into a panel, which multiplies all tokens.

    prepared: [views, T rounded up to TILE_TOKENS, padded K]. panels: float32 [threads, PANEL_ROWS, PANEL_COLUMNS].
    products: float32 [threads, 2, T rounded up, PANEL_ROWS].
    """
    tokens, columns = x.shape
    tiled, padded = prepared.shape[1], prepared.shape[2]
    for t in prange(tiled):
        natural = np.empty(padded, np.float32)
        for view in range(len(permuted)):
            if t < tokens:
                _prepare(x[t], norm_weight, eps, input_scales[view] if len(input_scales) else row_scale[:0],
                         permuted[view], natural, prepared[view, t])
            else:
                prepared[view, t] = 0
    for share in prange(threads):
        panel, product = panels[share], products[share]
        known = np.empty(ROWS, np.int64)
        expanded = np.empty((ROWS, padded if np.any(parts[:, KIND] == _FP8_BLOCK) else 0), np.float32)
        offset = 0
        for index in range(1 if gated else len(parts)):
            rows = parts[index, ROW_COUNT]
            first, last = _share(rows, share, threads)
            for row in range(first, last, PANEL_ROWS):
                height = min(PANEL_ROWS, last - row)
                for each in range(2 if gated else 1):
                    part = parts[index + each]
                    _panel_product(part, row, height, block_scales, columns, known, expanded, prepared[part[VIEW]], panel,
                                   product[each])
                _store(product, row, height, tokens, offset, rows, row_scale, bias, gated, residual, out)
            offset += rows


@njit
def _panel_product(part, row, height, block_scales, columns, known, expanded, xs, panel, product):
    """product[t, r] = sum over the columns of row + r times xs[t], without row scales."""
    product[:] = 0
    for column in range(0, columns, PANEL_COLUMNS):
        here = min(PANEL_COLUMNS, columns - column)
        whole = here // part[ELEMENTS]
        rest = here - whole * part[ELEMENTS]
        chunk = column // part[ELEMENTS]
        known[:] = -1
        for r in range(height):
            scales = part[SCALES] + (row + r) * part[SCALE_STRIDE] + chunk * part[SCALE_BYTES]
            if part[KIND] == _FP8_BLOCK:
                if r % ROWS == 0:
                    _expand_scales(row + r, part, block_scales, columns, known, expanded)
                scales = expanded[r % ROWS, column:].ctypes.data
            decode_row(part[KIND], part[CODES] + (row + r) * part[CODE_STRIDE] + chunk * part[CODE_BYTES], scales,
                       whole, part[CODE_TAIL] if rest else 0, part[SCALE_TAIL] if rest else 0, panel[r].ctypes.data)
        vectors = (whole + (rest > 0)) * part[ELEMENTS] // _LANES
        for t in range(0, len(xs), TILE_TOKENS):
            for r in range(0, height, ROWS):
                tile(panel[r].ctypes.data, panel.strides[0], xs[t, column:].ctypes.data, xs.strides[0], vectors,
                     product[t, r:].ctypes.data, product.strides[0])


# -- Attention ----------------------------------------------------------------------------------------------------


@njit
def _turn(head, norm_weight, eps, cos, sin):
    """RMS-norm and rotate one head of one token in place; an empty weight or table leaves it out."""
    dim = len(head)
    if len(norm_weight):
        inverse = np.float32(1) / np.sqrt(_sum_of_squares(head) / np.float32(dim) + np.float32(eps))
        for d in range(dim):
            head[d] = head[d] * inverse * norm_weight[d]
    for d in range(len(cos)):
        low, high = head[d], head[d + len(cos)]
        head[d] = low * cos[d] - high * sin[d]
        head[d + len(cos)] = high * cos[d] + low * sin[d]


@njit
def _open_token(row, heads, keys, values, page, slot, q_norm, q_eps, k_norm, k_eps, cos, sin):
    """Norm and rotate a token's q and k in place; write k and v to their page."""
    kv_heads, dim = keys.shape[1], keys.shape[2]
    for h in range(heads):
        _turn(row[h * dim:(h + 1) * dim], q_norm, q_eps, cos, sin)
    for h in range(kv_heads):
        k = row[(heads + h) * dim:(heads + h + 1) * dim]
        _turn(k, k_norm, k_eps, cos, sin)
        v = row[(heads + kv_heads + h) * dim:(heads + kv_heads + h + 1) * dim]
        for d in range(dim):
            keys[page, h, d, slot] = k[d]
            values[page, h, slot, d] = v[d]


@compiled(parallel=True)
def attention(qkv, keys, values, positions, starts, pages, cos, sin, q_norm, q_eps, k_norm, k_eps, heads, scale, window,
              out, threads):
    """Attention over pages; see Ops.attention. q and k in `qkv` are normed and rotated in place.

    keys: float32 [pages, Hk, hd, PAGE_TOKENS] (so that scores of a page are sums of whole vectors), values: float32
    [pages, Hk, PAGE_TOKENS, hd rounded up to 16]. cos, sin [positions, hd/2] or [0, 0]. window: 0 for none.
    """
    tokens, sequences = len(qkv), len(starts) - 1
    kv_heads, dim, wide = keys.shape[1], keys.shape[2], values.shape[3]
    group = heads // kv_heads
    block_tokens = max(1, QUERY_ROWS // group)
    owner = np.empty(tokens, np.int64)
    blocks = np.empty((tokens, 2), np.int64)  # a block's sequence and first token
    count = 0
    for s in range(sequences):
        owner[starts[s]:starts[s + 1]] = s
        for t in range(starts[s], starts[s + 1], block_tokens):
            blocks[count, 0], blocks[count, 1] = s, t
            count += 1
    if tokens <= FEW_TOKENS:
        for t in range(tokens):
            at = positions[t]
            rope = at if len(cos) else 0
            _open_token(qkv[t], heads, keys, values, pages[owner[t], at // PAGE_TOKENS], at % PAGE_TOKENS, q_norm, q_eps,
                        k_norm, k_eps, cos[rope] if len(cos) else q_norm[:0], sin[rope] if len(sin) else q_norm[:0])
    else:
        for t in prange(tokens):
            at = positions[t]
            _open_token(qkv[t], heads, keys, values, pages[owner[t], at // PAGE_TOKENS], at % PAGE_TOKENS, q_norm, q_eps,
                        k_norm, k_eps, cos[at] if len(cos) else q_norm[:0], sin[at] if len(sin) else q_norm[:0])
    for share in prange(threads):
        room = (block_tokens * group + ROWS - 1) // ROWS * ROWS
        q = np.empty((room, dim), np.float32)
        scores = np.empty((room, PAGE_TOKENS), np.float32)
        sums = np.empty((room, wide), np.float32)
        highest, factor = np.empty(room, np.float32), np.empty(room, np.float32)
        total = np.empty((room, _LANES), np.float32)
        for item in range(share, count * kv_heads, threads):
            block, head = item // kv_heads, item % kv_heads
            s, first = blocks[block]
            rows = min(block_tokens, starts[s + 1] - first) * group
            filled = (rows + ROWS - 1) // ROWS * ROWS
            for r in range(rows):
                source = qkv[first + r // group]
                at = (head * group + r % group) * dim
                for d in range(dim):
                    q[r, d] = source[at + d] * scale
            q[rows:filled] = 0
            highest[:filled] = -np.inf
            factor[:filled] = 0
            total[:filled] = 0
            sums[:filled] = 0
            earliest, latest = positions[first], positions[first + rows // group - 1]
            begin = max(0, earliest - window + 1) if window else 0
            for number in range(begin // PAGE_TOKENS, latest // PAGE_TOKENS + 1):
                page, base = pages[s, number], number * PAGE_TOKENS
                key, value = keys[page, head], values[page, head]
                low, high = max(0, begin - base), min(PAGE_TOKENS, latest + 1 - base)
                for r in range(0, filled, ROWS):
                    for column in range(0, PAGE_TOKENS, WIDE_COLUMNS):
                        outer(q[r].ctypes.data, q.strides[0], key[0, column:].ctypes.data, key.strides[0], dim,
                              scores[r, column:].ctypes.data, scores.strides[0], 0)
                for r in range(rows):
                    at = earliest + r // group
                    if window and at - window + 1 > base:
                        scores[r, :min(PAGE_TOKENS, at - window + 1 - base)] = -np.inf
                    if at + 1 < base + PAGE_TOKENS:
                        scores[r, max(0, at + 1 - base):] = -np.inf
                    softmax_page(scores[r].ctypes.data, highest[r:].ctypes.data, total[r].ctypes.data,
                                 factor[r:].ctypes.data)
                for r in range(0, filled, ROWS):
                    weights, scaling = scores[r, low:].ctypes.data, factor[r:].ctypes.data
                    column = 0
                    while column + WIDE_COLUMNS <= wide:
                        outer_add(weights, scores.strides[0], value[low, column:].ctypes.data, value.strides[0],
                                  high - low, sums[r, column:].ctypes.data, sums.strides[0], scaling)
                        column += WIDE_COLUMNS
                    while column < wide:
                        outer_add_narrow(weights, scores.strides[0], value[low, column:].ctypes.data, value.strides[0],
                                         high - low, sums[r, column:].ctypes.data, sums.strides[0], scaling)
                        column += NARROW_COLUMNS
            for r in range(rows):
                inverse = np.float32(1) / total[r].sum()
                at = (head * group + r % group) * dim
                for d in range(dim):
                    out[first + r // group, at + d] = sums[r, d] * inverse
