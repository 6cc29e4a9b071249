"""The Mamba2 mixer between its linears: what it holds, what sequences remember of it, and its launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.ops import MambaShape
from fp4rt.ops.cuda.activation import Activation, exponent_for
from fp4rt.ops.cuda.batch import DeviceBatch
from fp4rt.ops.cuda.device import Device

_THREADS, _NORM_THREADS, _LANES, _CONVOLVE_TOKENS, _MAX_STATE = 128, 512, 8, 8, 256  # as in kernels/mamba.cu
_COMMON_SIZES = ((16, 4), (32, 4), (64, 4), (128, 2), (128, 4), (256, 4))


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """(stem, defines, dynamic shared bytes) that this module may launch, at published models' state sizes and taps."""
    return [("mamba", {"STATE": state, "TAPS": taps}, 0) for state, taps in _COMMON_SIZES]


@dataclass(frozen=True)
class Mamba:
    """float32: conv [conv_kernel, conv_width], conv_bias [conv_width], A, D, dt_bias [num_heads], norm [inner].

    largest: the norm weight's largest magnitude.
    """

    conv: cupy.ndarray
    conv_bias: cupy.ndarray
    A: cupy.ndarray
    D: cupy.ndarray
    dt_bias: cupy.ndarray
    norm: cupy.ndarray
    eps: float
    largest: float


@dataclass(frozen=True)
class State:
    """recent fp16 [slots, conv_kernel, conv_width], as the input projection gives it, so exact; ssm float32 [slots,
    num_heads, head_dim, state_size]. Uninitialised: a sequence starts from zeros at position 0."""

    recent: cupy.ndarray
    ssm: cupy.ndarray


def mamba_weight(device: Device, shape: MambaShape, conv: np.ndarray, conv_bias: np.ndarray, A: np.ndarray,
                 D: np.ndarray, dt_bias: np.ndarray, norm: np.ndarray, eps: float) -> Mamba:
    if shape.state_size > _MAX_STATE:
        raise Fp4rtError("checkpoint", f"ssm_state_size is {shape.state_size}; the CUDA backend takes up to "
                                       f"{_MAX_STATE}; use device='cpu'")
    uploaded = [device.upload(np.asarray(values, np.float32)) for values in (conv.T, conv_bias, A, D, dt_bias, norm)]
    return Mamba(*uploaded, float(eps), float(np.abs(norm).max()))


def mamba_state(device: Device, shape: MambaShape, num_slots: int) -> State:
    return State(device.memory.array((num_slots, shape.conv_kernel, shape.conv_width), np.float16),
                 device.memory.array((num_slots, shape.num_heads, shape.head_dim, shape.state_size), np.float32))


def mamba_state_bytes(shape: MambaShape) -> int:
    return 2 * shape.conv_kernel * shape.conv_width + 4 * shape.inner * shape.state_size


def copy_mamba_state(device: Device, state: State, source: int, target: int) -> None:
    for array in (state.recent, state.ssm):
        device.copy(array[source], into=array[target])


def mamba(device: Device, projected: Activation, batch: DeviceBatch, state: State, weight: Mamba,
          shape: MambaShape) -> Activation:
    """Ops.mamba. A token's numbers do not depend on how its sequence is cut into steps, nor on its company."""
    tokens, sequences = projected.data.shape[0], len(batch.lengths)
    defines = {"STATE": shape.state_size, "TAPS": shape.conv_kernel}
    factor = math.ldexp(1.0, projected.exponent)
    convolved = None
    if tokens > sequences:
        convolved = device.scratch((tokens, shape.conv_width + 2 * shape.num_heads), np.float32)
        device.kernel("mamba", "convolve", **defines)(
            (-(-tokens // _CONVOLVE_TOKENS), -(-(shape.conv_width + shape.num_heads) // _THREADS)), _THREADS,
            projected.data, batch.starts, batch.positions, batch.slots, sequences, shape.inner, shape.conv_width,
            shape.num_heads, weight.conv, weight.conv_bias, weight.A, weight.dt_bias, state.recent, factor, convolved,
            pdl=True)
    y = device.scratch((tokens, shape.inner), np.float32)
    block_rows = _THREADS // _LANES * (1 if shape.state_size > 128 else 2)
    device.kernel("mamba", "scan_one" if convolved is None else "scan_many", **defines)(
        (-(-shape.head_dim // block_rows), shape.num_heads, sequences), _THREADS, projected.data, convolved,
        batch.starts, batch.positions, batch.slots, shape.num_heads, shape.head_dim, shape.num_groups,
        shape.num_heads // shape.num_groups, weight.conv, weight.conv_bias, weight.A, weight.D, weight.dt_bias, factor,
        state.recent, state.ssm, y, pdl=True)
    size = shape.inner // shape.num_groups
    bound = math.sqrt(size) * weight.largest
    exponent = exponent_for(bound)
    out = device.scratch((tokens, shape.inner), np.float16)
    device.kernel("mamba", "gated_norm", **defines)(
        (tokens, shape.num_groups), min(_NORM_THREADS, -(-size // 128) * 32), y, projected.data, shape.input_width,
        factor, batch.starts, sequences, size, weight.norm, weight.eps, math.ldexp(1.0, -exponent), out, pdl=True)
    return Activation(out, exponent, bound, math.sqrt(shape.inner) * weight.largest)
