"""Activations between operations: fp16 times a power of two fixed when weights are loaded, so nothing overflows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.ops.cuda.device import Device

LONGEST_TILE = 128  # columns of the longest tile of weights: what is a multiple of it has no tail in any layout


@dataclass(frozen=True)
class Ordered:
    """Activations [T, K] as kernels/order.cuh says: fp16 [slabs, padded, 64]; padded: T up to a multiple of 8."""

    data: cupy.ndarray
    shape: tuple[int, int]
    padded: int
    interleaved: bool

    @staticmethod
    def empty(device: Device, shape: tuple[int, int], interleaved: bool, tile_k: int = LONGEST_TILE) -> Ordered:
        """To be filled; columns to the end of a tile are part of it."""
        padded, slabs = -(-shape[0] // 8) * 8, -(-shape[1] // tile_k) * tile_k // 64
        return Ordered(device.scratch((slabs, padded, 64), np.float16), shape, padded, interleaved)


@dataclass(frozen=True)
class Activation:
    """data fp16 [T, N]; the values are data * 2^exponent, and none can exceed `bound` in magnitude.

    length: what the 2-norm of a row cannot exceed, where more is known than sqrt(N) * bound.
    rows: float32 [T] that the rows are still to be multiplied by (bound and length leave it out), where they come from
    the residual stream itself, which has no bound.
    ordered: what there is instead of `data` (then None) where only one linear takes it.
    """

    data: cupy.ndarray | None
    exponent: int
    bound: float
    length: float | None = None
    rows: cupy.ndarray | None = None
    ordered: Ordered | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape if self.ordered is None else self.ordered.shape

    def row_length(self) -> float:
        """An upper bound of every row's 2-norm."""
        return self.bound * math.sqrt(self.shape[1]) if self.length is None else self.length


def exponent_for(bound: float) -> int:
    """The least power of two, from 1 up, that keeps values up to `bound` within 2^15 (half of what fp16 holds)."""
    return max(0, math.ceil(math.log2(bound)) - 15) if bound > 0 else 0
