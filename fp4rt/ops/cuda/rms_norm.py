"""RMSNorm of the residual stream in front of linears with many outputs to share it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.ops.cuda.activation import Activation, exponent_for
from fp4rt.ops.cuda.device import Device

_THREADS = 256


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("rms_norm", {}, 0)]


@dataclass(frozen=True)
class Norm:
    """weight float32 [n] on the device; largest: its largest magnitude."""

    weight: cupy.ndarray
    eps: float
    largest: float


def norm_weight(device: Device, weight: np.ndarray, eps: float) -> Norm:
    weight = np.asarray(weight, np.float32)
    return Norm(device.upload(weight), float(eps), float(np.abs(weight).max()))


def rms_norm(device: Device, x: cupy.ndarray, norm: Norm) -> Activation:
    """x float32 [T, n] -> x * weight / sqrt(mean(x^2) + eps); a row's 2-norm is at most sqrt(n) * largest."""
    length = math.sqrt(x.shape[1]) * norm.largest
    exponent = exponent_for(length)
    y = device.scratch(x.shape, np.float16)
    device.kernel("rms_norm", "rms_norm")(x.shape[0], _THREADS, x, norm.weight, y, x.shape[1], norm.eps,
                                          math.ldexp(1.0, -exponent), pdl=True)
    return Activation(y, exponent, length, length)
