"""What every weight format offers: a shape, its bytes as stored, and its exact values."""

from __future__ import annotations

from typing import Protocol

import numpy as np

ALL = slice(None)


class Weight(Protocol):
    """One linear's weight [N, K] with what belongs to it. Implemented by Nvfp4, Fp8 and Dense.

    format: "NVFP4", "FP8", "BF16", "F16" or "F32". name: the tensor's name in the checkpoint.
    bias: float32 [N] or None. pre_quant_scale: float32 [K] or None; the input is multiplied by it first (AWQ).
    """

    name: str
    format: str
    bias: np.ndarray | None
    pre_quant_scale: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""

    def dequantize(self, rows: slice = ALL) -> np.ndarray:
        """The values of these rows, float32 [n, K]; neither bias nor pre_quant_scale is applied."""
