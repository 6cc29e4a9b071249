"""Plain weights: BF16, F16 and F32, held as their bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.formats.weight import ALL


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """BF16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; uint16 bits. NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a BF16, F16, F32 or F64 tensor as float32."""
    return bf16_to_float32(data) if dtype == "BF16" else data.astype(np.float32)


@dataclass(frozen=True)
class Dense:
    """data [N, K]: uint16 holding BF16 bits, float16, or float32, as `format` says."""

    name: str
    format: str
    data: np.ndarray
    bias: np.ndarray | None = None
    pre_quant_scale: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self, rows: slice = ALL) -> np.ndarray:
        return to_float32(self.data[rows], self.format)
