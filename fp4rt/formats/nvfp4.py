"""NVFP4 weights: E2M1 codes, one E4M3 scale for 16 of them along the input, one float32 scale per tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.formats.fp8 import E4M3
from fp4rt.formats.weight import ALL

BLOCK = 16
BLOCKS = (BLOCK, 32, 64, 128)  # what exporters can be told to use

# OCP Microscaling Formats v1.0, E2M1; code 8 is minus zero.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E2M1.setflags(write=False)


def unpack(codes: np.ndarray) -> np.ndarray:
    """[..., K/2] bytes to [..., K] codes 0..15; the even element is the low nibble."""
    out = np.empty((*codes.shape[:-1], codes.shape[-1] * 2), np.uint8)
    out[..., 0::2] = codes & 15
    out[..., 1::2] = codes >> 4
    return out


def unswizzle(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Block scales from the 128x4 order of the Blackwell tensor cores to row-major [rows, columns].

    There, scale (m, k) of a matrix padded to 128 rows and 4 columns lies at byte
    ((m/128) * C4 + k/4) * 512 + (m%32) * 16 + ((m%128)/32) * 4 + k%4 with C4 = ceil(columns/4).
    """
    m_tiles, k_tiles = -(-rows // 128), -(-columns // 4)
    tiles = scales.reshape(m_tiles, k_tiles, 32, 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4).reshape(m_tiles * 128, k_tiles * 4)[:rows, :columns])


def of_blocks(scales: np.ndarray, width: int) -> np.ndarray:
    """Scales [N, K/width] of wider blocks as those of blocks of 16, [N, K/16]."""
    return scales if width == BLOCK else np.repeat(scales, width // BLOCK, axis=1)


@dataclass(frozen=True)
class Nvfp4:
    """codes uint8 [N, K/2]; block_scales uint8 [N, K/16] (E4M3 bits); value = e2m1 * e4m3 * global_scale.

    `global_scale` always multiplies: ModelOpt's weight_scale_2, or one over compressed-tensors' weight_global_scale.
    """

    name: str
    codes: np.ndarray
    block_scales: np.ndarray
    global_scale: float
    bias: np.ndarray | None = None
    pre_quant_scale: np.ndarray | None = None
    format: str = "NVFP4"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.block_scales.nbytes + 4

    def dequantize(self, rows: slice = ALL) -> np.ndarray:
        scales = E4M3[self.block_scales[rows]]
        values = E2M1[unpack(self.codes[rows])].reshape(*scales.shape, BLOCK) * scales[..., None]
        return values.reshape(scales.shape[0], -1) * np.float32(self.global_scale)
