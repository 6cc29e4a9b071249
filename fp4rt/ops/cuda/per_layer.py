"""Gemma 4's per-layer embeddings: a table in host memory that the GPU reads itself, and the gate of each layer."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cupy
import numpy as np
from cupy.cuda.pinned_memory import PinnedMemory

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Dense, Weight
from fp4rt.ops.cuda.activation import Activation, exponent_for
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.embedding import FORMATS
from fp4rt.ops.cuda.linear import CudaLinear, linear
from fp4rt.ops.cuda.rms_norm import Norm, unit_rows

_THREADS = 256  # as in kernels/per_layer.cu
_PIECE, _COPY_THREADS = 16 << 20, 4


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("per_layer", {}, 0)]


@dataclass(frozen=True)
class HostTable:
    """data: the table [V, n] as the checkpoint has it, bytes in pinned host memory, at an address of the device's too.

    largest: the largest magnitude in it; scale: what rows are multiplied by.
    """

    data: cupy.ndarray
    format: int
    scale: float
    largest: float


def host_table(device: Device, weight: Weight, scale: float) -> HostTable:
    """Copy the table to pinned memory, which a recorded step can read over the bus (a mapped file it could not)."""
    if not isinstance(weight, Dense):
        raise Fp4rtError("checkpoint", f"{weight.name}: the CUDA backend reads token tables in BF16, F16 or F32, "
                                       f"not {weight.format}; export the model with its embedding unquantized")
    bits = weight.data.reshape(-1).view(np.uint32 if weight.format == "F32" else np.uint16)
    try:
        pinned = PinnedMemory(bits.nbytes)
    except cupy.cuda.runtime.CUDARuntimeError:
        raise Fp4rtError("memory", f"{weight.name} needs {bits.nbytes / 2**30:.2f} GiB of pinned host memory; free host "
                                   "memory, or use device='cpu'") from None
    memory = cupy.cuda.UnownedMemory(pinned.ptr, bits.nbytes, pinned, device.id)
    copy = np.frombuffer(cupy.cuda.PinnedMemoryPointer(pinned, 0), bits.dtype, len(bits))
    magnitude = np.iinfo(bits.dtype).max >> 1  # all bits but the sign: they order as the magnitudes do

    def take(start: int) -> int:
        piece = slice(start, start + _PIECE)
        copy[piece] = bits[piece]
        return int((copy[piece] & magnitude).max())

    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        most = np.array([max(pool.map(take, range(0, len(bits), _PIECE)))], bits.dtype)
    largest = float(Dense(weight.name, weight.format, most if weight.format == "BF16" else
                          most.view(weight.data.dtype)).dequantize()[0])
    if not math.isfinite(largest):
        raise Fp4rtError("checkpoint", f"{weight.name}: holds NaN or infinity; the checkpoint is damaged; download or "
                                       "export it again")
    data = cupy.ndarray(bits.nbytes, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    return HostTable(data, FORMATS[weight.format], float(scale), largest)


def per_layer_inputs(device: Device, h: cupy.ndarray, tokens: cupy.ndarray, table: HostTable, projection: CudaLinear,
                     norm: Norm, *, deterministic: bool = False) -> Activation:
    """Ops.per_layer_inputs: [T, L * w]."""
    width = norm.weight.shape[0]
    x = unit_rows(device, h)
    projected = linear(device, x, projection, deterministic=deterministic)
    bound = (math.sqrt(width) * norm.largest + table.scale * table.largest) / math.sqrt(2)
    exponent = exponent_for(bound)
    inputs = device.scratch(projected.data.shape, np.float16)
    device.kernel("per_layer", "per_layer_inputs")(
        (h.shape[0], inputs.shape[1] // width), _THREADS, projected.data, x.rows,
        math.ldexp(h.shape[1]**-0.5, projected.exponent), tokens, table.data, table.format, table.scale, norm.weight,
        norm.eps, math.ldexp(1.0, -exponent), width, inputs, pdl=True)
    return Activation(inputs, exponent, bound)


def per_layer_gate(device: Device, h: cupy.ndarray, gate: CudaLinear, inputs: Activation, layer: int, *,
                   deterministic: bool = False) -> Activation:
    """Ops.per_layer_gate. gelu_tanh(y) is y times at most 1, so y's row factor can be left to the end."""
    x = unit_rows(device, h)
    y = linear(device, x, gate, deterministic=deterministic)
    width, bound = y.data.shape[1], y.bound * inputs.bound
    exponent = exponent_for(bound)
    out = device.scratch(y.data.shape, np.float16)
    device.kernel("per_layer", "per_layer_gate")(
        h.shape[0], _THREADS, y.data, x.rows, math.ldexp(1.0, y.exponent), inputs.data[:, layer * width:],
        inputs.data.shape[1], math.ldexp(1.0, y.exponent + inputs.exponent - exponent), width, out, pdl=True)
    return Activation(out, exponent, bound, rows=x.rows)
