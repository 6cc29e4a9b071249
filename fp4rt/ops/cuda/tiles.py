"""Weights on the device: one layout per weight, made once at upload, read by the few- and many-token kernels alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops.cuda.device import Device

FEW_TOKENS = 8     # columns of one mma: the few-token kernel costs the same for 1 to 8
_PANEL = 16 << 20  # bytes of source on the device while it is repacked


def sum_bytes(warps: int, tokens: int) -> int:
    """Shared memory for the warps' sums in the few-token kernel: two sets of 16 rows, SUM_STRIDE apart."""
    return 2 * warps * tokens * 20 * 4


def panels(rows: int, row_bytes: int) -> Iterator[slice]:
    """Ranges of rows that fit a panel each."""
    step = max(1, _PANEL // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Place:
    """Where a part goes: below the parts before it (`first`), or, in a gated pair, as every other 8 rows (`gated_part`
    0 or 1, else -1). largest: uint32 bits of the largest squared row norm, for repack to raise."""

    tiles: cupy.ndarray
    row_scale: cupy.ndarray
    first: int
    gated_part: int
    largest: cupy.ndarray


class Layout(ABC):
    """How a format's weights lie as tiles of 16 rows x tile_k columns, tile_bytes each.

    stem and defines: the kernels that read it.
    """

    stem: str
    defines: dict[str, int]
    tile_k: int
    tile_bytes: int
    reason: str

    def few_defines(self, shared_limit: int) -> dict[str, int]:
        """Constants of the few-token kernel (and of `repack`, beside it): warps of a block, which split the columns;
        tiles each has on the way; blocks whose registers fit an SM, so that the next kernel's can begin."""
        warps = 16 if shared_limit > 128 << 10 else 8
        slot = self.tile_bytes + FEW_TOKENS * self.tile_k * 2
        depth = (shared_limit - sum_bytes(warps, FEW_TOKENS)) // (warps * slot)
        blocks = 1 if self.defines.get("BLOCK_SCALES") and warps == 16 else 2
        return {"FEW_WARPS": warps, "FEW_DEPTH": max(1, min(depth, 4)), "FEW_BLOCKS": blocks, **self.defines}

    def row_scales(self, part: Weight) -> np.ndarray | float:
        """What a row's sums are multiplied by at the end; repack may write it itself."""
        return 1.0

    def norm_scale(self, part: Weight) -> float:
        """What the norms that repack reports leave out."""
        return 1.0

    @abstractmethod
    def repack(self, device: Device, part: Weight, place: Place) -> None:
        """Bring a part to its place, panel by panel."""


@dataclass(frozen=True)
class Packed:
    """Parts of one format as one weight. tiles: uint8; row_scale, bias: float32 [row tiles * 16], in packed order.

    features: output columns. prescale: float32 [K] that the input is multiplied by first, and its largest magnitude.
    """

    layout: Layout
    device: Device
    parts: int
    features: int
    in_features: int
    row_tiles: int
    gated: bool
    tiles: cupy.ndarray
    row_scale: cupy.ndarray
    bias: cupy.ndarray | None
    prescale: cupy.ndarray | None
    largest_prescale: float
    name: str
    _norm_scales: tuple[float, ...]
    _largest: cupy.ndarray
    _largest_bias: tuple[float, ...]
    _bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.tiles, self.row_scale, self.bias, self.prescale) if a is not None)

    def bounds(self, length: float) -> list[float]:
        """For each part, what no output can exceed for inputs of this 2-norm (Cauchy-Schwarz)."""
        if not self._bounds:
            squares = self.device.read(self._largest).view(np.float32)
            if not np.isfinite(squares).all():
                raise Fp4rtError("checkpoint", f"{self.name}: holds NaN or infinity; the checkpoint is damaged; "
                                               "download or export it again")
            # The kernel's sum of up to K squares is in float32; a thousandth covers its rounding.
            self._bounds["norms"] = [1.001 * math.sqrt(square) * scale
                                     for square, scale in zip(squares.tolist(), self._norm_scales)]
        length *= self.largest_prescale
        return [length * norm + bias for norm, bias in zip(self._bounds["norms"], self._largest_bias)]


def pack(device: Device, parts: Sequence[Weight], layout: Layout, gated: bool) -> Packed:
    """Upload parts of one layout, below each other or as a gated pair (8 rows of each in turn)."""
    k, counts = parts[0].shape[1], [part.shape[0] for part in parts]
    row_tiles = -(-counts[0] // 8) if gated else -(-sum(counts) // 16)
    k_tiles = -(-k // layout.tile_k)
    tiles = device.zeros(row_tiles * k_tiles * layout.tile_bytes, np.uint8)
    largest = device.zeros(len(parts), np.uint32)

    scales = np.zeros(row_tiles * 16, np.float32)
    has_bias = any(part.bias is not None for part in parts)
    biases = np.zeros(row_tiles * 16, np.float32) if has_bias else None
    first = 0
    for index, (part, count) in enumerate(zip(parts, counts)):
        r = np.arange(count)
        packed_rows = r // 8 * 16 + index * 8 + r % 8 if gated else first + r
        scales[packed_rows] = layout.row_scales(part)
        if part.bias is not None:
            biases[packed_rows] = part.bias
        first += count
    row_scale = device.upload(scales)
    first = 0
    for index, (part, count) in enumerate(zip(parts, counts)):
        layout.repack(device, part, Place(tiles, row_scale, first, index if gated else -1, largest[index:]))
        first += count
    prescale = parts[0].pre_quant_scale
    return Packed(
        layout, device, len(parts), counts[0] if gated else sum(counts), k, row_tiles, gated, tiles, row_scale,
        None if biases is None else device.upload(biases),
        None if prescale is None else device.upload(np.asarray(prescale, np.float32)),
        1.0 if prescale is None else float(np.abs(prescale).max()),
        parts[0].name, tuple(layout.norm_scale(part) for part in parts), largest,
        tuple(0.0 if part.bias is None else float(np.abs(part.bias).max()) for part in parts))
