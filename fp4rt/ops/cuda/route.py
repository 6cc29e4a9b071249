"""Routers: each token's experts and their weights, from the residual stream or an activation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.ops import Routing
from fp4rt.ops.cuda.activation import Activation
from fp4rt.ops.cuda.dense_linear import DENSE, DENSE_F32
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.linear import CudaLinear, linear
from fp4rt.ops.cuda.rms_norm import Norm, Normed
from fp4rt.ops.cuda.tiles import FEW_TOKENS, Packed

_MOST_EXPERTS = 4096                # whose scores fit shared memory everywhere
_FEW_SHARED = 60 << 10              # bytes of it that a block of `route_few` may have, everywhere
_PARTS, _THREADS = 8, 512           # blocks of `route_few` for a token; of any block, as in kernels/route.cu


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("route", {"WEIGHT_PLANES": layout.planes}, _FEW_SHARED) for layout in (DENSE, DENSE_F32)]


@dataclass(frozen=True)
class Vector:
    """float32 [n] on the device; largest: its largest magnitude."""

    data: cupy.ndarray
    largest: float


@dataclass(frozen=True)
class Choice:
    """ids int32 and weights float32 [T, slots]. total: what the magnitudes of a token's weights cannot add up to more
    than. always: of the slots, how many at the end have the same expert in all tokens.

    normed: the router's rows behind a norm, computed on the way, for experts that take them so.
    """

    ids: cupy.ndarray
    weights: cupy.ndarray
    total: float
    always: int = 0
    normed: Normed | None = None


def vector(device: Device, values: np.ndarray) -> Vector:
    values = np.asarray(values, np.float32)
    return Vector(device.upload(values), float(np.abs(values).max()))


def route(device: Device, x: cupy.ndarray | Activation, router: CudaLinear, routing: Routing, norm: Norm | None,
          correction: Vector | None, expert_scale: Vector | None, experts_norm: Norm | None,
          deterministic: bool) -> Choice:
    """The choices of a router for x [T, K], which a norm takes in float32; correction and expert_scale [E].

    experts_norm: what stands before the experts.

    Up to 8 tokens, or if `deterministic`, one launch norms, multiplies and chooses.
    """
    experts, top_k = routing.num_experts, routing.top_k
    if experts > _MOST_EXPERTS:
        raise Fp4rtError("device", f"the CUDA backend routes to at most {_MOST_EXPERTS} experts and this model has "
                                   f"{experts}; use device='cpu'")
    packed, tokens = router.groups[0], x.shape[0] if norm else x.data.shape[0]
    ids, weights = (device.scratch((tokens, routing.slots), dtype) for dtype in (np.int32, np.float32))
    rule = (correction and correction.data, expert_scale and expert_scale.data, experts, top_k, routing.always,
            int(routing.scoring == "sigmoid"), int(routing.normalize), float(routing.scaling), routing.groups,
            routing.groups_kept)
    normed = None
    if (norm and packed.layout in (DENSE, DENSE_F32) and packed.prescale is None
            and _few_shared(packed, routing) <= _FEW_SHARED and (tokens <= FEW_TOKENS or deterministic)):
        normed = Normed(x, experts_norm)
        _few(device, normed, packed, norm, ids, weights, rule, _few_shared(packed, routing))
    else:
        if norm:
            normed = Normed(x, norm)  # of use to the experts if theirs is the same
            x = normed.computed(device)
        logits = linear(device, x, router, logits=True, deterministic=deterministic)
        device.kernel("route", "route", WEIGHT_PLANES=1)(tokens, _THREADS, logits, ids, weights, *rule,
                                                         shared=_shared(routing), pdl=True)
    # Scores are positive; those of a softmax add up to 1, those of a sigmoid are at most 1 each.
    total = 1.0 if routing.normalize or routing.scoring == "softmax" else top_k
    total *= 1.001 * abs(routing.scaling) * (expert_scale.largest if expert_scale else 1.0)
    return Choice(ids, weights, total + routing.always, routing.always, normed)


def _few(device: Device, x: Normed, packed: Packed, norm: Norm, ids: cupy.ndarray, weights: cupy.ndarray, rule: tuple,
         shared: int) -> None:
    """The choices behind `norm`, and what x computes."""
    y, k = x.room(device), x.shape[1]
    kernel = device.kernel("route", "route_few", WEIGHT_PLANES=packed.layout.planes)
    step = packed.tickets.size
    for rows in (slice(start, start + step) for start in range(0, x.shape[0], step)):
        given = x.x[rows]
        tokens = given.shape[0]
        partial = None if device.has_pdl else device.scratch((tokens, _partial(packed)), np.float32)
        kernel((_PARTS, tokens), _THREADS, given, k, norm.weight, norm.eps, x.norm.weight, x.norm.eps,
               math.ldexp(1.0, -x.exponent), y.data[rows], packed.tiles, packed.row_scale, packed.bias,
               packed.row_tiles, _sharing(packed), partial, packed.tickets, ids[rows], weights[rows], *rule,
               shared=shared, pdl=True)


def _sharing(packed: Packed) -> int:
    """The logarithm to base 2 of how many warps share a row tile."""
    return max(1, _THREADS // 32 // packed.row_tiles).bit_length() - 1


def _partial(packed: Packed) -> int:
    """Floats of a token's parts: logits for each of the warps that share a row tile, and squares."""
    return _PARTS * ((packed.row_tiles * 16 << _sharing(packed)) + 1)


def _few_shared(packed: Packed, routing: Routing) -> int:
    """What a choice takes, a part's columns twice, all parts, and two numbers of each expert: 4 bytes each."""
    tiles = -(-packed.in_features // (packed.layout.tile_k * _PARTS))
    return _shared(routing) + 4 * (2 * tiles * packed.layout.tile_k + _partial(packed) + 2 * routing.num_experts)


def _shared(routing: Routing) -> int:
    """Four numbers of each expert, groups and the chosen: 4 bytes each, in whole quads."""
    return (4 * routing.num_experts + 3 + routing.groups + routing.top_k + 3) // 4 * 16
