"""NVFP4 weights in the tiles of kernels/nvfp4_linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

from fp4rt.formats import Nvfp4
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place


class Nvfp4Layout(Layout):
    """16 x 128 values in 1152 bytes; the kernel leaves 2^-7 and the part's global scale to the row."""

    stem, defines, tile_k, tile_bytes = "nvfp4_linear", {}, 128, 1152
    interleaved = True
    reason = "FP4 codes and block scales are decoded in registers"

    def row_scales(self, part: Nvfp4) -> float:
        return part.global_scale * 128

    def norm_scale(self, part: Nvfp4) -> float:
        return part.global_scale

    def source_bytes(self, part: Nvfp4) -> int:
        return part.shape[1] // 2 + part.shape[1] // 16

    def repack(self, device: Device, parts: Sequence[Nvfp4], place: Place) -> None:
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        for rows in self.panels(parts):
            codes = device.upload_all([part.codes[rows] for part in parts])
            scales = device.upload_all([part.block_scales[rows] for part in parts])
            kernel((rows.stop - rows.start, len(parts)), 128, codes, scales, place.tiles, rows.start, parts[0].shape[1],
                   place.first, place.gated_part, place.row_tiles, place.largest)


NVFP4 = Nvfp4Layout()
