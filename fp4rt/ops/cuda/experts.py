"""Mixtures of experts: the chosen experts' linears, their activation and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops.cuda import warpgroup
from fp4rt.ops.cuda.activation import LONGEST_TILE, Activation, Ordered, exponent_for
from fp4rt.ops.cuda.device import SHARED_LIMIT, Device
from fp4rt.ops.cuda.layouts import LAYOUTS, choose_layout
from fp4rt.ops.cuda.linear import (ACTIVATIONS, ADD_FLOAT, STORE_FLOAT, STORE_HALF, ManyTokens, activated_bound,
                                   check_activation, choose_many, launch, many_variants, ordered_mode, same)
from fp4rt.ops.cuda.route import Choice
from fp4rt.ops.cuda.tiles import EXPERT_WARPS, FEW_TOKENS, Layout, Packed, pack

# Pairs for each expert up to which more than 8 tokens are left to the few-token kernel, too: on an H100 a step of 16
# tokens takes 17 to 24 % less then, and one with 5 or 6 pairs for each expert from 2 % more to 12 % less.
_FEW_PAIRS = 6
_PAIRS = 16384          # (token, slot) pairs in scratch memory at once
# Tokens from which on an expert that all of them take is a linear by itself, not grouped with others: on an H100 that
# takes 14 % less of a layer's time at 2,048 tokens, and 12 % at 1,024; steps of fewer wait for the host's launches.
_APART = 1024
_AHEAD = 32  # shared bytes behind the last slot that the unrolled sum of kernels/experts.cu may fetch, unused
_THREADS = 256


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    limit = SHARED_LIMIT[capability]
    found = [("experts", {}, 4 * 4096)]
    for layout in LAYOUTS:
        found += [(layout.stem, _few_defines(layout, warps, row_tiles), 0) for warps in EXPERT_WARPS
                  for row_tiles in {_few_row_tiles(layout, tokens) for tokens in range(1, FEW_TOKENS + 1)}]
        found += [(layout.stem, _many_defines(layout, many, limit, warps),
                   many.stages(layout, limit) * many.stage_bytes(layout))
                  for sums in (1, 2) for many in many_variants(layout, limit, sums) for warps in EXPERT_WARPS[:sums]]
    return found


def _few_warps(packed: Packed) -> int:
    k_tiles = -(-packed.in_features // packed.layout.tile_k)
    return next((warps for warps in reversed(EXPERT_WARPS) if 3 * warps <= k_tiles), EXPERT_WARPS[0])


def _few_row_tiles(layout: Layout, tokens: int) -> int:
    """Row tiles of a few-token block. Two share the activations and what a block costs besides its tiles; a single
    token has too few blocks for that, and two tiles of a longer format too many registers."""
    return 2 if tokens > 1 and layout.tile_bytes < 2048 else 1


def _few_defines(layout: Layout, warps: int, row_tiles: int) -> dict[str, int]:
    return {"EXPERTS": 1, "EXPERT_WARPS": warps, "EXPERT_ROW_TILES": row_tiles, **layout.defines}


def _many_defines(layout: Layout, many: ManyTokens, shared_limit: int, warps: int) -> dict[str, int]:
    return {"EXPERTS": 1, **many.defines(layout, shared_limit, warps)}


class CudaExperts:
    """The same linear of every expert, as ops.Linear."""

    def __init__(self, packed: Packed, reason: str):
        self.packed, self.reason = packed, reason
        self.out_features, self.in_features = packed.features, packed.in_features
        self.nbytes, self.kernel = packed.nbytes, packed.layout.stem


def expert_weight(device: Device, experts: Sequence[Sequence[Weight]], *, gated: bool = False) -> CudaExperts:
    """Upload one linear of all experts. Raises Fp4rtError("checkpoint") where their formats differ."""
    layout, reason = choose_layout(experts[0][0])
    for parts in experts:
        for part in parts:
            if not same(part.pre_quant_scale, parts[0].pre_quant_scale):
                raise Fp4rtError("checkpoint", f"{part.name} and {parts[0].name} have different pre_quant_scales; the "
                                               "CUDA backend takes one for an expert's input; use device='cpu'")
            if choose_layout(part)[0] is not layout:
                raise Fp4rtError(
                    "checkpoint", f"{part.name} is {part.format} and {experts[0][0].name} is "
                    f"{experts[0][0].format}; the CUDA backend takes one format for all experts of a layer; export the "
                    "model so, or use device='cpu'")
    return CudaExperts(pack(device, experts, layout, gated), reason)


def experts(device: Device, x: Activation, choice: Choice, up: CudaExperts, down: CudaExperts, *, activation: str,
            residual: cupy.ndarray | None = None, deterministic: bool = False) -> Activation | cupy.ndarray:
    """sum over a token's slots of weight * down(activation(up(x))): added to the residual, or an activation [T, N].

    Up to 8 tokens: an expert's tiles are read for those of them that chose it. More tokens: pairs of a token and a slot
    are grouped by expert; if `deterministic`, or few for each expert, they get the bits that 8 would. A token's ids are
    distinct.
    """
    check_activation(activation, up.packed.gated)
    tokens, slots = choice.ids.shape
    out = residual if residual is not None else device.scratch((tokens, down.out_features), np.float16)
    inner_bound = activated_bound(activation, up.packed.bounds(x.row_length()))
    each_bound = down.packed.bounds(inner_bound * math.sqrt(down.in_features))[0]
    bound = choice.total * each_bound
    exponent = 0 if residual is not None else exponent_for(bound)
    # Experts' outputs are kept in fp16 until they are added up, or if `deterministic`, in float32.
    step = FEW_TOKENS if tokens <= FEW_TOKENS else max(1, _PAIRS // (2 if deterministic else 1) // slots)
    for rows in (slice(start, start + step) for start in range(0, tokens, step)):
        part = Activation(x.data[rows], x.exponent, x.bound, x.length)
        args = (device, part, choice.ids[rows], choice.weights[rows], choice.always, up.packed, down.packed, activation,
                inner_bound)
        to = out[rows], ADD_FLOAT if residual is not None else STORE_HALF, exponent
        if tokens <= FEW_TOKENS:
            _few(*args, *to)
        else:
            _grouped(*args, None if deterministic else each_bound, *to)
    return out if residual is not None else Activation(out, exponent, bound)


def _few(device: Device, x: Activation, ids: cupy.ndarray, weights: cupy.ndarray, always: int, up: Packed,
         down: Packed, activation: str, inner_bound: float, out: cupy.ndarray, mode: int, exponent: int) -> None:
    tokens, slots = ids.shape
    x, pairs_of_x = _scaled(device, x, ids, up, slots)
    inner = Activation(device.scratch((tokens * slots, up.features), np.float16), exponent_for(inner_bound), inner_bound)
    _launch_few(device, x, pairs_of_x == 1, ids, always, None, up, inner.data, STORE_HALF, activation, inner.exponent)
    inner, _ = _scaled(device, inner, ids, down, 1)
    _launch_few(device, inner, True, ids, always, weights, down, out, mode, None, exponent)


def _launch_few(device: Device, x: Activation, row_for_each: bool, ids: cupy.ndarray, always: int,
                weights: cupy.ndarray | None, packed: Packed, out: cupy.ndarray, mode: int, activation: str | None,
                exponent: int) -> None:
    """Each expert's output to a row of its own, or with weights the sums over a token's slots. row_for_each: whether x
    has a row for each slot of a token. always: as in Choice."""
    layout, (tokens, slots), k = packed.layout, ids.shape, packed.in_features
    warps, row_tiles = _few_warps(packed), _few_row_tiles(layout, tokens)
    blocks, pairs, handed_over, adders = -(-packed.row_tiles // row_tiles), tokens * slots, None, 0
    if weights is not None:
        handed_over = device.handed_over(FEW_TOKENS * packed.row_tiles * slots * 16)
        adders = min(blocks, device.sm_count)
    device.kernel(layout.stem, "few_experts", **_few_defines(layout, warps, row_tiles))(
        (blocks, pairs + (adders > 0)), warps * 32, packed.tiles, x.data, slots if row_for_each else 0, k,
        packed.row_tiles, ids, tokens, slots, always, packed.experts - always, weights, handed_over, adders, out,
        *_epilogue(packed, x, mode, activation, exponent), shared=4 * pairs, pdl=True)


def _grouped(device: Device, x: Activation, ids: cupy.ndarray, weights: cupy.ndarray, always: int, up: Packed,
             down: Packed, activation: str, inner_bound: float, each_bound: float | None, out: cupy.ndarray, mode: int,
             exponent: int) -> None:
    """each_bound: of an expert's output, or None for the few-token kernel's bits."""
    tokens, slots = ids.shape
    given, pairs = x, tokens * slots
    few = pairs <= _FEW_PAIRS * up.experts
    if few:
        each_bound = None
    sums = 2 if each_bound is None else 1
    # The pairs of experts from in_blocks on are the last ones, in the order of tokens, and in no block.
    apart = always if tokens >= _APART and each_bound is not None and up.prescale is down.prescale is None else 0
    in_blocks, grouped = up.experts - apart, pairs - tokens * apart
    x, pairs_of_x = _scaled(device, x, ids, up, slots)
    by_warpgroups = not few and warpgroup.runs(device, up.layout) and warpgroup.runs(device, down.layout)
    if few:
        choices, size = (None, None), FEW_TOKENS
    else:
        choices = (warpgroup.choose_grouped if by_warpgroups else _choose)(device, up, down, grouped, sums)
        size = choices[0].tokens  # of both
    most_blocks = min(grouped, grouped // size + in_blocks)
    places, rows = device.scratch(pairs, np.int32), device.scratch(pairs, np.int32)
    blocks = device.scratch((most_blocks, 4), np.int32)
    device.kernel("experts", "group_by_expert")(up.experts, _THREADS, ids, pairs, pairs_of_x, in_blocks, size,
                                                most_blocks, places, rows, blocks, shared=4 * up.experts, pdl=True)
    inner_exponent = exponent_for(inner_bound)
    if by_warpgroups and down.prescale is None and up.features % LONGEST_TILE == 0:
        ordered = Ordered.empty(device, (grouped, up.features), down.layout.interleaved)
        inner = Activation(None, inner_exponent, inner_bound, ordered=ordered)
    else:
        inner = Activation(device.scratch((grouped, up.features), np.float16), inner_exponent, inner_bound)
    _launch_grouped(device, x, rows, blocks, up, choices[0], inner, activation)
    inner, _ = _scaled(device, inner, ids, down, 1, places)
    each = 0 if each_bound is None else exponent_for(each_bound)
    outputs = device.scratch((pairs, down.features), np.float32 if each_bound is None else np.float16)
    _launch_grouped(device, inner, None, blocks, down, choices[1], Activation(outputs[:grouped], each, each_bound),
                    None)
    if apart and by_warpgroups:
        given = replace(given, data=None, ordered=warpgroup.order(device, given.data, up.layout))
    for e in range(in_blocks, up.experts):
        inner = Activation(device.scratch((tokens, up.features), np.float16), inner_exponent, inner_bound)
        launch(device, given, up.expert(e), inner.data, STORE_HALF, activation, inner_exponent, False)
        first = grouped + (e - in_blocks) * tokens
        launch(device, inner, down.expert(e), outputs[first:first + tokens], STORE_HALF, None, each, False)
    device.kernel("experts", "sum_slots" if each_bound is not None else "sum_float_slots")(
        tokens, _THREADS, outputs, places, weights, out, slots, down.features, int(mode == ADD_FLOAT),
        math.ldexp(1.0, each), math.ldexp(1.0, -exponent), shared=8 * slots + _AHEAD, pdl=True)


def _launch_grouped(device: Device, x: Activation, rows: cupy.ndarray | None, blocks: cupy.ndarray, packed: Packed,
                    variant: ManyTokens | warpgroup.Warpgroups | None, out: Activation, activation: str | None) -> None:
    """variant: None for the few-token kernel."""
    warps = _few_warps(packed)
    store = STORE_HALF if out.ordered is not None or out.data.dtype == np.float16 else STORE_FLOAT
    if variant is None:
        row_tiles = _few_row_tiles(packed.layout, FEW_TOKENS)
        device.kernel(packed.layout.stem, "few_grouped", **_few_defines(packed.layout, warps, row_tiles))(
            (-(-packed.row_tiles // row_tiles), blocks.shape[0]), warps * 32, packed.tiles, x.data, rows, blocks,
            packed.in_features, packed.row_tiles, out.data, *_epilogue(packed, x, store, activation, out.exponent),
            pdl=True)
        return
    if isinstance(variant, warpgroup.Warpgroups):
        ordered = x.ordered or warpgroup.order_grouped(device, x.data, rows, blocks, out.shape[0], packed.layout,
                                                       variant.tokens)
        to, mode = (out.data, store) if out.ordered is None else (out.ordered.data, ordered_mode(out.ordered))
        row_scale, bias, _, *rest = _epilogue(packed, x, mode, activation, out.exponent)
        warpgroup.launch_grouped(device, ordered, blocks, packed, variant, warps, to,
                                 (row_scale, bias, to.strides[0] // to.itemsize, *rest))
        return
    limit = device.shared_limit
    kernel = device.kernel(packed.layout.stem, "many_experts", **_many_defines(packed.layout, variant, limit, warps))
    kernel((blocks.shape[0], -(-packed.row_tiles // (variant.rows // 16))), variant.threads, packed.tiles, x.data, rows,
           blocks, packed.in_features, packed.row_tiles, out.data, *_epilogue(packed, x, store, activation, out.exponent),
           shared=variant.stages(packed.layout, limit) * variant.stage_bytes(packed.layout), pdl=True)


def _choose(device: Device, up: Packed, down: Packed, pairs: int, sums: int) -> tuple[ManyTokens, ManyTokens]:
    """Variants for the two linears with blocks of as many tokens: the most that an average expert half fills."""
    both = [many_variants(packed.layout, device.shared_limit, sums) for packed in (up, down)]
    sizes = sorted({many.tokens for many in both[0]} & {many.tokens for many in both[1]})
    size = max((size for size in sizes if pairs >= size // 2 * up.experts), default=sizes[0])
    blocks = pairs // size + min(pairs, up.experts) // 2
    first, second = (choose_many(device, packed, lambda many: blocks, [many for many in each if many.tokens == size])
                     for packed, each in zip((up, down), both))
    return first, second


def _epilogue(packed: Packed, x: Activation, mode: int, activation: str | None, exponent: int) -> tuple:
    return (packed.row_scale, packed.bias, packed.features, packed.features, mode, ACTIVATIONS[activation],
            math.ldexp(1.0, x.exponent), math.ldexp(1.0, -exponent))


def _scaled(device: Device, x: Activation, ids: cupy.ndarray, packed: Packed, pairs_of_x: int,
            places: cupy.ndarray | None = None) -> tuple[Activation, int]:
    """x with each pair's row times its expert's pre_quant_scale, if there is one, and how many pairs a row belongs to."""
    if packed.prescale is None:
        return x, pairs_of_x
    bound = x.bound * packed.largest_prescale
    exponent, pairs, k = exponent_for(bound), ids.size, x.data.shape[1]
    y = device.scratch((pairs, k), np.float16)
    device.kernel("experts", "scale_pairs")(pairs, _THREADS, x.data, ids, places, packed.prescale, y, pairs_of_x, k,
                                            math.ldexp(1.0, x.exponent - exponent), pdl=True)
    return Activation(y, exponent, bound), 1
