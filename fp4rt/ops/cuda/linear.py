"""Linears: which layout and kernel a weight gets, and the launches of one call."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops.cuda import warpgroup
from fp4rt.ops.cuda.activation import LONGEST_TILE, Activation, Ordered, exponent_for
from fp4rt.ops.cuda.device import SHARED_LIMIT, Device
from fp4rt.ops.cuda.layouts import LAYOUTS, choose_layout
from fp4rt.ops.cuda.rms_norm import Normed
from fp4rt.ops.cuda.tiles import FEW_TOKENS, Layout, Packed, few_warps, pack, sum_bytes, sum_defines

# Up to which every block norms the rows itself; more are faster normed once. The kernel takes any number: written for
# one alone it is slower, by how the compiler then schedules its main loop.
FUSED_NORM_TOKENS = 1
UNDIVIDED, WHOLE, SHARED = range(3)  # enum Division in kernels/linear_few.cuh
STORE_HALF, STORE_FLOAT, ADD_FLOAT, STORE_ORDERED, STORE_INTERLEAVED = range(5)  # enum Output in kernels/linear.cuh
_NO_NORM = None, 0.0, 0.0
_RESERVED = 1024  # bytes of shared memory that a block has beyond its own
ACTIVATIONS = {None: 0, "relu2": 1, "silu": 2, "gelu_tanh": 3, "swiglu_oai": 4}  # enum in kernels/activation.cuh


@dataclass(frozen=True)
class ManyTokens:
    """A variant of the many-token kernel: warps and mma tiles along rows and tokens; blocks that should share an SM.

    alone, each: time of a block that has an SM to itself, and that each adds where several share it: measured on an
    H100 with 28672 x 4096 and 4096 x 14336 NVFP4 weights (microseconds at 4096 columns; only ratios matter).
    sums: as those of warpgroup.Warpgroups.
    """

    row_warps: int
    row_tiles: int
    token_warps: int
    token_tiles: int
    blocks: int
    alone: float
    each: float
    sums: int = 1

    @property
    def rows(self) -> int:
        return self.row_warps * self.row_tiles * 16

    @property
    def tokens(self) -> int:
        return self.token_warps * self.token_tiles * 8

    @property
    def threads(self) -> int:
        return self.row_warps * self.token_warps * 32

    def stage_bytes(self, layout: Layout) -> int:
        return self.rows // 16 * layout.tile_bytes + self.tokens * layout.tile_k * 2

    def stages(self, layout: Layout, shared_limit: int) -> int:
        """Buffers: up to four, two at least, so that `blocks` fit an SM; 0 where this variant does not run."""
        fit = shared_limit // self.stage_bytes(layout)
        return max(2, min(4, fit // self.blocks)) if fit >= 2 else 0

    def defines(self, layout: Layout, shared_limit: int, warps: int = 1) -> dict[str, int]:
        """warps: of the few-token kernel that several sums follow."""
        return {"MANY_ROW_WARPS": self.row_warps, "MANY_ROW_TILES": self.row_tiles,
                "MANY_TOKEN_WARPS": self.token_warps, "MANY_TOKEN_TILES": self.token_tiles,
                "MANY_STAGES": self.stages(layout, shared_limit), **sum_defines(self.sums, warps), **layout.defines}

    def runs(self, layout: Layout, shared_limit: int) -> bool:
        """Whether shared memory and registers suffice: sums per scale block need a second set of accumulators."""
        registers = self.row_tiles * self.token_tiles * (2 if layout.defines.get("BLOCK_SCALES") else 1)
        return self.stages(layout, shared_limit) > 0 and registers <= 16


MANY = (ManyTokens(8, 2, 1, 8, 1, 66, 68), ManyTokens(4, 4, 1, 4, 2, 46, 35), ManyTokens(4, 2, 1, 4, 3, 30, 19.5),
        ManyTokens(4, 1, 1, 4, 4, 22, 18))


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    limit = SHARED_LIMIT[capability]
    found = [("scale_columns", {}, 0)]
    for layout in LAYOUTS:
        found += [(layout.stem, layout.few_defines(limit, division), 0) for division in (UNDIVIDED, WHOLE, SHARED)]
        found += [(layout.stem, many.defines(layout, limit, few_warps(limit)),
                   many.stages(layout, limit) * many.stage_bytes(layout))
                  for sums in (1, 2, 3) for many in many_variants(layout, limit, sums)]
    return found


def many_variants(layout: Layout, shared_limit: int, sums: int = 1) -> list[ManyTokens]:
    """Those that run; with several sums of an output, which take registers, one is enough."""
    found = [replace(many, sums=sums) for many in MANY[0 if sums == 1 else 2:] if many.runs(layout, shared_limit)]
    return found if sums == 1 else found[:1]


class CudaLinear:
    """ops.Linear on the device: groups of parts that one launch computes, side by side in the output.

    A gated pair of one layout is one group; of two layouts it is two groups and a product.
    """

    def __init__(self, groups: Sequence[Packed], gated: bool, reason: str):
        self.groups, self.gated, self.reason = tuple(groups), gated, reason
        rows = sum(group.features for group in groups)
        self.split_gate = gated and len(groups) > 1
        self.out_features = rows // 2 if self.split_gate else rows
        self.in_features = groups[0].in_features
        self.nbytes = sum(group.nbytes for group in groups)
        self.kernel = "+".join(dict.fromkeys(group.layout.stem for group in groups))


def linear_weight(device: Device, parts: Sequence[Weight], *, gated: bool = False) -> CudaLinear:
    """Upload the parts of one linear; neighbours of one layout and one pre_quant_scale share a launch."""
    chosen = [choose_layout(part) for part in parts]
    groups: list[list[int]] = []
    for index, part in enumerate(parts):
        if groups and chosen[groups[-1][0]][0] is chosen[index][0] and same(parts[groups[-1][0]].pre_quant_scale,
                                                                           part.pre_quant_scale):
            groups[-1].append(index)
        else:
            groups.append([index])
    packed = []
    for group in groups:
        packed.append(pack(device, [[parts[i] for i in group]], chosen[group[0]][0], gated and len(group) == 2))
        _handed_over(device, packed[-1], FEW_TOKENS)  # now, and not when the cache has taken the memory
    return CudaLinear(packed, gated, "; ".join(dict.fromkeys(reason for _, reason in chosen)))


def linear(device: Device, x: Activation | Normed, weight: CudaLinear, *, activation: str | None = None,
           residual: cupy.ndarray | None = None, logits: bool = False, deterministic: bool = False,
           then: CudaLinear | None = None) -> Activation | cupy.ndarray:
    """y = x @ W^T with its epilogue. residual float32 [T, N] is added to in place and returned; `logits`: float32.

    then: the only linear that takes the result, which is then ordered for it where both run as warpgroup products.
    """
    tokens = x.shape[0]
    check_activation(activation, weight.gated)
    if residual is not None or logits:
        out = residual if residual is not None else device.scratch((tokens, weight.out_features), np.float32)
        for group, columns in _columns(weight, out):
            launch(device, x, group, columns, ADD_FLOAT if residual is not None else STORE_FLOAT, None, 0,
                    deterministic)
        return out
    bounds = [bound for group in weight.groups for bound in group.bounds(x.row_length())]
    bound = activated_bound(activation, bounds)
    exponent = exponent_for(bound)
    if weight.split_gate:
        inner = exponent_for(max(bounds))
        both = device.scratch((tokens, 2 * weight.out_features), np.float16)
        for group, columns in _columns(weight, both):
            launch(device, x, group, columns, STORE_HALF, None, inner, deterministic)
        out = device.scratch((tokens, weight.out_features), np.float16)
        device.kernel("scale_columns", "multiply_halves")(tokens, 256, both, out, weight.out_features,
                                                          ACTIVATIONS[activation], 2.0**inner, 2.0**-exponent, pdl=True)
    elif (then is not None and len(weight.groups) == 1
          and warpgroup.runs(device, weight.groups[0].layout)
          and takes_ordered(device, tokens, weight.out_features, then)):
        ordered = Ordered.empty(device, (tokens, weight.out_features), then.groups[0].layout.interleaved)
        launch(device, x, weight.groups[0], ordered.data, ordered_mode(ordered), activation, exponent, deterministic)
        return Activation(None, exponent, bound, ordered=ordered)
    else:
        out = device.scratch((tokens, weight.out_features), np.float16)
        for group, columns in _columns(weight, out):
            launch(device, x, group, columns, STORE_HALF, activation, exponent, deterministic)
    return Activation(out, exponent, bound)


def ordered_mode(out: Ordered) -> int:
    """How the epilogue stores what is handed over."""
    return STORE_INTERLEAVED if out.interleaved else STORE_ORDERED


def takes_ordered(device: Device, tokens: int, features: int, then: CudaLinear) -> bool:
    """Whether a linear would order [tokens, features] first: then whoever writes them may do so."""
    return (tokens > FEW_TOKENS and features % LONGEST_TILE == 0 and len(then.groups) == 1
            and then.groups[0].prescale is None and warpgroup.runs(device, then.groups[0].layout))


def check_activation(activation: str | None, gated: bool) -> None:
    """Raises Fp4rtError("request") unless this may stand behind a weight that is, or is not, a gated pair."""
    if activation not in ACTIVATIONS or gated != (activation not in (None, "relu2")):
        raise Fp4rtError("request", f"activation {activation!r} cannot stand behind {'a' if gated else 'no'} gated pair")


def activated_bound(activation: str | None, bounds: Sequence[float]) -> float:
    """What the outputs cannot exceed, from the bounds of the parts: |silu(g)| and |gelu(g)| are at most |g|.

    swiglu_oai: g is at most 7, a negative one times its sigmoid is smaller than itself, and |u + 1| is at most 8.
    """
    if activation is None:
        return max(bounds)
    if activation == "relu2":
        return max(bounds) ** 2
    gate, up = bounds
    return min(gate, 7.0) * (min(up, 7.0) + 1) if activation == "swiglu_oai" else gate * up


def _columns(weight: CudaLinear, out: cupy.ndarray) -> Iterator[tuple[Packed, cupy.ndarray]]:
    """Each group with its columns of the output."""
    start = 0
    for group in weight.groups:
        yield group, out if len(weight.groups) == 1 else out[:, start:start + group.features]
        start += group.features


def launch(device: Device, x: Activation | Normed, group: Packed, out: cupy.ndarray, mode: int, activation: str | None,
            exponent: int, deterministic: bool) -> None:
    """One group into its columns of `out` ([T, features] of a wider row).

    deterministic: more tokens have the bits that they have by eights.
    """
    tokens, k = x.shape
    parts = few_plan(group.layout, device.shared_limit, FEW_TOKENS, k).parts
    sums = 1 + (1 + (parts > 1)) * deterministic
    by_warpgroups = tokens > FEW_TOKENS and warpgroup.runs(device, group.layout)
    if by_warpgroups and isinstance(x, Normed) and group.prescale is None and k % LONGEST_TILE == 0:
        ordered = x.ordered(device, group.layout.interleaved)
        x = Activation(None, x.exponent, x.row_length(), x.row_length(), ordered=ordered)
    if isinstance(x, Normed) and (tokens > FUSED_NORM_TOKENS or group.prescale is not None or k % 8 or parts > 1):
        x = x.computed(device)
    if group.prescale is not None:
        x = _prescaled(device, x, group)
    epilogue = (group.row_scale, group.bias, out.strides[0] // out.itemsize, group.features, mode,
                ACTIVATIONS[activation], math.ldexp(1.0, x.exponent), math.ldexp(1.0, -exponent))
    if tokens <= FEW_TOKENS:
        norm = (x.norm.weight, x.norm.eps, math.ldexp(1.0, -x.exponent)) if isinstance(x, Normed) else _NO_NORM
        _few(device, x.x if isinstance(x, Normed) else x.data, group, out, norm, epilogue)
        return
    if by_warpgroups:
        warpgroup.launch(device, x.ordered or warpgroup.order(device, x.data, group.layout), group, out, epilogue,
                         sums=sums, parts=parts)
        return
    many = choose_many(device, group, lambda many: -(-tokens // many.tokens),
                       many_variants(group.layout, device.shared_limit, sums))
    stages = many.stages(group.layout, device.shared_limit)
    defines = many.defines(group.layout, device.shared_limit, few_warps(device.shared_limit))
    grid = -(-tokens // many.tokens), -(-group.row_tiles // (many.rows // 16))
    device.kernel(group.layout.stem, "many", **defines)(
        grid, many.threads, group.tiles, x.data, tokens, k, group.row_tiles, parts, out, *epilogue,
        shared=stages * many.stage_bytes(group.layout), pdl=True)


def _few(device: Device, x: cupy.ndarray, group: Packed, out: cupy.ndarray, norm: tuple, epilogue: tuple) -> None:
    tokens, k = x.shape
    how = few_plan(group.layout, device.shared_limit, tokens, k)
    defines = group.layout.few_defines(device.shared_limit, how.division)
    warps, shared = defines["FEW_WARPS"], how.shared
    # One block of 16 warps leaves an SM's other half to the kernel that follows; smaller ones share an SM, and so do
    # those of a long gated pair, whose arithmetic they speed up by more than the next kernel's early start is worth. As
    # many blocks as places: those that an uneven number left free would go to two blocks of the kernel that follows.
    blocks = 1 if warps == 16 and not (group.gated and tokens <= 2) else max(1, min(
        defines["FEW_BLOCKS"], (device.shared_limit + _RESERVED) // (shared + _RESERVED)))
    if device.has_pdl and blocks == 1:
        # More than half of an SM's: where kernels follow each other closely, two blocks of one must not share an SM
        # while another SM has none.
        shared = max(shared, device.shared_limit // 2 + _RESERVED)
    sharing = how.parts if how.division == SHARED else 1
    device.kernel(group.layout.stem, "few", **defines)(
        sharing * min(group.row_tiles, device.sm_count * blocks // sharing), warps * 32, group.tiles, x, tokens, k,
        group.row_tiles, how.parts, _handed_over(device, group, tokens), *norm, out, *epilogue, shared=shared, pdl=True)


def _handed_over(device: Device, group: Packed, tokens: int) -> cupy.ndarray | None:
    """Where blocks that share row tiles meet, if they do for so many tokens."""
    how = few_plan(group.layout, device.shared_limit, tokens, group.in_features)
    return device.handed_over(group.row_tiles * (how.parts - 1) * FEW_TOKENS * 16) if how.division == SHARED else None


@dataclass(frozen=True)
class FewPlan:
    """How the few-token kernel takes so many tokens: into how many parts the columns are divided, who takes them (enum
    Division in kernels/linear_few.cuh), its dynamic shared bytes."""

    division: int
    parts: int
    shared: int


@functools.cache
def few_plan(layout: Layout, shared_limit: int, tokens: int, k: int) -> FewPlan:
    """As many parts as eight tokens need, whatever the tokens: they say in which order a result is summed."""
    defines = layout.few_defines(shared_limit)
    warps, k_tiles = defines["FEW_WARPS"], -(-k // layout.tile_k)
    ring = warps * defines["FEW_DEPTH"] * layout.tile_bytes

    def shared(parts: int, held: int, tokens: int) -> int:
        tiles = -(-k_tiles // (parts // held))
        return ring + tiles * tokens * layout.tile_k * 2 + held * sum_bytes(warps, tokens)

    parts = 1
    while shared(parts, 1, FEW_TOKENS) > shared_limit:
        parts *= 2
    if shared(parts, parts, tokens) <= shared_limit:
        return FewPlan(WHOLE if parts > 1 else UNDIVIDED, parts, shared(parts, parts, tokens))
    return FewPlan(SHARED, parts, shared(parts, 1, tokens))


def choose_many(device: Device, group: Packed, token_blocks: Callable[[ManyTokens], float],
                variants: Sequence[ManyTokens]) -> ManyTokens:
    """The variant that is done first: whole waves of blocks over the chip, then what is left."""
    def time(many: ManyTokens) -> float:
        blocks = token_blocks(many) * -(-group.row_tiles * 16 // many.rows)
        waves, left = divmod(blocks, device.sm_count * many.blocks)
        last = max(many.alone, -(-left // device.sm_count) * many.each) if left else 0
        return waves * many.blocks * many.each + last

    return min(variants, key=time)


def _prescaled(device: Device, x: Activation, group: Packed) -> Activation:
    bound = x.bound * group.largest_prescale
    exponent = exponent_for(bound)
    y = device.scratch(x.data.shape, np.float16)
    device.kernel("scale_columns", "scale_columns")(
        x.data.shape[0], 256, x.data, group.prescale, y, x.data.shape[1], math.ldexp(1.0, x.exponent - exponent),
        pdl=True)
    return Activation(y, exponent, bound)


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))
