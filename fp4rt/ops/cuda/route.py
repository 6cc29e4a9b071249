"""Each token's experts and their weights, from a router's logits."""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.ops import Routing
from fp4rt.ops.cuda.device import SHARED_LIMIT, Device

_MOST_EXPERTS = 4096  # whose scores fit shared memory everywhere


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("route", {}, min(_shared(_MOST_EXPERTS, _MOST_EXPERTS), SHARED_LIMIT[capability]))]


@dataclass(frozen=True)
class Vector:
    """float32 [n] on the device; largest: its largest magnitude."""

    data: cupy.ndarray
    largest: float


@dataclass(frozen=True)
class Choice:
    """ids int32 and weights float32 [T, k]. total: what the magnitudes of a token's weights cannot add up to more than."""

    ids: cupy.ndarray
    weights: cupy.ndarray
    total: float


def vector(device: Device, values: np.ndarray) -> Vector:
    values = np.asarray(values, np.float32)
    return Vector(device.upload(values), float(np.abs(values).max()))


def route(device: Device, logits: cupy.ndarray, routing: Routing, correction: Vector | None,
          expert_scale: Vector | None) -> Choice:
    """The choices of a router's logits, float32 [T, E]; correction and expert_scale [E]."""
    tokens, experts, top_k = logits.shape[0], routing.num_experts, routing.top_k
    if experts > _MOST_EXPERTS:
        raise Fp4rtError("device", f"the CUDA backend routes to at most {_MOST_EXPERTS} experts and this model has "
                                   f"{experts}; use device='cpu'")
    ids, weights = device.scratch((tokens, top_k), np.int32), device.scratch((tokens, top_k), np.float32)
    device.kernel("route", "route")(
        tokens, 32, logits, correction and correction.data, expert_scale and expert_scale.data, ids, weights, experts,
        top_k, int(routing.scoring == "sigmoid"), int(routing.normalize), float(routing.scaling), routing.groups,
        routing.groups_kept, shared=_shared(experts, routing.groups), pdl=True)
    # Scores are positive; those of a softmax add up to 1, those of a sigmoid are at most 1 each.
    total = 1.0 if routing.normalize or routing.scoring == "softmax" else top_k
    return Choice(ids, weights, 1.001 * total * abs(routing.scaling) * (expert_scale.largest if expert_scale else 1.0))


def _shared(experts: int, groups: int) -> int:
    """Scores, ranks, groups: float32."""
    return 4 * (2 * experts + groups)
