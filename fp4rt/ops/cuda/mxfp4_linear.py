"""MXFP4 weights in the tiles of kernels/mxfp4_linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

from fp4rt.formats import Mxfp4
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place


class Mxfp4Layout(Layout):
    """16 x 128 values in 1088 bytes, their scales relative to the row's largest, which `repack` gives to the row."""

    stem, defines, tile_k, tile_bytes = "mxfp4_linear", {}, 128, 1088
    interleaved = True
    reason = "FP4 codes and their powers of two are decoded in registers"

    def source_bytes(self, part: Mxfp4) -> int:
        return part.shape[1] // 2 + part.shape[1] // 32

    def repack(self, device: Device, parts: Sequence[Mxfp4], place: Place) -> None:
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        for rows in self.panels(parts):
            codes = device.upload_all([part.codes[rows] for part in parts])
            scales = device.upload_all([part.block_scales[rows] for part in parts])
            kernel((rows.stop - rows.start, len(parts)), 128, codes, scales, place.tiles, rows.start, parts[0].shape[1],
                   place.first, place.gated_part, place.row_tiles, place.row_scale, place.largest)


MXFP4 = Mxfp4Layout()
