"""MXFP4 weights: E2M1 codes with one power-of-two scale (E8M0) for 32 of them along the input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.errors import Fp4rtError
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

    def scales_as_e4m3(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 [N, K/16], float32 [N]): E4M3 scales and one factor per row, whose products are exactly these scales.

        E4M3 holds the 18 powers of two from 2^-9 to 2^8. Blocks of zeros may have any scale; where others of one row
        are further apart, which no exporter's weights are, this raises Fp4rtError("checkpoint").
        """
        exponents = self.block_scales.astype(np.int32)
        wide = exponents.max(axis=1, initial=0) - exponents.min(axis=1, initial=255) > 17
        if wide.any():
            blocks = np.ascontiguousarray(self.codes[wide]).reshape(*exponents[wide].shape, BLOCK // 2)
            zero = ~(blocks & 0x77).any(axis=2)
            exponents[wide] = np.where(zero, np.where(zero, 0, exponents[wide]).max(axis=1, keepdims=True), exponents[wide])
        largest = exponents.max(axis=1, initial=0)
        below = largest[:, None] - exponents  # halvings from the row's largest scale, which becomes 2^8
        if below.size and below.max() > 17:
            raise Fp4rtError("checkpoint", f"{self.name}: block scales of one row are 2^{below.max()} apart; this "
                                           "backend takes up to 2^17; use device='reference'")
        # 2^8 is 0x78, each halving takes 8 off down to 2^-6, and 2^-7, 2^-8, 2^-9 are the subnormals 4, 2 and 1.
        e4m3 = np.where(below <= 14, 0x78 - 8 * below, 4 >> np.maximum(below - 15, 0)).astype(np.uint8)
        return np.repeat(e4m3, 2, axis=1), np.ldexp(np.float32(1), largest - 127 - 8).astype(np.float32)

    def dequantize(self, rows: slice = ALL) -> np.ndarray:
        scales = e8m0(self.block_scales[rows])
        values = E2M1[unpack(np.ascontiguousarray(self.codes[rows]))].reshape(*scales.shape, BLOCK) * scales[..., None]
        return values.reshape(scales.shape[0], -1)
