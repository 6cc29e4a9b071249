"""Linears of more than a few tokens on sm_90a: activations in the order of warpgroup products; which variant runs."""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.ops.cuda.device import SHARED_LIMIT, Device
from fp4rt.ops.cuda.tiles import Layout, Packed

WHOLE = 128        # columns of the longest tile: what is a multiple of it has no tail in any layout
_THREADS = 384     # two warpgroups that compute and one that brings
_TOKENS, _STEPS = 64, 4  # of a block of the `order` kernel: each thread takes 32 columns of a token


@dataclass(frozen=True)
class Warpgroups:
    """A variant of kernels/linear_wgmma.cuh: rows and tokens of a block's tile; blocks, a cluster, that share its K.

    alone, shared: microseconds for 128 columns where a block has an SM to itself, and where two share one (so do those
    of larger clusters, however many there are): measured on an H100 with the NVFP4 linears of Llama-3.1-8B. Blocks of
    many sums have an SM to themselves.
    """

    rows: int
    tokens: int
    split: int
    alone: float
    shared: float

    @property
    def blocks(self) -> int:
        return 2 if self.rows * self.tokens <= 128 * 64 else 1

    def _sum_bytes(self) -> int:
        """Two warpgroups' sums of some tokens; those of a cluster lie where the ring was."""
        return 0 if self.split > 1 else 2 * (self.tokens if self.tokens <= 64 else 32) * (self.rows // 2 + 4) * 4

    def _stage_bytes(self, layout: Layout) -> int:
        return self.tokens * layout.tile_k * 2 + self.rows // 16 * layout.tile_bytes + 16  # and two barriers

    def stages(self, layout: Layout) -> int:
        """Buffers in what shared memory a block may have: a kilobyte of an SM's goes with each block."""
        limit = (SHARED_LIMIT[90] + 1024) // self.blocks - 1024
        return min(8, (limit - self._sum_bytes()) // self._stage_bytes(layout))

    def shared_bytes(self, layout: Layout) -> int:
        return self.stages(layout) * self._stage_bytes(layout) + self._sum_bytes()

    def defines(self, layout: Layout) -> dict[str, int]:
        return {"WARPGROUP_ROWS": self.rows, "WARPGROUP_TOKENS": self.tokens, "WARPGROUP_STAGES": self.stages(layout),
                "WARPGROUP_SPLIT": self.split, "WARPGROUP_BLOCKS": self.blocks, **layout.defines}

    def tiles(self, group: Packed, token_blocks: int) -> int:
        return token_blocks * -(-group.row_tiles * 16 // self.rows)

    def places(self, device: Device, layout: Layout) -> int:
        """Tiles that are computed at once."""
        if self.split == 1:
            return device.sm_count * self.blocks
        return device.clusters(self.split, self.shared_bytes(layout))

    def time(self, device: Device, group: Packed, token_blocks: int) -> float:
        """Microseconds that a call takes, apart from what all variants need."""
        tiles = self.tiles(group, token_blocks)
        waves = -(-tiles // self.places(device, group.layout))
        each = self.shared if self.split > 2 or tiles * self.split > device.sm_count else self.alone
        again = (waves - 1) * _WAVE_TIME if self.split > 2 else 0
        return waves * -(-group.in_features // (128 * self.split)) * each + _SPLIT_TIME[self.split] + again


_EXPERTS = {"EXPERTS": 1}
_SPLITS = 1, 2, 4, 5, 7  # an H100 holds 132, 66, 47 and 32 clusters of blocks that share SMs, and only 30 of eight
_SPLIT_TIME = {1: 0.0, 2: 1.5, 4: 3.0, 5: 3.3, 7: 3.8}  # microseconds for adding up a cluster's sums
_WAVE_TIME = 5.0  # and for large clusters that wait for others' places: a part of the chip stands still meanwhile
VARIANTS = (*(Warpgroups(256, 128, split, 1.35, 1.35) for split in (1, 2, 4)),
            *(Warpgroups(128, 128, split, 0.72, 0.72) for split in (1, 2)),
            *(Warpgroups(128, tokens, split, alone, shared)
              for tokens, alone, shared in ((64, 0.5, 0.8), (32, 0.42, 0.62), (16, 0.4, 0.55))
              for split in _SPLITS))


def replaces(device: Device, defines: dict[str, int]) -> bool:
    """Whether these products run where the many-token kernel with these constants would."""
    return "MANY_STAGES" in defines and device.arch == "sm_90a" and _runs(defines)


def runs(device: Device, layout: Layout) -> bool:
    """Sums per scale block would need a second set of accumulators, and a second plane a second set of weights."""
    return device.arch == "sm_90a" and _runs(layout.defines)


def _runs(defines: dict[str, int]) -> bool:
    return not defines.get("BLOCK_SCALES") and defines.get("WEIGHT_PLANES", 1) == 1


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    from fp4rt.ops.cuda.linear import LAYOUTS

    if capability != 90:
        return []
    return [("order", {}, 0), *((layout.stem, {**experts, **variant.defines(layout)}, variant.shared_bytes(layout))
                                for layout in LAYOUTS if _runs(layout.defines) for variant in VARIANTS
                                for experts in ({}, _EXPERTS) if variant.split == 1 or not experts)]


def choose(device: Device, group: Packed, tokens: int) -> Warpgroups:
    """The variant that is done first. Each cluster's block needs columns of its own."""
    key = group.layout, group.row_tiles, group.in_features, tokens
    if key not in device.chosen:
        k_tiles = -(-group.in_features // group.layout.tile_k)
        device.chosen[key] = min((variant for variant in VARIANTS if variant.split <= k_tiles),
                                 key=lambda variant: variant.time(device, group, -(-tokens // variant.tokens)))
    return device.chosen[key]


def choose_grouped(device: Device, up: Packed, down: Packed, pairs: int) -> tuple[Warpgroups, Warpgroups]:
    """For pairs grouped by expert, with blocks of as many tokens: the most that an average expert half fills."""
    whole = [variant for variant in VARIANTS if variant.split == 1]
    sizes = sorted({variant.tokens for variant in whole})
    size = max((size for size in sizes if pairs >= size // 2 * up.experts), default=sizes[0])
    blocks = pairs // size + min(pairs, up.experts) // 2
    first, second = (min((variant for variant in whole if variant.tokens == size),
                         key=lambda variant: variant.time(device, packed, blocks)) for packed in (up, down))
    return first, second


@dataclass(frozen=True)
class Ordered:
    """Activations [T, K] as kernels/order.cuh says: fp16 [slabs, padded, 64]; padded: T up to a multiple of 8."""

    data: cupy.ndarray
    shape: tuple[int, int]
    padded: int
    interleaved: bool

    @staticmethod
    def empty(device: Device, shape: tuple[int, int], interleaved: bool, tile_k: int = WHOLE) -> Ordered:
        """To be filled; columns to the end of a tile are part of it."""
        padded, slabs = -(-shape[0] // 8) * 8, -(-shape[1] // tile_k) * tile_k // 64
        return Ordered(device.scratch((slabs, padded, 64), np.float16), shape, padded, interleaved)


def order(device: Device, x: cupy.ndarray, layout: Layout) -> Ordered:
    """x fp16 [T, K] for the linears of a layout."""
    y = Ordered.empty(device, x.shape, layout.interleaved, layout.tile_k)
    tokens, slabs = x.shape[0], y.data.shape[0]
    device.kernel("order", "order")((-(-slabs // 2), -(-tokens // _TOKENS)), _TOKENS * _STEPS, x, y.data, tokens,
                                    y.padded, x.shape[1], slabs, int(y.interleaved), pdl=True)
    return y


def launch(device: Device, x: Ordered, group: Packed, out: cupy.ndarray, epilogue: tuple) -> None:
    """x @ W^T to `out`; epilogue: from row_scale on, as kernels/linear.cuh says."""
    tokens, k = x.shape
    variant = choose(device, group, tokens)
    blocks = variant.tiles(group, -(-tokens // variant.tokens)) * variant.split
    if variant.split == 1:
        blocks = min(blocks, variant.places(device, group.layout))  # each goes through several tiles
    device.kernel(group.layout.stem, "many_warpgroups", **variant.defines(group.layout))(
        blocks, _THREADS, group.tiles, x.data, tokens, x.padded, k, group.row_tiles, out, *epilogue,
        shared=variant.shared_bytes(group.layout), pdl=True)


def order_grouped(device: Device, x: cupy.ndarray, rows: cupy.ndarray | None, blocks: cupy.ndarray, pairs: int,
                  layout: Layout, block_size: int) -> Ordered:
    """x fp16 for experts' linears: pair i is of row rows[i], or of row i; blocks int32 [., 4] as experts.cu says."""
    y = Ordered.empty(device, (pairs, x.shape[1]), layout.interleaved, layout.tile_k)
    slabs = y.data.shape[0]
    device.kernel("order", "order_experts")((-(-slabs // 2), blocks.shape[0], -(-block_size // _TOKENS)),
                                            _TOKENS * _STEPS, x, rows, blocks, y.data, y.padded, x.shape[1], slabs,
                                            int(y.interleaved), pdl=True)
    return y


def launch_grouped(device: Device, x: Ordered, blocks: cupy.ndarray, packed: Packed, variant: Warpgroups,
                   out: cupy.ndarray, epilogue: tuple) -> None:
    """Each pair's x @ W^T of its expert."""
    grid = min(variant.tiles(packed, blocks.shape[0]), variant.places(device, packed.layout))
    device.kernel(packed.layout.stem, "many_experts_warpgroups", **_EXPERTS, **variant.defines(packed.layout))(
        grid, _THREADS, packed.tiles, x.data, blocks, blocks.shape[0], x.padded, packed.in_features, packed.row_tiles,
        out, *epilogue, shared=variant.shared_bytes(packed.layout), pdl=True)
