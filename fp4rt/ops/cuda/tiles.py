"""Weights on the device: one layout per weight, made once at upload, read by the few- and many-token kernels alike."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops.cuda.device import Device

FEW_TOKENS = 8     # columns of one mma: the few-token kernel costs the same for 1 to 8
EXPERT_WARPS = 2, 4  # of a few-token block of experts' linears: with less than three tiles each, what a warp costs shows
_PANEL = 16 << 20  # bytes of source on the device while it is repacked


def few_warps(shared_limit: int) -> int:
    """Warps of a block of the few-token kernel."""
    return 16 if shared_limit > 128 << 10 else 8


def sum_bytes(warps: int, tokens: int) -> int:
    """Shared memory for the warps' sums in the few-token kernel: two sets of 16 rows, SUM_STRIDE apart."""
    return 2 * warps * tokens * 20 * 4


def sum_defines(sums: int, warps: int) -> dict[str, int]:
    """Constants of another kernel for the order of additions that a few-token kernel of so many warps has, for which a
    thread keeps 2 sums of each output, and 3 where that kernel divides the columns. With 1 it has its own order."""
    return {} if sums == 1 else {"SUM_WARPS": warps, "SUM_DIVIDED": int(sums == 3)}


def _panels(count: int, nbytes: int) -> Iterator[slice]:
    """Ranges of so many things, of nbytes each, that fit a panel each."""
    step = max(1, _PANEL // max(nbytes, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@dataclass(frozen=True)
class Place:
    """Where a part of experts that lie behind each other, row_tiles each, goes in each of them: below the parts before
    it (`first`), or, in a gated pair, as every other 8 rows (`gated_part` 0 or 1, else -1). largest: uint32 bits of
    each expert's largest squared row norm, for repack to raise."""

    tiles: cupy.ndarray
    row_scale: cupy.ndarray
    first: int
    gated_part: int
    row_tiles: int
    largest: cupy.ndarray


class Layout(ABC):
    """How a format's weights lie as tiles of 16 rows x tile_k columns, tile_bytes each.

    stem and defines: the kernels that read it. interleaved: whether lane t of a quad owns 32 neighbouring columns of a
    tile, and not 8 of every 32 (Tile::position).
    """

    stem: str
    defines: dict[str, int]
    tile_k: int
    tile_bytes: int
    interleaved = False
    reason: str

    def few_defines(self, shared_limit: int, division: int = 0) -> dict[str, int]:
        """Constants of the few-token kernel (and of `repack`, beside it): warps of a block, which split the columns;
        tiles each has on the way; blocks whose registers fit an SM, so that the next kernel's can begin; how columns
        are divided (enum Division in kernels/linear_few.cuh)."""
        warps = few_warps(shared_limit)
        slot = self.tile_bytes + FEW_TOKENS * self.tile_k * 2
        depth = (shared_limit - sum_bytes(warps, FEW_TOKENS)) // (warps * slot)
        blocks = 1 if self.defines.get("BLOCK_SCALES") and warps == 16 else 2
        return {"FEW_WARPS": warps, "FEW_DEPTH": max(1, min(depth, 3)), "FEW_BLOCKS": blocks,
                "FEW_DIVISION": division, **self.defines}

    def row_scales(self, part: Weight) -> np.ndarray | float:
        """What a row's sums are multiplied by at the end; repack may write it itself."""
        return 1.0

    def norm_scale(self, part: Weight) -> float:
        """What the norms that repack reports leave out."""
        return 1.0

    @abstractmethod
    def source_bytes(self, part: Weight) -> int:
        """Bytes of a row as it comes."""

    def kind(self, part: Weight) -> Any:
        """What must be equal for experts' parts to be repacked together."""
        return None

    @abstractmethod
    def repack(self, device: Device, parts: Sequence[Weight], place: Place) -> None:
        """Bring one part of several experts, all of a kind and shape, to their place, panel by panel."""

    def panels(self, parts: Sequence[Weight]) -> Iterator[slice]:
        """Rows that are brought at once: all of several experts', where those fit a panel together."""
        return _panels(parts[0].shape[0], len(parts) * self.source_bytes(parts[0]))


@dataclass(frozen=True)
class Packed:
    """Parts of one format as one weight, or those of every expert behind each other.

    tiles: uint8; row_scale, bias: float32 [experts * row tiles * 16], in packed order. features: output columns.
    prescale: float32 [experts, K] that the input is multiplied by first, and its largest magnitude.
    """

    layout: Layout
    device: Device
    experts: int
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
    _norm_scales: np.ndarray  # [experts, parts]
    _largest: cupy.ndarray
    _largest_bias: tuple[float, ...]
    _bounds: dict[str, Any] = field(default_factory=dict)
    _alone: dict[int, Packed] = field(default_factory=dict)

    @functools.cached_property
    def tickets(self) -> cupy.ndarray:
        """int32 [FEW_TOKENS * row tiles], for blocks that share an output to count each other; zero between kernels."""
        return self.device.zeros(FEW_TOKENS * self.row_tiles, np.int32)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.tiles, self.row_scale, self.bias, self.prescale) if a is not None)

    def expert(self, e: int) -> Packed:
        """Expert e as a weight of its own, where it lies; its bounds are those of all."""
        if e not in self._alone:
            def own(array: cupy.ndarray | None) -> cupy.ndarray | None:
                return None if array is None else array.reshape(self.experts, -1)[e]

            self._alone[e] = replace(self, experts=1, tiles=own(self.tiles), row_scale=own(self.row_scale),
                                     bias=own(self.bias), prescale=own(self.prescale), _alone={})
        return self._alone[e]

    def bounds(self, length: float) -> list[float]:
        """For each part, what no output of any expert can exceed for inputs of this 2-norm (Cauchy-Schwarz)."""
        if not self._bounds:
            squares = self.device.read(self._largest).view(np.float32)
            if not np.isfinite(squares).all():
                raise Fp4rtError("checkpoint", f"{self.name}: holds NaN or infinity; the checkpoint is damaged; "
                                               "download or export it again")
            # The kernel's sum of up to K squares is in float32; a thousandth covers its rounding.
            norms = np.sqrt(squares.astype(np.float64)).reshape(self._norm_scales.T.shape).T * self._norm_scales
            self._bounds["norms"] = (1.001 * norms.max(axis=0)).tolist()
        length *= self.largest_prescale
        return [length * norm + bias for norm, bias in zip(self._bounds["norms"], self._largest_bias)]


def _alike(kinds: Sequence[Any], nbytes: int) -> Iterator[slice]:
    """Ranges of neighbours of one kind, of nbytes each, that fit a panel; at least one in each."""
    start = 0
    for kind, group in itertools.groupby(kinds):
        end = start + len(list(group))
        for panel in _panels(end - start, nbytes):
            yield slice(start + panel.start, start + panel.stop)
        start = end


def pack(device: Device, experts: Sequence[Sequence[Weight]], layout: Layout, gated: bool) -> Packed:
    """Upload each expert's parts (of one layout and the same shapes), below each other or as a gated pair (8 rows of
    each in turn). A linear is one expert."""
    parts = experts[0]
    k, counts = parts[0].shape[1], [part.shape[0] for part in parts]
    row_tiles = -(-counts[0] // 8) if gated else -(-sum(counts) // 16)
    rows, tile_bytes = row_tiles * 16, row_tiles * -(-k // layout.tile_k) * layout.tile_bytes
    tiles = device.zeros(len(experts) * tile_bytes, np.uint8)
    largest = device.zeros(len(parts) * len(experts), np.uint32)

    firsts = [0] * len(parts) if gated else np.cumsum([0, *counts[:-1]]).tolist()
    packed_rows = [np.arange(count) // 8 * 16 + index * 8 + np.arange(count) % 8 if gated else first + np.arange(count)
                   for index, (first, count) in enumerate(zip(firsts, counts))]
    scales = np.zeros((len(experts), rows), np.float32)
    has_bias = any(part.bias is not None for parts in experts for part in parts)
    biases = np.zeros((len(experts), rows), np.float32) if has_bias else None
    for e, parts in enumerate(experts):
        for part, at in zip(parts, packed_rows):
            scales[e, at] = layout.row_scales(part)
            if part.bias is not None:
                biases[e, at] = part.bias
    row_scale = device.upload(scales.reshape(-1))
    for index, (first, count) in enumerate(zip(firsts, counts)):
        same = [parts[index] for parts in experts]
        for together in _alike([layout.kind(part) for part in same], count * layout.source_bytes(same[0])):
            e = together.start
            layout.repack(device, same[together],
                          Place(tiles[e * tile_bytes:], row_scale[e * rows:], first, index if gated else -1, row_tiles,
                                largest[index * len(experts) + e:]))
    prescale = None
    if any(parts[0].pre_quant_scale is not None for parts in experts):
        prescale = np.stack([np.ones(k, np.float32) if parts[0].pre_quant_scale is None
                             else np.asarray(parts[0].pre_quant_scale, np.float32) for parts in experts])
    return Packed(
        layout, device, len(experts), len(counts), counts[0] if gated else sum(counts), k, row_tiles, gated, tiles,
        row_scale, None if biases is None else device.upload(biases.reshape(-1)),
        None if prescale is None else device.upload(prescale),
        1.0 if prescale is None else float(np.abs(prescale).max()),
        experts[0][0].name, np.array([[layout.norm_scale(part) for part in parts] for parts in experts]), largest,
        tuple(0.0 if biases is None else float(np.abs(biases[:, at]).max()) for at in packed_rows))
