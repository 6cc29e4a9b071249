"""Linears of more than a few tokens on sm_90a: activations in the order of warpgroup products; which variant runs."""

from __future__ import annotations

from dataclasses import dataclass

import cupy

from fp4rt.ops.cuda.activation import Ordered
from fp4rt.ops.cuda.device import SHARED_LIMIT, Device
from fp4rt.ops.cuda.layouts import LAYOUTS
from fp4rt.ops.cuda.tiles import EXPERT_WARPS, Layout, Packed, few_warps, sum_defines

_THREADS = 384     # two warpgroups that compute and one that brings
_TOKENS, _STEPS = 64, 4  # of a block of the `order` kernel: each thread takes 32 columns of a token


@dataclass(frozen=True)
class Warpgroups:
    """A variant of kernels/linear_wgmma.cuh: rows and tokens of a block's tile; blocks, a cluster, that share its K.

    alone, full, tile: microseconds that 128 columns take where few blocks are on the chip, and where as many as find
    places; and that a tile takes besides. Fitted to an H100's times of nine NVFP4 linears from 2048x4096 to 30720x3840
    for 16 to 2048 tokens: what they choose takes 0.5 % longer than the best variant on average, over 5 % in 3 of 108.

    sums: that a thread keeps of each output: 1, or as many as it takes to follow the few-token kernel's order of
    additions, 2, and 3 where that divides the columns into parts.
    """

    rows: int
    tokens: int
    split: int
    alone: float
    full: float
    tile: float
    sums: int = 1

    @property
    def blocks(self) -> int:
        return 2 if self.rows * self.tokens * self.sums <= 128 * 64 else 1

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

    def defines(self, layout: Layout, warps: int = 1) -> dict[str, int]:
        """warps: of the few-token kernel that several sums follow."""
        return {"WARPGROUP_ROWS": self.rows, "WARPGROUP_TOKENS": self.tokens, "WARPGROUP_STAGES": self.stages(layout),
                "WARPGROUP_SPLIT": self.split, "WARPGROUP_BLOCKS": self.blocks,
                **sum_defines(self.sums, warps), **layout.defines}

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
        load = min(1.0, tiles * self.split / (device.sm_count * self.blocks))
        each = self.alone + (self.full - self.alone) * load
        return waves * (-(-group.in_features // (128 * self.split)) * each + self.tile + _SPLIT_TIME[self.split])


_EXPERTS = {"EXPERTS": 1}
_SPLITS = 1, 2, 4, 5, 7  # an H100 holds 132, 66, 47 and 32 clusters of blocks that share SMs, and only 30 of eight
_SPLIT_TIME = {1: 0.0, 2: 1.3, 4: 1.6, 5: 1.4, 7: 2.1}  # microseconds for adding up a cluster's sums
VARIANTS = (*(Warpgroups(256, 128, split, 0.86, 1.46, 4.7) for split in (1, 2, 4)),
            *(Warpgroups(128, 128, split, 0.47, 0.84, 1.2) for split in (1, 2)),
            *(Warpgroups(128, tokens, split, alone, full, tile)
              for tokens, alone, full, tile in ((64, 0.57, 1.04, 1.5), (32, 0.44, 0.79, 0.7), (16, 0.42, 0.78, 0.0))
              for split in _SPLITS))
# Those that follow the few-token kernel.
REPRODUCING = (Warpgroups(128, 128, 1, 0.74, 0.92, 1.2, 2), Warpgroups(128, 64, 1, 0.48, 0.65, 1.5, 2),
               Warpgroups(128, 64, 1, 0.53, 0.68, 1.5, 3), Warpgroups(128, 32, 1, 0.46, 0.84, 0.7, 2),
               Warpgroups(128, 32, 1, 0.50, 0.54, 0.7, 3), Warpgroups(128, 16, 1, 0.45, 0.78, 0.0, 2),
               Warpgroups(128, 16, 1, 0.58, 0.78, 0.0, 3))


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
    if capability != 90:
        return []
    found = [("order", {}, 0)]
    for layout in LAYOUTS:
        for variant in (*VARIANTS, *REPRODUCING) if _runs(layout.defines) else ():
            kernels = [({}, few_warps(SHARED_LIMIT[90]))]
            if variant.split == 1 and variant.sums < 3:
                kernels += [(_EXPERTS, warps) for warps in EXPERT_WARPS[:variant.sums]]
            found += [(layout.stem, {**experts, **variant.defines(layout, warps)}, variant.shared_bytes(layout))
                      for experts, warps in kernels]
    return found


def choose(device: Device, group: Packed, tokens: int, sums: int = 1) -> Warpgroups:
    """The variant that is done first. Each cluster's block needs columns of its own."""
    key = group.layout, group.row_tiles, group.in_features, tokens, sums
    if key not in device.chosen:
        k_tiles = -(-group.in_features // group.layout.tile_k)
        device.chosen[key] = min((variant for variant in (*VARIANTS, *REPRODUCING)
                                  if variant.split <= k_tiles and variant.sums == sums),
                                 key=lambda variant: variant.time(device, group, -(-tokens // variant.tokens)))
    return device.chosen[key]


def choose_grouped(device: Device, up: Packed, down: Packed, pairs: int,
                   sums: int = 1) -> tuple[Warpgroups, Warpgroups]:
    """For pairs grouped by expert, with blocks of as many tokens: the most that an average expert half fills."""
    whole = [variant for variant in (*VARIANTS, *REPRODUCING) if variant.split == 1 and variant.sums == sums]
    sizes = sorted({variant.tokens for variant in whole})
    size = max((size for size in sizes if pairs >= size // 2 * up.experts), default=sizes[0])
    blocks = pairs // size + min(pairs, up.experts) // 2
    first, second = (min((variant for variant in whole if variant.tokens == size),
                         key=lambda variant: variant.time(device, packed, blocks)) for packed in (up, down))
    return first, second


def order(device: Device, x: cupy.ndarray, layout: Layout) -> Ordered:
    """x fp16 [T, K] for the linears of a layout."""
    y = Ordered.empty(device, x.shape, layout.interleaved, layout.tile_k)
    tokens, slabs = x.shape[0], y.data.shape[0]
    device.kernel("order", "order")((-(-slabs // 2), -(-tokens // _TOKENS)), _TOKENS * _STEPS, x, y.data, tokens,
                                    y.padded, x.shape[1], slabs, int(y.interleaved), pdl=True)
    return y


def launch(device: Device, x: Ordered, group: Packed, out: cupy.ndarray, epilogue: tuple, *, sums: int = 1,
           parts: int = 1) -> None:
    """x @ W^T to `out`; epilogue: from row_scale on, as kernels/linear.cuh says. sums: of the variant; parts: as many
    as the few-token kernel divides the columns into."""
    tokens, k = x.shape
    variant = choose(device, group, tokens, sums)
    blocks = variant.tiles(group, -(-tokens // variant.tokens)) * variant.split
    if variant.split == 1:
        blocks = min(blocks, variant.places(device, group.layout))  # each goes through several tiles
    device.kernel(group.layout.stem, "many_warpgroups",
                  **variant.defines(group.layout, few_warps(device.shared_limit)))(
        blocks, _THREADS, group.tiles, x.data, tokens, x.padded, k, group.row_tiles, parts, out, *epilogue,
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


def launch_grouped(device: Device, x: Ordered, blocks: cupy.ndarray, packed: Packed, variant: Warpgroups, warps: int,
                   out: cupy.ndarray, epilogue: tuple) -> None:
    """Each pair's x @ W^T of its expert. warps: of the few-token kernel that the variant may follow."""
    grid = min(variant.tiles(packed, blocks.shape[0]), variant.places(device, packed.layout))
    device.kernel(packed.layout.stem, "many_experts_warpgroups", **_EXPERTS, **variant.defines(packed.layout, warps))(
        grid, _THREADS, packed.tiles, x.data, blocks, blocks.shape[0], x.padded, packed.in_features, packed.row_tiles,
        out, *epilogue, shared=variant.shared_bytes(packed.layout), pdl=True)
