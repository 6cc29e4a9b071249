"""MXFP4 weights in the tiles of kernels/mxfp4_linear.cu."""

from __future__ import annotations

import numpy as np

from fp4rt.formats import Mxfp4
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place, panels


class Mxfp4Layout(Layout):
    """16 x 128 values in 1088 bytes, their scales relative to the row's largest, which `repack` gives to the row."""

    stem, defines, tile_k, tile_bytes = "mxfp4_linear", {}, 128, 1088
    interleaved = True
    reason = "FP4 codes and their powers of two are decoded in registers"

    def repack(self, device: Device, part: Mxfp4, place: Place) -> None:
        n, k = part.shape
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        for rows in panels(n, k // 2 + k // 32):
            count = rows.stop - rows.start
            codes = device.upload(part.codes[rows], device.scratch((count, k // 2), np.uint8))
            scales = device.upload(part.block_scales[rows], device.scratch((count, k // 32), np.uint8))
            kernel(count, 128, codes, scales, place.tiles, rows.start, k, place.first, place.gated_part, place.row_scale,
                   place.largest)


MXFP4 = Mxfp4Layout()
