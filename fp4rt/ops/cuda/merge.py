"""Branches back into the residual stream, normed after their sublayer: one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cupy

from fp4rt.ops.cuda.activation import Activation
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.rms_norm import Norm

_THREADS = 512  # as in kernels/merge.cu


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("merge", _defines(d), 0) for d in (2048, 4096, 6144, 511)]


def _defines(d: int) -> dict[str, int]:
    """How a block's threads share out a row; one of no multiple of four numbers is not aligned to 16 bytes."""
    width = 1 if d % 4 else 4
    return {"VECTORS": -(-d // (width * _THREADS)), "WIDTH": width}


def merge(device: Device, residual: cupy.ndarray, branches: Sequence[tuple[Activation | cupy.ndarray, Norm | None]],
          norm: Norm | None, scale: float) -> cupy.ndarray:
    """Ops.merge in place, of one or two branches, each an activation or float32 [T, d]."""
    first, second = branches if len(branches) == 2 else (*branches, (None, None))
    tokens, d = residual.shape
    device.kernel("merge", "merge", **_defines(d))(
        tokens, _THREADS, residual, *_branch(*first), *_branch(*second), *_norm(norm), float(scale), d, pdl=True)
    return residual


def _branch(x: Activation | cupy.ndarray | None, norm: Norm | None) -> tuple:
    if isinstance(x, Activation):
        return x.data, 1, math.ldexp(1.0, x.exponent), x.rows, *_norm(norm)
    return x, 0, 1.0, None, *_norm(norm)


def _norm(norm: Norm | None) -> tuple:
    return (norm.weight, norm.eps) if norm else (None, 0.0)
