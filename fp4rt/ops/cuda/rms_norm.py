"""RMSNorm of the residual stream in front of linears with many outputs to share it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cupy
import numpy as np

from fp4rt.ops.cuda.activation import Activation, Ordered, exponent_for
from fp4rt.ops.cuda.device import SHARED_LIMIT, Device
from fp4rt.ops.cuda.tiles import few_warps

_TINY = 1e-30  # mean square of a row of zeros


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("rms_norm", _defines(SHARED_LIMIT[capability], ordered), 0) for ordered in (False, True)]


def _defines(shared_limit: int, ordered: bool) -> dict[str, int]:
    """As many threads as a block of the few-token linears, which may do this themselves, with the same bits."""
    return {"THREADS": 32 * few_warps(shared_limit), "ORDERED": int(ordered)}


@dataclass(frozen=True)
class Norm:
    """weight float32 [n] on the device; largest: its largest magnitude."""

    weight: cupy.ndarray
    eps: float
    largest: float


def norm_weight(device: Device, weight: np.ndarray, eps: float) -> Norm:
    weight = np.asarray(weight, np.float32)
    return Norm(device.upload(weight), float(eps), float(np.abs(weight).max()))


@dataclass(frozen=True)
class Normed:
    """x * weight / sqrt(mean(x^2) + eps) of x float32 [T, n], still to be computed: linears of few tokens do it while
    they read x. A row's 2-norm is at most sqrt(n) * norm.largest."""

    x: cupy.ndarray
    norm: Norm
    _computed: list[Activation] = field(default_factory=list)
    _ordered: dict[bool, Ordered] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape

    @property
    def exponent(self) -> int:
        return exponent_for(self.row_length())

    def row_length(self) -> float:
        return math.sqrt(self.x.shape[1]) * self.norm.largest

    def room(self, device: Device) -> Activation:
        """Where a caller's kernel computes it, for `computed` to return."""
        length = self.row_length()
        self._computed.append(Activation(device.scratch(self.shape, np.float16), self.exponent, length, length))
        return self._computed[0]

    def computed(self, device: Device) -> Activation:
        """By a kernel of its own, at the first call."""
        if not self._computed:
            self._computed.append(rms_norm(device, self.x, self.norm))
        return self._computed[0]

    def ordered(self, device: Device, interleaved: bool) -> Ordered:
        """The same for linears that want it so: by a kernel of its own, at the first call. n is a multiple of 128."""
        if interleaved not in self._ordered:
            y = Ordered.empty(device, self.shape, interleaved)
            _launch(device, self.x, self.norm.weight, y.data, self.norm.eps, math.ldexp(1.0, -self.exponent), None, y)
            self._ordered[interleaved] = y
        return self._ordered[interleaved]


def rms_norm(device: Device, x: cupy.ndarray, norm: Norm) -> Activation:
    """Normed(x, norm) at once; to the last bit what the linears compute."""
    length = Normed(x, norm).row_length()
    exponent = exponent_for(length)
    y = device.scratch(x.shape, np.float16)
    _launch(device, x, norm.weight, y, norm.eps, math.ldexp(1.0, -exponent), None)
    return Activation(y, exponent, length, length)


def unit_rows(device: Device, x: cupy.ndarray) -> Activation:
    """x float32 [T, n] itself, as rows of mean square 1 and the float32 factor of each row."""
    y, rows = device.scratch(x.shape, np.float16), device.scratch(x.shape[0], np.float32)
    _launch(device, x, None, y, _TINY, 1.0, rows)
    length = math.sqrt(x.shape[1])
    return Activation(y, 0, length, length, rows)


def _launch(device: Device, x: cupy.ndarray, weight: cupy.ndarray | None, y: cupy.ndarray, eps: float, factor: float,
            rows: cupy.ndarray | None, ordered: Ordered | None = None) -> None:
    defines = _defines(device.shared_limit, ordered is not None)
    device.kernel("rms_norm", "rms_norm", **defines)(x.shape[0], defines["THREADS"], x, weight, y, x.shape[1], eps,
                                                     factor, rows, ordered.padded if ordered else 0,
                                                     int(ordered is not None and ordered.interleaved), pdl=True)
