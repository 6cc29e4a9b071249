"""BF16, F16 and F32 weights in the tiles of kernels/dense_linear.cu."""

from __future__ import annotations

import numpy as np

from fp4rt.formats import Dense
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place, panels

_SOURCES = {"BF16": (0, np.uint16), "F16": (1, np.uint16), "F32": (2, np.float32)}


class DenseLayout(Layout):
    """16 x 64 values in 2048 bytes (per plane), times a power of two per row, which `repack` chooses."""

    stem, tile_k = "dense_linear", 64

    def __init__(self, planes: int):
        self.planes = planes
        self.defines = {"WEIGHT_PLANES": planes}
        self.tile_bytes = 2048 * planes
        self.reason = ("held as fp16 times a power of two per row, exactly" if planes == 1
                       else "held as the sum of two fp16 numbers")

    def repack(self, device: Device, part: Dense, place: Place) -> None:
        n, k = part.shape
        source, dtype = _SOURCES[part.format]
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        for rows in panels(n, k * part.data.itemsize):
            count = rows.stop - rows.start
            data = device.upload(part.data[rows].view(dtype), device.scratch((count, k), dtype))
            kernel(count, 256, data, source, place.tiles, rows.start, k, place.first, place.gated_part, place.row_scale,
                   place.largest)


DENSE, DENSE_F32 = DenseLayout(1), DenseLayout(2)


def dense_layout(part: Dense) -> DenseLayout:
    """The layout for this weight: one plane where 16 bits hold it."""
    return DENSE_F32 if part.format == "F32" else DENSE
