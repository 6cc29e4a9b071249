"""NVFP4 weights in the tiles of kernels/nvfp4_linear.cu."""

from __future__ import annotations

import numpy as np

from fp4rt.formats import Nvfp4
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place, panels


class Nvfp4Layout(Layout):
    """16 x 128 values in 1152 bytes; the kernel leaves 2^-7 and the part's global scale to the row."""

    stem, defines, tile_k, tile_bytes = "nvfp4_linear", {}, 128, 1152
    interleaved = True
    reason = "FP4 codes and block scales are decoded in registers"

    def row_scales(self, part: Nvfp4) -> float:
        return part.global_scale * 128

    def norm_scale(self, part: Nvfp4) -> float:
        return part.global_scale

    def repack(self, device: Device, part: Nvfp4, place: Place) -> None:
        n, k = part.shape
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        for rows in panels(n, k // 2 + k // 16):
            count = rows.stop - rows.start
            codes = device.upload(part.codes[rows], device.scratch((count, k // 2), np.uint8))
            scales = device.upload(part.block_scales[rows], device.scratch((count, k // 16), np.uint8))
            kernel(count, 128, codes, scales, place.tiles, rows.start, k, place.first, place.gated_part, place.largest)


NVFP4 = Nvfp4Layout()
