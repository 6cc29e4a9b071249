"""The operations as compiled functions: who computes which rows, around the inner loops of emit/.

Each is one or two parallel regions over `threads` static shares. No result depends on the number of threads: a
thread owns whole rows of an output.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from fp4rt.batch import PAGE_TOKENS
from fp4rt.ops.cpu.emit import (
    FP8, FP8_BLOCK, LANES, NARROW_COLUMNS, ROWS, TILE_TOKENS, WIDE_COLUMNS, decode_row, dot_rows, outer,
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


@njit(fastmath={"reassoc", "contract"})
def _sum_of_squares(x):
    total = np.float32(0)
    for value in x:
        total += value * value
    return total


@njit
def _prepare(x, norm_weight, eps, input_scales, view, permuted, natural, out):
    """One token's input as a part reads it: RMS-normed, scaled, permuted, padded. natural: as long as out."""
    k = len(x)
    inverse = np.float32(1)
    if len(norm_weight):
        inverse /= np.sqrt(_sum_of_squares(x) / np.float32(k) + np.float32(eps))
    target = natural if permuted else out
    for i in range(k):
        target[i] = x[i] * inverse * norm_weight[i] if len(norm_weight) else x[i]
    if len(input_scales):
        for i in range(k):
            target[i] *= input_scales[view, i]
    for i in range(k, len(out)):
        target[i] = 0
    if not permuted:
        return
    for chunk in range(0, len(out), 16 * LANES):
        for half in range(2):
            for nibble in range(8):
                at = chunk + (half * 8 + nibble) * LANES
                source = chunk + half * 8 * LANES + nibble
                for lane in range(LANES):
                    out[at + lane] = natural[source + 8 * lane]


@njit
def _expand_scales(row, part, block_scales, columns, known, out):
    """The scales of ROWS rows of an FP8 weight in blocks, one float32 for each column; a row already there stays."""
    across, width = part[SCALE_STRIDE], part[BLOCK_COLUMNS]
    for r in range(ROWS):
        block = min(row + r, part[ROW_COUNT] - 1) // part[BLOCK_ROWS]
        if known[r] == block:
            continue
        known[r] = block
        first = part[SCALES] + block * across
        for b in range(across):
            for i in range(b * width, min((b + 1) * width, columns)):
                out[r, i] = block_scales[first + b]
        for i in range(columns, out.shape[1]):
            out[r, i] = 0


@njit
def _fused(part, row, height, block_scales, columns, known, expanded, xs, tokens, sums):
    """sums[t, r] = product of row + r and token t, at most FEW_TOKENS of them, straight from the packed weight."""
    step = ROWS if part[KIND] == FP8_BLOCK else height
    for r in range(0, height, step):
        scales, stride = part[SCALES] + (row + r) * part[SCALE_STRIDE], part[SCALE_STRIDE]
        if part[KIND] == FP8_BLOCK:
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
def _panel_product(part, row, height, block_scales, columns, known, expanded, xs, tokens, sums, panel):
    """The same for any number of tokens: rows are decoded into the panel, which multiplies all tokens."""
    tiled = (tokens + TILE_TOKENS - 1) // TILE_TOKENS * TILE_TOKENS
    for t in range(tiled):
        for r in range(PANEL_ROWS):
            sums[t, r] = 0
    for column in range(0, columns, PANEL_COLUMNS):
        here = min(PANEL_COLUMNS, columns - column)
        whole = here // part[ELEMENTS]
        rest = here - whole * part[ELEMENTS]
        chunk = column // part[ELEMENTS]
        for r in range(height):
            scales = part[SCALES] + (row + r) * part[SCALE_STRIDE] + chunk * part[SCALE_BYTES]
            if part[KIND] == FP8_BLOCK:
                if r % ROWS == 0:
                    _expand_scales(row + r, part, block_scales, columns, known, expanded)
                scales = expanded[r % ROWS, column:].ctypes.data
            decode_row(part[KIND], part[CODES] + (row + r) * part[CODE_STRIDE] + chunk * part[CODE_BYTES], scales,
                       whole, part[CODE_TAIL] if rest else 0, part[SCALE_TAIL] if rest else 0, panel[r].ctypes.data)
        vectors = (whole + (rest > 0)) * part[ELEMENTS] // LANES
        for t in range(0, tiled, TILE_TOKENS):
            for r in range(0, height, ROWS):
                tile(panel[r].ctypes.data, panel.strides[0], xs[t, column:].ctypes.data, xs.strides[0], vectors,
                     sums[t, r:].ctypes.data, sums.strides[0])


@njit
def _store(sums, row, height, tokens, offset, rows, row_scale, bias, gated, residual, out):
    """Row scales, biases, silu(gate) * up; then the results, or their sum with the residual, go to their place."""
    for each in range(2 if gated else 1):
        at = offset + each * rows + row
        for t in range(tokens):
            for r in range(height):
                sums[each, t, r] *= row_scale[at + r]
            if len(bias):
                for r in range(height):
                    sums[each, t, r] += bias[at + r]
    if gated:
        silu_mul(sums[0].ctypes.data, sums[1].ctypes.data, tokens * PANEL_ROWS // LANES)
    at = offset + row
    for t in range(tokens):
        if len(residual):
            for r in range(height):
                out[t, at + r] = residual[t, at + r] + sums[0, t, r]
        else:
            for r in range(height):
                out[t, at + r] = sums[0, t, r]


@compiled(parallel=True)
def linear(parts, row_scale, bias, input_scales, permuted, block_scales, x, norm_weight, eps, residual, gated, fused,
           out, prepared, sums, panels, threads):
    """y = x W^T with its neighbours.

    parts: int64 [parts, FIELDS]. row_scale, bias: float32 [rows of all parts]; bias may be empty. input_scales [views,
    K] or [0, 0]. permuted: bool [views]. x [T, K]; norm_weight [K] or empty. residual [T, N] or [0, 0]; may be `out`.
    fused: read the packed weight for every one, two or four tokens (T <= FEW_TOKENS), else decode panels of rows.
    Scratch, float32: prepared [views, T', K rounded up to PADDING], sums [threads, 2, T', PANEL_ROWS] with T' = T
    rounded up to TILE_TOKENS, panels [threads, PANEL_ROWS, PANEL_COLUMNS].
    """
    tokens, columns = x.shape
    padded = prepared.shape[2]
    in_blocks = False
    for part in parts:
        in_blocks |= part[KIND] == FP8_BLOCK
    if tokens <= FEW_TOKENS:
        natural = np.empty(padded, np.float32)
        for view in range(len(permuted)):
            for t in range(tokens):
                _prepare(x[t], norm_weight, eps, input_scales, view, permuted[view], natural, prepared[view, t])
    else:
        for share in prange(threads):
            natural = np.empty(padded, np.float32)
            for t in range(share, tokens, threads):
                for view in range(len(permuted)):
                    _prepare(x[t], norm_weight, eps, input_scales, view, permuted[view], natural, prepared[view, t])
    for index in prange(threads):
        share = np.int64(index)  # prange counts in uint64, which with int64 would make float64
        known = np.empty(ROWS, np.int64)
        expanded = np.empty((ROWS, padded if in_blocks else 0), np.float32)
        offset = 0
        for first in range(1 if gated else len(parts)):
            rows = parts[first, ROW_COUNT]
            groups = (rows + ROWS - 1) // ROWS
            last = min(groups * (share + 1) // threads * ROWS, rows)
            for row in range(groups * share // threads * ROWS, last, PANEL_ROWS):
                height = min(PANEL_ROWS, last - row)
                for each in range(2 if gated else 1):
                    part = parts[first + each]
                    for r in range(ROWS):
                        known[r] = -1
                    if fused:
                        _fused(part, row, height, block_scales, columns, known, expanded, prepared[part[VIEW]], tokens,
                               sums[share, each])
                    else:
                        _panel_product(part, row, height, block_scales, columns, known, expanded, prepared[part[VIEW]],
                                       tokens, sums[share, each], panels[share])
                _store(sums[share], row, height, tokens, offset, rows, row_scale, bias, gated, residual, out)
            offset += rows


# -- Attention ----------------------------------------------------------------------------------------------------


@njit
def _turn(head, norm_weight, eps, cos, sin, at):
    """RMS-norm and rotate one head of one token in place; an empty weight or table leaves it out."""
    dim, half = len(head), cos.shape[1]
    if len(norm_weight):
        inverse = np.float32(1) / np.sqrt(_sum_of_squares(head) / np.float32(dim) + np.float32(eps))
        for d in range(dim):
            head[d] = head[d] * inverse * norm_weight[d]
    for d in range(half):
        low, high = head[d], head[d + half]
        head[d] = low * cos[at, d] - high * sin[at, d]
        head[d + half] = high * cos[at, d] + low * sin[at, d]


@njit
def _to_e4m3(x):
    """As formats.fp8.to_e4m3: a multiple of the step between codes of x's size."""
    size = min(abs(x), np.float32(448)) if x == x else np.float32(448)
    exponent = math.frexp(max(size, np.float32(2.0**-6)))[1]  # below the first normal, steps are as there
    code = (exponent + 6) * 8 + np.rint(math.ldexp(size, 4 - exponent)) - 8
    return np.uint8(code + (128 if math.copysign(np.float32(1), x) < 0 else 0))


@njit
def _open_token(row, heads, keys, values, k_scale, v_scale, page, slot, q_norm, q_eps, k_norm, k_eps, cos, sin, at):
    """Norm and rotate a token's q and k in place; write k and v to their page. A row of q alone writes nothing."""
    codes = keys.itemsize == 1
    kv_heads, dim = keys.shape[1], keys.shape[2]
    own = len(row) > heads * dim
    for h in range(heads + kv_heads if own else heads):
        of_k = h >= heads
        _turn(row[h * dim:(h + 1) * dim], k_norm if of_k else q_norm, k_eps if of_k else q_eps, cos, sin, at)
    k, v = heads * dim, (heads + kv_heads) * dim
    for h in range(kv_heads if own else 0):
        for d in range(dim):
            key, value = row[k + h * dim + d], row[v + h * dim + d]
            keys[page, h, d, slot] = _to_e4m3(key / k_scale) if codes else key
            values[page, h, slot, d] = _to_e4m3(value / v_scale) if codes else value


@compiled(parallel=True)
def attention(qkv, keys, values, k_scale, v_scale, positions, starts, pages, cos, sin, q_norm, q_eps, k_norm, k_eps,
              heads, scale, window, sinks, out, threads):
    """Attention over pages; see Ops.attention. q and k in `qkv` are normed and rotated in place.

    qkv: q, k and v of each token, v as it is to be written; or q alone, and nothing is written. sinks: [H] or empty.

    keys: [pages, Hk, hd, PAGE_TOKENS] (so that scores of a page are sums of whole vectors), values: [pages, Hk,
    PAGE_TOKENS, hd rounded up to 16]; both float32, or uint8: E4M3 codes in units of k_scale and v_scale (else 1).
    cos, sin [positions, hd/2] or [0, 0]. window: 0 for none.
    """
    codes = keys.itemsize == 1
    decoded = np.float32(256) if codes else np.float32(1)  # decode_row gives a code's value times 2^-8
    scale, v_scale_back = scale * k_scale * decoded, v_scale * decoded
    tokens, sequences = len(qkv), len(starts) - 1
    kv_heads, dim, wide = keys.shape[1], keys.shape[2], values.shape[3]
    group = heads // kv_heads
    block_tokens = max(1, QUERY_ROWS // group)
    owner = np.empty(tokens, np.int64)
    blocks = np.empty((tokens, 2), np.int64)  # a block's sequence and first token
    count = 0
    for s in range(sequences):
        for t in range(starts[s], starts[s + 1]):
            owner[t] = s
            if (t - starts[s]) % block_tokens == 0:
                blocks[count, 0], blocks[count, 1] = s, t
                count += 1
    openers = threads if tokens > FEW_TOKENS else 1
    for share in prange(openers):
        for t in range(share, tokens, openers):
            at = positions[t]
            page = pages[owner[t], at // PAGE_TOKENS]
            _open_token(qkv[t], heads, keys, values, k_scale, v_scale, page, at % PAGE_TOKENS, q_norm, q_eps, k_norm,
                        k_eps, cos, sin, at)
    for share in prange(threads):
        room = (block_tokens * group + ROWS - 1) // ROWS * ROWS
        q = np.empty((room, dim), np.float32)
        scores = np.empty((room, PAGE_TOKENS), np.float32)
        sums = np.empty((room, wide), np.float32)
        highest, factor = np.empty(room, np.float32), np.empty(room, np.float32)
        total = np.empty((room, LANES), np.float32)
        key_tile = np.empty((dim, PAGE_TOKENS) if codes else (0, 0), np.float32)
        value_tile = np.empty((PAGE_TOKENS, wide) if codes else (0, 0), np.float32)
        for item in range(share, count * kv_heads, threads):
            block, head = item // kv_heads, item % kv_heads
            s, first = blocks[block, 0], blocks[block, 1]
            rows = min(block_tokens, starts[s + 1] - first) * group
            filled = (rows + ROWS - 1) // ROWS * ROWS
            for r in range(filled):
                token, at = first + min(r, rows - 1) // group, (head * group + r % group) * dim
                for d in range(dim):
                    q[r, d] = qkv[token, at + d] * scale
                for d in range(wide):
                    sums[r, d] = 0
                for lane in range(LANES):
                    total[r, lane] = 0
                highest[r], factor[r] = -np.inf, 0
            earliest, latest = positions[first], positions[first + rows // group - 1]
            begin = max(0, earliest - window + 1) if window else 0
            for number in range(begin // PAGE_TOKENS, latest // PAGE_TOKENS + 1):
                page, base = pages[s, number], number * PAGE_TOKENS
                key, value = keys[page, head], values[page, head]
                low, high = max(0, begin - base), min(PAGE_TOKENS, latest + 1 - base)
                key_at, value_at = key.ctypes.data, value.ctypes.data
                if codes:
                    key_at, value_at = key_tile.ctypes.data, value_tile.ctypes.data
                    decode_row(FP8, key.ctypes.data, 0, key.size // (4 * LANES), 0, 0, key_at)
                    decode_row(FP8, value.ctypes.data, 0, value.size // (4 * LANES), 0, 0, value_at)
                for r in range(0, filled, ROWS):
                    for column in range(0, PAGE_TOKENS, WIDE_COLUMNS):
                        outer(q[r].ctypes.data, q.strides[0], key_at + column * 4, PAGE_TOKENS * 4, dim,
                              scores[r, column:].ctypes.data, scores.strides[0], 0)
                for r in range(rows):
                    at = earliest + r // group - base  # the row's own position, counted from the page's first
                    if window:
                        for column in range(min(PAGE_TOKENS, at - window + 1)):
                            scores[r, column] = -np.inf
                    for column in range(max(0, at + 1), PAGE_TOKENS):
                        scores[r, column] = -np.inf
                    softmax_page(scores[r].ctypes.data, highest[r:].ctypes.data, total[r].ctypes.data,
                                 factor[r:].ctypes.data)
                for r in range(0, filled, ROWS):
                    weights, scaling = scores[r, low:].ctypes.data, factor[r:].ctypes.data
                    column = 0
                    while column + WIDE_COLUMNS <= wide:
                        outer_add(weights, scores.strides[0], value_at + (low * wide + column) * 4, wide * 4,
                                  high - low, sums[r, column:].ctypes.data, sums.strides[0], scaling)
                        column += WIDE_COLUMNS
                    while column < wide:
                        outer_add_narrow(weights, scores.strides[0], value_at + (low * wide + column) * 4, wide * 4,
                                         high - low, sums[r, column:].ctypes.data, sums.strides[0], scaling)
                        column += NARROW_COLUMNS
            for r in range(rows):
                weight = np.float32(0)
                for lane in range(LANES):
                    weight += total[r, lane]
                if len(sinks):
                    weight += np.exp(sinks[head * group + r % group] - highest[r])
                at = (head * group + r % group) * dim
                for d in range(dim):
                    out[first + r // group, at + d] = sums[r, d] / weight * v_scale_back
