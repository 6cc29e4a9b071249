"""The experts of one layer, in every layout they are published in: a module each, or stacked in one tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.checkpoint import Scope, Tensor
from fp4rt.errors import Fp4rtError
from fp4rt.formats.dense import Dense
from fp4rt.formats.fp8 import Fp8
from fp4rt.formats.mxfp4 import Mxfp4
from fp4rt.formats.nvfp4 import BLOCK, BLOCKS, Nvfp4, of_blocks
from fp4rt.formats.read import FLOATS, has_weight, read_vector, read_weight
from fp4rt.formats.weight import Weight


# What gate, up and down are called where each expert is a module of its own; the second row is Mixtral's.
SEPARATE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class ExpertShape:
    """num_experts times (up: [inner, hidden], with a gate of the same shape if gated; down: [hidden, inner]).

    interleaved: in stacked tensors, even rows are the gate and odd ones the up projection (gpt-oss); otherwise all
    gate rows come first.
    """

    num_experts: int
    hidden: int
    inner: int
    gated: bool = True
    interleaved: bool = False
    bias: bool = False

    def halves(self, rows: np.ndarray, axis: int = 0) -> list[np.ndarray]:
        """Stacked gate and up rows taken apart; one part where there is no gate."""
        if not self.gated:
            return [rows]
        if self.interleaved:
            index = [slice(None)] * rows.ndim
            return [rows[(*index[:axis], slice(start, None, 2))] for start in (0, 1)]
        return np.split(rows, 2, axis=axis)


def read_experts(scope: Scope, shape: ExpertShape) -> tuple[list[list[Weight]], list[list[Weight]]]:
    """(up, down): for each expert its parts, gate before up. Raises Fp4rtError("checkpoint")."""
    for names in SEPARATE:
        if has_weight(scope.at(f"0.{names[-1]}")):
            return _separate(scope, shape, names)
    stacked = "gate_up_proj" if shape.gated else "up_proj"
    if scope.has(f"{stacked}_blocks"):
        return tuple(_mxfp4(scope, name, rows, columns, shape) for name, rows, columns in _sizes(stacked, shape))
    if scope.has(stacked):
        return tuple(_stacked(scope, name, rows, columns, shape) for name, rows, columns in _sizes(stacked, shape))
    raise Fp4rtError("checkpoint", f"{scope.checkpoint.path}: {scope.prefix} holds neither 0.down_proj nor {stacked}; "
                     "the experts are missing or in a layout that fp4rt does not know")


def _sizes(stacked: str, shape: ExpertShape) -> tuple[tuple[str, int, int], ...]:
    return ((stacked, shape.inner * (2 if shape.gated else 1), shape.hidden), ("down_proj", shape.hidden, shape.inner))


def _separate(scope: Scope, shape: ExpertShape, names: tuple[str, str, str]) -> tuple[list[list[Weight]], ...]:
    *up_names, down_name = names if shape.gated else names[1:]
    if has_weight(scope.at(f"{shape.num_experts}.{down_name}")):
        raise Fp4rtError("checkpoint", f"{scope.checkpoint.path}: {scope.prefix} holds more experts than the "
                         f"{shape.num_experts} that config.json states")
    up, down = [], []
    for e in range(shape.num_experts):
        expert = scope.at(str(e))
        up.append([read_weight(expert.at(name), shape.inner, shape.hidden, bias=shape.bias) for name in up_names])
        down.append([read_weight(expert.at(down_name), shape.hidden, shape.inner, bias=shape.bias)])
    return up, down


def _expect(tensor: Tensor, dtypes: tuple[str, ...], wanted: tuple[int, ...]) -> Tensor:
    if tensor.dtype not in dtypes or tensor.shape != wanted:
        raise Fp4rtError("checkpoint", f"{tensor}: expected {' or '.join(dtypes)} {list(wanted)}, as config.json makes it")
    return tensor


def _parts(shape: ExpertShape, name: str, array: np.ndarray, axis: int = 0) -> list[np.ndarray]:
    return [array] if name == "down_proj" else shape.halves(array, axis)


def _biases(scope: Scope, name: str, rows: int, shape: ExpertShape) -> list[list[np.ndarray | None]]:
    """Per expert, the bias of each part."""
    count = 1 if name == "down_proj" or not shape.gated else 2
    if not shape.bias:
        return [[None] * count] * shape.num_experts
    values = read_vector(scope, f"{name}_bias", shape.num_experts * rows).reshape(shape.num_experts, rows)
    return [_parts(shape, name, one) for one in values]


def _per_expert(scope: Scope, name: str, experts: int) -> np.ndarray:
    """Positive float32 [experts]; one in the file serves them all."""
    values = read_vector(scope, name, scope.tensor(name).data.size)
    if values.size not in (1, experts) or not (values > 0).all():
        raise Fp4rtError("checkpoint", f"{scope.tensor(name)}: expected one positive scale, or one for each of "
                                       f"{experts} experts")
    return np.broadcast_to(values, experts)


def _mxfp4(scope: Scope, name: str, rows: int, columns: int, shape: ExpertShape) -> list[list[Weight]]:
    """gpt-oss as OpenAI published it: blocks [E, rows, columns/32, 16] and E8M0 scales [E, rows, columns/32]."""
    experts = shape.num_experts
    if columns % 32:
        raise Fp4rtError("checkpoint", f"{scope.name(name)}: {columns} columns are not a multiple of MXFP4's block of 32")
    blocks = _expect(scope.tensor(f"{name}_blocks"), ("U8",), (experts, rows, columns // 32, 16))
    scales = _expect(scope.tensor(f"{name}_scales"), ("U8", "F8_E8M0"), (experts, rows, columns // 32))
    if scales.data.size and scales.data.max() == 255:
        raise Fp4rtError("checkpoint", f"{scales}: holds NaN; the checkpoint is damaged, download it again")
    codes = blocks.data.reshape(experts, rows, columns // 2)
    biases = _biases(scope, name, rows, shape)
    return [[Mxfp4(blocks.name, *part) for part in zip(_parts(shape, name, codes[e]),
                                                      _parts(shape, name, scales.data[e]), biases[e])]
            for e in range(experts)]


def _stacked(scope: Scope, name: str, rows: int, columns: int, shape: ExpertShape) -> list[list[Weight]]:
    """One tensor for all experts: plain [E, rows, columns], or the transposed [E, columns, rows] of gpt-oss and its
    FP8 and NVFP4 exports, of which NVFP4's codes are packed and its scales run along the second axis."""
    tensor, experts = scope.tensor(name), shape.num_experts
    biases = _biases(scope, name, rows, shape)
    if tensor.dtype in FLOATS:
        transposed = tensor.shape == (experts, columns, rows) and (shape.interleaved or rows != columns)
        _expect(tensor, FLOATS, (experts, columns, rows) if transposed else (experts, rows, columns))
        values = tensor.data.transpose(0, 2, 1) if transposed else tensor.data
        return [[Dense(tensor.name, tensor.dtype, part, bias) for part, bias in
                 zip(_parts(shape, name, values[e]), biases[e])] for e in range(experts)]
    if scope.has(f"{name}_input_scale"):
        scope.checkpoint.skip(scope.name(f"{name}_input_scale"), "activations are not quantized here")
    if tensor.dtype == "F8_E4M3":
        _expect(tensor, ("F8_E4M3",), (experts, columns, rows))
        scales = _per_expert(scope, f"{name}_weight_scale", experts)
        return [[Fp8(tensor.name, codes, scales[e].reshape(1, 1), codes.shape, bias) for codes, bias in
                 zip(_parts(shape, name, tensor.data[e].T), biases[e])] for e in range(experts)]
    _expect(tensor, ("U8",), (experts, columns // 2, rows))
    scales = scope.tensor(f"{name}_weight_scale")
    width = next((width for width in BLOCKS if scales.shape == (experts, columns / width, rows)), BLOCK)
    _expect(scales, ("F8_E4M3",), (experts, columns // width, rows))
    if scales.data.size and scales.data.max() >= 0x7F:
        raise Fp4rtError("checkpoint", f"{scales}: holds NaN or negative scales; the checkpoint is damaged")
    globals_ = _per_expert(scope, f"{name}_weight_scale_2", experts)
    return [[Nvfp4(tensor.name, codes, of_blocks(block_scales, width), float(globals_[e]), bias)
             for codes, block_scales, bias in zip(_parts(shape, name, tensor.data[e].T),
                                                  _parts(shape, name, scales.data[e].T), biases[e])]
            for e in range(experts)]
