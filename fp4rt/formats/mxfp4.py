"""MXFP4 weights: E2M1 codes with one power-of-two scale (E8M0) for 32 of them along the input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.formats.nvfp4 import E2M1, unpack
from fp4rt.formats.weight import ALL

BLOCK = 32


def e8m0(scales: np.ndarray) -> np.ndarray:
    """2^(byte - 127) as float32 (OCP Microscaling Formats v1.0); byte 0 is the subnormal 2^-127, 255 is NaN."""
    return np.ldexp(np.where(scales == 255, np.float32(np.nan), np.float32(1)), scales.astype(np.int32) - 127)


@dataclass(frozen=True)
class Mxfp4:
    """codes uint8 [N, K/2]; block_scales uint8 [N, K/32] (E8M0 bits); value = e2m1 * 2^(scale - 127)."""

    name: str
    codes: np.ndarray
    block_scales: np.ndarray
    bias: np.ndarray | None = None
    pre_quant_scale: np.ndarray | None = None
    format: str = "MXFP4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.block_scales.nbytes

    def dequantize(self, rows: slice = ALL) -> np.ndarray:
        scales = e8m0(self.block_scales[rows])
        values = E2M1[unpack(np.ascontiguousarray(self.codes[rows]))].reshape(*scales.shape, BLOCK) * scales[..., None]
        return values.reshape(scales.shape[0], -1)
