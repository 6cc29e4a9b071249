"""An Ops that computes nothing: it records what weights a model asks for and how much its steps hold at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fp4rt.batch import Batch
from fp4rt.checkpoint import STORAGE, Checkpoint, Tensor
from fp4rt.driver import driver_answers
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops import AttentionShape, MambaShape, Routing
from fp4rt.ops.reference import ReferenceLinear
from fp4rt.ops.select import check_options, make_ops

# The number one in every dtype that a weight, a scale or a vector may have; codes and indices may be anything.
_ONE = {"BF16": 0x3F80, "F8_E4M3": 0x38, "F8_E5M2": 0x3C, "F8_E8M0": 127}


class Headers(Checkpoint):
    """A checkpoint whose tensors have their names, dtypes and shapes, and one for every value: no weight is read."""

    def tensor(self, name: str) -> Tensor:
        entry = self._entry(name)
        self._read.add(name)
        one = STORAGE[entry.dtype].type(_ONE.get(entry.dtype, 1))
        return Tensor(name, entry.dtype, entry.shape, np.broadcast_to(one, entry.shape), entry.file.name)


_EXPERT_PAIRS = 16384  # (token, expert) pairs whose activations are held at once

Choice = tuple[str, str, int]  # kernel, reason, bytes held


def as_stored(parts: Sequence[Weight], gated: bool) -> Choice:
    """No kernel; the bytes of the file."""
    return "", "", sum(part.nbytes for part in parts)


@dataclass(frozen=True)
class PlannedLinear:
    """What a backend would hold for these parts."""

    parts: tuple[Weight, ...]
    gated: bool
    kernel: str
    reason: str
    nbytes: int

    @property
    def out_features(self) -> int:
        rows = sum(part.shape[0] for part in self.parts)
        return rows // 2 if self.gated else rows

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1]


class Buffer:
    """Rows of an activation; its bytes count as held while the handle lives."""

    def __init__(self, ops: PlanningOps, rows: int, columns: int, itemsize: int, handed_over: bool = False):
        self.rows, self.columns, self.handed_over = rows, columns, handed_over
        self._ops, self._nbytes = ops, -(-rows * columns * itemsize // 256) * 256
        ops.held += self._nbytes
        ops.peak = max(ops.peak, ops.held)

    def __del__(self) -> None:
        self._ops.held -= self._nbytes


class PlanningOps:
    """Ops for models that are looked at, not run: weights and a step's memory are counted, nothing is allocated.

    choose: (parts, gated) -> kernel, reason and bytes of the backend in question. page_bytes, state_bytes: of one page
    or slot of a layer.
    activation_bytes: per element between operations; normed_bytes: of the copy that an RMSNorm in front of a linear
    makes (0: none); order_bytes: of the copy that a linear makes of an activation that was not handed over to it in
    whole tiles of 128 columns. free: bytes that may be allocated, None if unknown. shared_as_experts: as in ops.Ops.
    """

    name = "planning"
    lookahead = 0

    def __init__(self, device: str = "planning", *, step_tokens: int = 256, activation_bytes: int = 4,
                 normed_bytes: int = 0, order_bytes: int = 0, free: int | None = None, shared_as_experts: bool = False,
                 choose: Callable[..., Choice] = as_stored,
                 page_bytes: Callable[[AttentionShape], int] = lambda shape: 0,
                 state_bytes: Callable[[MambaShape], int] = lambda shape: 0,
                 batch_bytes: Callable[[int, int], int] = lambda sequences, pages: 0,
                 sampler_bytes: Callable[[int], int] = lambda vocab_size: 0):
        self.device, self.step_tokens, self.kv_page_bytes = device, step_tokens, page_bytes
        self.mamba_state_bytes = state_bytes
        self.batch_bytes, self.sampler_bytes = batch_bytes, sampler_bytes
        self._activation_bytes, self._normed_bytes = activation_bytes, normed_bytes
        self._order_bytes = order_bytes
        self._free, self._choose, self.shared_as_experts = free, choose, shared_as_experts
        self.held = self.peak = 0
        self.table_bytes = 0

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> PlannedLinear:
        return PlannedLinear(tuple(parts), gated, *self._choose(parts, gated))

    def norm_weight(self, weight: np.ndarray, eps: float) -> np.ndarray:
        return weight

    def embedding_weight(self, weight: Weight, *, tied_to: PlannedLinear | None = None, scale: float = 1.0) -> Weight:
        return weight

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int) -> None:
        self.table_bytes += 2 * 4 * len(inv_freq) * max_positions

    def kv_pages(self, shape: AttentionShape, num_pages: int, group: int = 0) -> None:
        return None

    def expert_weight(self, experts: Sequence[Sequence[Weight]], *, gated: bool = False) -> PlannedLinear:
        return self.linear_weight([part for expert in experts for part in expert], gated=gated)

    def vector(self, values: np.ndarray) -> None:
        return None

    def host_embedding_weight(self, weight: Weight, scale: float) -> Weight:
        return weight

    def mamba_weight(self, shape: MambaShape, *values: Any) -> None:
        return None

    def mamba_state(self, shape: MambaShape, num_slots: int) -> None:
        return None

    def batch(self, batch: Batch, into: Any = None) -> Batch:
        return batch

    def embed(self, batch: Batch, table: Weight) -> Buffer:
        return Buffer(self, len(batch.tokens), table.shape[1], 4)

    def linear(self, x: Buffer, weight: PlannedLinear, *, norm: Any = None, activation: str | None = None,
               residual: Buffer | None = None, then: Any = None) -> Buffer:
        """A residual is added to in place; anything else is a new activation."""
        in_order = (norm is not None or x.handed_over) and x.columns % 128 == 0
        copied = (self._normed_bytes if norm is not None else 0) + (0 if in_order else self._order_bytes)
        copy = Buffer(self, x.rows, x.columns, copied)  # noqa: F841
        return residual or Buffer(self, x.rows, weight.out_features, self._activation_bytes, then is not None)

    def attention(self, qkv: Buffer, batch: Batch, pages: Any, shape: AttentionShape, *, rope: Any,
                  **others: Any) -> Buffer:
        return Buffer(self, qkv.rows, shape.num_heads * shape.head_dim, self._activation_bytes)

    def route(self, x: Buffer, router: PlannedLinear, routing: Routing, **others: Any) -> Buffer:
        return Buffer(self, x.rows, 2 * routing.slots, 4)

    def experts(self, x: Buffer, choice: Buffer, up: PlannedLinear, down: PlannedLinear, *, activation: str,
                norm: Any = None, residual: Buffer | None = None) -> Buffer:
        """The activations of all of a token's experts at once, inside and after them, then their sum."""
        normed = Buffer(self, x.rows, x.columns, self._normed_bytes if norm is not None else 0)  # noqa: F841
        total = residual or Buffer(self, x.rows, x.columns, self._activation_bytes)
        pairs = min(x.rows * choice.columns // 2, _EXPERT_PAIRS)
        inner = Buffer(self, pairs, down.in_features, self._activation_bytes)  # noqa: F841
        copy = Buffer(self, pairs, down.in_features, self._order_bytes if down.in_features % 128 else 0)  # noqa: F841
        outputs = Buffer(self, pairs, x.columns, self._activation_bytes)  # noqa: F841
        return total

    def merge(self, residual: Buffer, branches: Any, **others: Any) -> Buffer:
        return residual

    def per_layer_inputs(self, h: Buffer, batch: Batch, table: Weight, projection: PlannedLinear, norm: Any) -> Buffer:
        return Buffer(self, h.rows, projection.out_features, 4)

    def per_layer_gate(self, h: Buffer, gate: PlannedLinear, inputs: Buffer, layer: int) -> Buffer:
        return Buffer(self, h.rows, gate.out_features, self._activation_bytes)

    def mamba(self, projected: Buffer, batch: Batch, state: Any, weight: Any, shape: MambaShape) -> Buffer:
        convolved = Buffer(self, projected.rows, shape.conv_width + 2 * shape.num_heads, 4)  # noqa: F841
        y = Buffer(self, projected.rows, shape.inner, 4)  # noqa: F841
        return Buffer(self, projected.rows, shape.inner, self._activation_bytes)

    def logits(self, h: Buffer, batch: Batch, norm: Any, head: PlannedLinear, *, softcap: Any = None) -> Buffer:
        rows = Buffer(self, len(batch.rows), h.columns, 4 + self._normed_bytes)  # noqa: F841
        return Buffer(self, len(batch.rows), head.out_features, 4)

    def expect(self, nbytes: int) -> None:
        pass

    def reserve(self, step: Callable[[], object]) -> int:
        """The bytes that `step` holds at its widest moment."""
        before = self.peak = self.held
        step()
        return self.peak - before

    def free_memory(self) -> int | None:
        return self._free


def planning_ops(device: str, arch: str | None, gpu_memory: int | None, deterministic: bool) -> PlanningOps:
    """A PlanningOps that answers as the backend would which make_ops gives for the same arguments.

    For CUDA no GPU is needed, but CuPy is; without a GPU `free` is gpu_memory. Raises Fp4rtError as make_ops does.
    """
    if device == "auto":
        device = "cuda" if driver_answers() else "cpu"
    if device == "cuda" and not driver_answers():
        check_options(device, arch, gpu_memory)
        try:
            from fp4rt.ops.cuda import CudaOps
        except ImportError:
            raise Fp4rtError("device", "planning for CUDA needs CuPy; pip install 'fp4rt[cuda12]'") from None
        return _planning_cuda(f"a GPU ({arch or 'any architecture'})", CudaOps.step_tokens, gpu_memory,
                              arch in (None, "sm_90a"))
    ops = make_ops(device, arch, gpu_memory, deterministic)
    try:
        free = ops.free_memory()
        if device == "cuda":
            return _planning_cuda(ops.device, ops.step_tokens, free, ops.gpu.arch == "sm_90a")
        if device == "cpu":
            from fp4rt.ops.cpu.backend import choose, held_bytes

            def chosen(parts: Sequence[Weight], gated: bool) -> Choice:
                return *choose(parts, deterministic), sum(held_bytes(part) for part in parts)
        else:
            def chosen(parts: Sequence[Weight], gated: bool) -> Choice:
                return ReferenceLinear.kernel, ReferenceLinear.reason, as_stored(parts, gated)[2]
        return PlanningOps(ops.device, step_tokens=ops.step_tokens, free=free, choose=chosen,
                           page_bytes=ops.kv_page_bytes, state_bytes=ops.mamba_state_bytes)
    finally:
        ops.close()


def _planning_cuda(device: str, step_tokens: int, free: int | None, orders: bool) -> PlanningOps:
    from fp4rt.ops.cuda import CudaOps
    from fp4rt.ops.cuda.attention import kv_page_bytes
    from fp4rt.ops.cuda.batch import batch_bytes
    from fp4rt.ops.cuda.mamba import mamba_state_bytes
    from fp4rt.ops.cuda.plan import plan_linear
    from fp4rt.ops.cuda.sample import sampler_bytes

    return PlanningOps(device, step_tokens=step_tokens, activation_bytes=2, normed_bytes=2,
                       order_bytes=2 if orders else 0, free=free, shared_as_experts=CudaOps.shared_as_experts,
                       choose=plan_linear, page_bytes=kv_page_bytes, state_bytes=mamba_state_bytes,
                       batch_bytes=batch_bytes, sampler_bytes=sampler_bytes)
