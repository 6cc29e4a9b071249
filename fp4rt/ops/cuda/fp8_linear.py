"""FP8 weights in the tiles of kernels/fp8_linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Fp8
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place


class Fp8Layout(Layout):
    """16 x 128 values in 2048 bytes; the kernel leaves 2^-8 to the row, and the scale where a row has only one."""

    stem, tile_k = "fp8_linear", 128

    def __init__(self, block_scales: bool):
        self.defines = {"BLOCK_SCALES": int(block_scales)}
        self.tile_bytes = 2112 if block_scales else 2048
        self.reason = "FP8 codes are decoded in registers" + (", scales of 128 columns applied to sums" * block_scales)

    def row_scales(self, part: Fp8) -> np.ndarray | float:
        if self.defines["BLOCK_SCALES"]:
            return 256.0
        return np.repeat(part.scales[:, 0], part.block[0])[:part.shape[0]] * np.float32(256)

    def source_bytes(self, part: Fp8) -> int:
        return part.shape[1]

    def kind(self, part: Fp8) -> tuple[int, ...]:
        return *part.block, *part.scales.shape

    def repack(self, device: Device, parts: Sequence[Fp8], place: Place) -> None:
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        scales = device.upload_all([part.scales for part in parts])
        for rows in self.panels(parts):
            codes = device.upload_all([part.codes[rows] for part in parts])
            kernel((rows.stop - rows.start, len(parts)), 128, codes, scales, place.tiles, rows.start, parts[0].shape[1],
                   *parts[0].block, parts[0].scales.shape[1], parts[0].scales.size, place.first, place.gated_part,
                   place.row_tiles, place.largest)


FP8, FP8_BLOCKS = Fp8Layout(False), Fp8Layout(True)


def fp8_layout(part: Fp8) -> Fp8Layout:
    """The layout for this weight. Raises where blocks are not a multiple of 128 columns, which no exporter writes."""
    if part.scales.shape[1] == 1:
        return FP8
    if part.block[1] % 128:
        raise Fp4rtError("checkpoint", f"{part.name}: its FP8 scales cover blocks of {part.granularity}; the CUDA backend "
                                       "takes blocks of a multiple of 128 columns; use device='cpu'")
    return FP8_BLOCKS
