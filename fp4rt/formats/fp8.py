"""FP8 E4M3 weights with float32 scales per tensor, per output channel or per block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.formats.weight import ALL


def _e4m3_values() -> np.ndarray:
    """The 256 values of E4M3FN (OCP 8-bit floating point, 2023): bias 7, no infinities, 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3_values()
E4M3.setflags(write=False)


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Float32 to the nearest E4M3 bits (uint8), ties to even; what is out of range saturates, and so does NaN."""
    values = np.asarray(values, np.float32)
    size = np.fmin(np.abs(values), np.float32(448))
    bits = size.view(np.uint32)
    normal = (bits + 0x7FFFF + (bits >> 20 & 1) - (120 << 23)) >> 20
    subnormal = np.rint(size * np.float32(512)).astype(np.uint32)  # multiples of 2^-9; 8 of them are the first normal
    return np.where(size < 2.0**-6, subnormal, normal).astype(np.uint8) | np.signbit(values).astype(np.uint8) << 7


@dataclass(frozen=True)
class Fp8:
    """codes uint8 [N, K] (E4M3); scales float32 [ceil(N/bn), ceil(K/bk)], one for each block of (bn, bk) values.

    Per tensor is one block of (N, K), per channel blocks of (1, K). value = e4m3 * scale.
    """

    name: str
    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    bias: np.ndarray | None = None
    pre_quant_scale: np.ndarray | None = None
    format: str = "FP8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def granularity(self) -> str:
        """"tensor", "channel" or "128x128", for people."""
        if self.scales.size == 1:
            return "tensor"
        return "channel" if self.block[0] == 1 and self.scales.shape[1] == 1 else f"{self.block[0]}x{self.block[1]}"

    def dequantize(self, rows: slice = ALL) -> np.ndarray:
        n, k = self.shape
        index = np.arange(n)[rows] // self.block[0]
        return E4M3[self.codes[rows]] * np.repeat(self.scales, self.block[1], axis=1)[index, :k]
