"""BF16, F16 and F32 weights in the tiles of kernels/dense_linear.cu."""

from __future__ import annotations

from collections.abc import Sequence

from fp4rt.formats import Dense
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.tiles import Layout, Place

_SOURCES = {"BF16": 0, "F16": 1, "F32": 2}  # enum Source in kernels/dense_linear.cu


class DenseLayout(Layout):
    """16 x 64 values in 2048 bytes (per plane), times a power of two per row, which `repack` chooses."""

    stem, tile_k = "dense_linear", 64

    def __init__(self, planes: int):
        self.planes = planes
        self.defines = {"WEIGHT_PLANES": planes}
        self.tile_bytes = 2048 * planes
        self.reason = ("held as fp16 times a power of two per row, exactly" if planes == 1
                       else "held as the sum of two fp16 numbers")

    def source_bytes(self, part: Dense) -> int:
        return part.shape[1] * part.data.itemsize

    def kind(self, part: Dense) -> str:
        return part.format

    def repack(self, device: Device, parts: Sequence[Dense], place: Place) -> None:
        kernel = device.kernel(self.stem, "repack", **self.few_defines(device.shared_limit))
        for rows in self.panels(parts):
            data = device.upload_all([part.data[rows] for part in parts])
            kernel((rows.stop - rows.start, len(parts)), 256, data, _SOURCES[parts[0].format], place.tiles, rows.start,
                   parts[0].shape[1], place.first, place.gated_part, place.row_tiles, place.row_scale, place.largest)


DENSE, DENSE_F32 = DenseLayout(1), DenseLayout(2)


def dense_layout(part: Dense) -> DenseLayout:
    """The layout for this weight: one plane where 16 bits hold it."""
    return DENSE_F32 if part.format == "F32" else DENSE
