"""The token table, the rows of the residual stream whose logits are wanted, and the cap on those."""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.formats import Dense, Weight
from fp4rt.ops.cuda.dense_linear import DenseLayout
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.linear import CudaLinear
from fp4rt.ops.cuda.tiles import Packed

_THREADS = 256
_ROWS = 4096  # of a quantized table, dequantized together
FORMATS = {"BF16": 0, "F16": 1, "F32": 2}  # enum Format in kernels/table.cuh


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("embedding", {}, 0)]


@dataclass(frozen=True)
class Embedding:
    """The table [V, d]: `data` as the checkpoint has it, in the kernel's `format`, or a tied head's tiles; rows are
    multiplied by `scale`."""

    width: int
    data: cupy.ndarray | None
    format: int
    tied: Packed | None
    scale: float


def embedding_weight(device: Device, weight: Weight, *, tied_to: CudaLinear | None = None,
                     scale: float = 1.0) -> Embedding:
    """Upload the table, a quantized one as float32, or share the memory of the head made from the same tensor if it
    holds dense tiles."""
    if tied_to is not None and len(tied_to.groups) == 1 and isinstance(tied_to.groups[0].layout, DenseLayout):
        return Embedding(weight.shape[1], None, 0, tied_to.groups[0], float(scale))
    if not isinstance(weight, Dense):
        values = np.empty(weight.shape, np.float32)
        for row in range(0, len(values), _ROWS):  # not at once: dequantizing takes a few times its result
            values[row:row + _ROWS] = weight.dequantize(slice(row, row + _ROWS))
        weight = Dense(weight.name, "F32", values)
    data = weight.data if weight.format == "F32" else weight.data.view(np.uint16)
    return Embedding(weight.shape[1], device.upload(data), FORMATS[weight.format], None, float(scale))


def embed(device: Device, tokens: cupy.ndarray, table: Embedding) -> cupy.ndarray:
    """tokens int32 [T] -> residual float32 [T, d]."""
    count, tied = tokens.shape[0], table.tied
    out = device.scratch((count, table.width), np.float32)
    if tied is None:
        device.kernel("embedding", "embed")(count, _THREADS, tokens, table.data, out, table.width,
                                            table.format, table.scale)
    else:
        device.kernel("embedding", "embed_tiled")(count, _THREADS, tokens, tied.tiles, tied.row_scale, out,
                                                  table.width, tied.layout.planes, table.scale)
    return out


def gather_rows(device: Device, rows: cupy.ndarray, x: cupy.ndarray) -> cupy.ndarray:
    """x float32 [T, d] at rows int32 [R] -> [R, d]."""
    out = device.scratch((rows.shape[0], x.shape[1]), np.float32)
    device.kernel("embedding", "gather_rows")(rows.shape[0], _THREADS, rows, x, out, x.shape[1], pdl=True)
    return out


def softcap(device: Device, logits: cupy.ndarray, cap: float) -> cupy.ndarray:
    """logits float32 [R, V] -> cap * tanh(logits / cap), in place."""
    rows, columns = logits.shape
    device.kernel("embedding", "softcap")((rows, -(-columns // (8 * _THREADS))), _THREADS, logits, columns, float(cap),
                                          pdl=True)
    return logits
