"""CpuOps: the operations on a CPU, compiled by Numba for the vector instructions that this processor has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Dense, Fp8, Mxfp4, Nvfp4, Weight
from fp4rt.ops import ACTIVATIONS, AttentionShape
from fp4rt.ops.cpu import emit, kernels, mamba, runtime
from fp4rt.ops.reference import Norm, ReferenceOps, activate, rms_norm, silu, softplus

_EMPTY = np.empty(0, np.float32)
_NONE = np.empty((0, 0), np.float32)
_DENSE = {"BF16": emit.BF16, "F16": emit.F16, "F32": emit.F32}


@dataclass(frozen=True)
class CpuLinear:
    """The parts of a linear as the kernels read them: addresses into the checkpoint's mapped file, and small tables.

    table: int64 [parts, kernels.FIELDS]. row_scale: float32, one for each row of all parts. bias: float32 likewise, or
    empty. input_scales: float32 [views, K], or [0, 0] where no part has a pre_quant_scale. permuted: bool [views].
    block_scales: float32, those of FP8 parts in blocks, one after the other. held: keeps the mapped arrays alive.
    """

    out_features: int
    in_features: int
    nbytes: int
    kernel: str
    reason: str
    gated: bool
    table: np.ndarray
    row_scale: np.ndarray
    bias: np.ndarray
    input_scales: np.ndarray
    permuted: np.ndarray
    block_scales: np.ndarray
    held: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Pages:
    """keys [pages, Hk, head_dim, PAGE_TOKENS]; values [pages, Hk, PAGE_TOKENS, head_dim up to 16 n].

    float32, or with fp8_scales (of k and of v) uint8: E4M3 codes.
    """

    keys: np.ndarray
    values: np.ndarray
    group: int  # of the batch's page tables
    fp8_scales: tuple[float, float] | None = None


def choose(parts: Sequence[Weight], deterministic: bool = False) -> tuple[str, str]:
    """The kernel that runs a linear of these parts at decode, and why."""
    formats = "+".join(dict.fromkeys(part.format for part in parts))
    if deterministic:
        return f"{formats} panel ({runtime.TIER})", "deterministic: one kernel for any number of tokens"
    return f"{formats} fused ({runtime.TIER})", f"decoded in registers for up to {kernels.FEW_TOKENS} tokens"


@dataclass(frozen=True)
class CpuExperts:
    """One linear of every expert."""

    experts: tuple[CpuLinear, ...]

    def __getattr__(self, name: str):
        """Sizes, kernel and reason are those of each expert."""
        return getattr(self.experts[0], name)

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)


def held_bytes(part: Weight) -> int:
    """What a part takes in memory: the file's bytes, a float32 scale per row, its entry in the table of parts."""
    vectors = sum(v.nbytes for v in (part.bias, part.pre_quant_scale) if v is not None)
    again = part.block_scales.nbytes if isinstance(part, Mxfp4) else 0  # one scale for 16 values, not for 32
    return part.nbytes + again + vectors + 4 * part.shape[0] + 8 * kernels.FIELDS


class CpuOps(ReferenceOps):
    """Ops on a CPU. Weights stay where they lie; batches, samplers and everything small are numpy's, as in reference.

    threads: how many compute; None: as many processors as this process may use. deterministic: a token's numbers do
    not depend on how many others are computed with it (else they differ between up to FEW_TOKENS tokens and more).
    """

    name = "cpu"
    step_tokens = 256

    def __init__(self, threads: int | None = None, deterministic: bool = False):
        super().__init__(deterministic)
        available = runtime.available_threads()
        if threads is not None and not 1 <= threads <= available:
            raise Fp4rtError("request", f"threads is {threads}; this process may use 1 to {available}")
        self.threads = threads or available
        self.device = f"CPU, {self.threads} thread{'s' * (self.threads > 1)}, {runtime.TIER}"
        self.notice = "" if runtime.compiled_before() else (
            "the CPU kernels are compiled in the first step, this once: about 10 seconds")
        self._scratch: dict[str, np.ndarray] = {}
        self._views: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # of the scratch, by name and shape

    def rehearse(self, step: Callable[[], object]) -> None:
        step()

    # -- At load ------------------------------------------------------------------------------------------------

    def expert_weight(self, experts: Sequence[Sequence[Weight]], *, gated: bool = False) -> CpuExperts:
        return CpuExperts(tuple(self.linear_weight(parts, gated=gated) for parts in experts))

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> CpuLinear:
        rows = [part.shape[0] for part in parts]
        columns = parts[0].shape[1]
        table = np.zeros((len(parts), kernels.FIELDS), np.int64)
        views: dict[tuple[bool, int], int] = {}
        input_scales, row_scales, block_scales, held = [], [], [], []
        for entry, part in zip(table, parts):
            kind, codes, scales, row_scale = _operands(part)
            layout = emit.LAYOUTS[kind]
            rest = columns % layout.elements
            held += [codes, scales]
            entry[kernels.KIND], entry[kernels.ROW_COUNT], entry[kernels.ELEMENTS] = kind, len(codes), layout.elements
            entry[kernels.CODES], entry[kernels.CODE_STRIDE] = _address(codes), codes.strides[0]
            entry[kernels.CODE_BYTES], entry[kernels.SCALE_BYTES] = layout.code_bytes, layout.scale_bytes
            entry[kernels.CODE_TAIL] = rest * layout.code_bytes // layout.elements
            entry[kernels.SCALE_TAIL] = rest * layout.scale_bytes // layout.elements
            if kind in emit.FP4:
                entry[kernels.SCALES], entry[kernels.SCALE_STRIDE] = _address(scales), scales.strides[0]
            elif kind == emit.FP8_BLOCK:
                entry[kernels.SCALES], entry[kernels.SCALE_STRIDE] = sum(map(len, block_scales)), scales.shape[1]
                entry[kernels.BLOCK_ROWS], entry[kernels.BLOCK_COLUMNS] = part.block
                block_scales.append(scales.ravel())
            row_scales.append(np.broadcast_to(np.asarray(row_scale, np.float32), len(codes)))
            view = kind in emit.FP4, 0 if part.pre_quant_scale is None else _address(part.pre_quant_scale)
            if view not in views:
                views[view] = len(views)
                input_scales.append(part.pre_quant_scale)
            entry[kernels.VIEW] = views[view]
        biases = [np.zeros(n, np.float32) if part.bias is None else part.bias for n, part in zip(rows, parts)]
        has_bias = any(part.bias is not None for part in parts)
        has_input_scales = any(scale is not None for scale in input_scales)
        ones = np.ones(columns, np.float32)
        linear = CpuLinear(
            out_features=sum(rows) // 2 if gated else sum(rows), in_features=columns, nbytes=0, gated=gated,
            **dict(zip(("kernel", "reason"), choose(parts, self.deterministic))),
            table=table, row_scale=np.concatenate(row_scales),
            bias=np.concatenate(biases, dtype=np.float32) if has_bias else _EMPTY,
            input_scales=np.stack([ones if s is None else s for s in input_scales]) if has_input_scales else _NONE,
            permuted=np.array([permuted for permuted, _ in views]),
            block_scales=np.concatenate(block_scales) if block_scales else _EMPTY, held=tuple(held))
        object.__setattr__(linear, "nbytes", sum(a.nbytes for a in (
            *held, table, linear.row_scale, linear.bias, linear.input_scales)))
        return linear

    def kv_pages(self, shape: AttentionShape, num_pages: int, group: int = 0) -> Pages:
        heads, dim, dtype = shape.num_kv_heads, shape.head_dim, np.uint8 if shape.fp8_scales else np.float32
        return Pages(np.zeros((num_pages, heads, dim, PAGE_TOKENS), dtype),
                     np.zeros((num_pages, heads, PAGE_TOKENS, -(-dim // 16) * 16), dtype), group, shape.fp8_scales)

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        columns = shape.head_dim + -(-shape.head_dim // 16) * 16  # of keys, and of values
        return shape.num_kv_heads * PAGE_TOKENS * (1 if shape.fp8_scales else 4) * columns

    # -- A step -------------------------------------------------------------------------------------------------

    def embed(self, batch: Batch, table: tuple[Weight, np.float32]) -> np.ndarray:
        weight, scale = table
        return np.ascontiguousarray(weight.dequantize(batch.tokens)) * scale

    def linear(self, x, weight, *, norm=None, activation=None, residual=None, then=None):
        if activation not in (None, *ACTIVATIONS) or (activation not in (None, "relu2")) != weight.gated:
            kind = "a gated" if weight.gated else "an ungated"
            raise Fp4rtError("request", f"activation {activation!r} with {kind} weight")
        fused = activation in (None, "silu")
        tokens, columns = x.shape
        x = np.ascontiguousarray(x, np.float32)
        rows = weight.out_features if fused or not weight.gated else 2 * weight.out_features
        out = np.empty((tokens, rows), np.float32) if residual is None else residual
        tiled = -(-tokens // emit.TILE_TOKENS) * emit.TILE_TOKENS
        padded = -(-columns // kernels.PADDING) * kernels.PADDING
        with runtime.Threads(self.threads):
            kernels.linear(
                weight.table, weight.row_scale, weight.bias, weight.input_scales, weight.permuted, weight.block_scales,
                x, _EMPTY if norm is None else norm.weight, 0.0 if norm is None else norm.eps,
                _NONE if residual is None else residual, weight.gated and fused,
                tokens <= kernels.FEW_TOKENS and not self.deterministic, out,
                self._room("prepared", len(weight.permuted), tiled, padded),
                self._room("sums", self.threads, 2, tiled, kernels.PANEL_ROWS),
                self._room("panels", self.threads, kernels.PANEL_ROWS, kernels.PANEL_COLUMNS), self.threads)
        return out if fused else activate(out, activation)

    def experts(self, x, choice, up, down, *, activation, norm=None, residual=None):
        """The tokens of one expert after another, in the order of experts: no sum depends on a token's company."""
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps)
        ids, weights = choice
        y = np.zeros((len(x), down.out_features), np.float32)
        for expert in np.unique(ids).tolist():
            tokens, slots = np.nonzero(ids == expert)
            inner = self.linear(x[tokens], up.experts[expert], activation=activation)
            y[tokens] += weights[tokens, slots, None] * self.linear(inner, down.experts[expert])
        return y if residual is None else residual + y

    def mamba(self, projected, batch, state, weight, shape):
        tokens, groups = len(projected), shape.num_groups
        z, xbc, dt = np.split(projected, [shape.inner, shape.inner + shape.conv_width], axis=1)
        mixed = np.empty((tokens, shape.conv_width), np.float32)
        y = np.empty((tokens, shape.num_heads, shape.head_dim), np.float32)
        where = batch.starts, batch.positions, batch.slots
        with runtime.Threads(self.threads):
            mamba.convolve(xbc, *where, state.conv, weight.conv, weight.conv_bias, mixed, self.threads)
            x, B, C = (np.ascontiguousarray(part) for part in np.split(
                mixed, [shape.inner, shape.inner + groups * shape.state_size], axis=1))
            mamba.scan(x.reshape(y.shape), B.reshape(tokens, groups, -1), C.reshape(tokens, groups, -1),
                       softplus(dt + weight.dt_bias), *where, state.ssm, weight.A, weight.D, y, self.threads)
        gated = (y.reshape(tokens, -1) * silu(z)).reshape(tokens, groups, -1)
        return rms_norm(gated, weight.norm.reshape(groups, -1), weight.eps).reshape(tokens, -1)

    def attention(self, qkv, batch, pages, shape, *, rope, q_norm=None, k_norm=None, v_norm=None, sinks=None,
                  then=None):
        if shape.shares is None and (v_norm is not None or shape.values_are_keys):
            q, k, v = np.split(qkv.reshape(len(qkv), -1, shape.head_dim),
                               [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1)
            v = k if shape.values_are_keys else v
            v = v if v_norm is None else rms_norm(v, v_norm.weight, v_norm.eps)
            qkv = np.concatenate([q, k, v], axis=1).reshape(len(qkv), -1)
        out = np.empty((len(qkv), shape.num_heads * shape.head_dim), np.float32)
        cos, sin = (_NONE, _NONE) if rope is None else rope
        q_norm, k_norm = q_norm or Norm(_EMPTY, 0.0), k_norm or Norm(_EMPTY, 0.0)
        k_scale, v_scale = map(np.float32, pages.fp8_scales or (1, 1))
        with runtime.Threads(self.threads):
            kernels.attention(
                qkv, pages.keys, pages.values, k_scale, v_scale, batch.positions, batch.starts, batch.pages[pages.group],
                cos, sin, q_norm.weight, q_norm.eps, k_norm.weight, k_norm.eps, shape.num_heads,
                np.float32(shape.scale), shape.window or 0, _EMPTY if sinks is None else sinks, out, self.threads)
        return out

    # -- Room ---------------------------------------------------------------------------------------------------

    def _room(self, name: str, *shape: int) -> np.ndarray:
        """Scratch float32 of this shape, from memory that is kept and only grows."""
        view = self._views.get((name, shape))
        if view is None:
            size = math.prod(shape)
            kept = self._scratch.get(name)
            if kept is None or kept.size < size:
                kept = self._scratch[name] = np.empty(size, np.float32)
                self._views = {key: other for key, other in self._views.items() if key[0] != name}
            view = self._views[name, shape] = kept[:size].reshape(shape)
        return view

    def free_memory(self) -> int | None:
        """What the system says is available, or what the control group's limit leaves if that is less."""
        try:
            lines = dict(line.split(":", 1) for line in open("/proc/meminfo"))
        except OSError:
            return None
        free = int(lines["MemAvailable"].split()[0]) * 1024
        limit = runtime.cgroup_value("memory.max", "memory/memory.limit_in_bytes")
        used = runtime.cgroup_value("memory.current", "memory/memory.usage_in_bytes")
        if limit and used and limit != "max":
            free = min(free, max(0, int(limit) - int(used)))
        return free

    def close(self) -> None:
        self._scratch.clear()
        self._views.clear()


def _rows(array: np.ndarray) -> np.ndarray:
    """The array itself where each row lies in one piece (rows may be apart), else a copy of it."""
    return array if array.strides[1] == array.itemsize and array.strides[0] > 0 else np.ascontiguousarray(array)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def _operands(part: Weight) -> tuple[int, np.ndarray, np.ndarray, np.ndarray | float]:
    """(kind, codes, scales, row scale): what the kernels read, rows contiguous; the row scale restores E4M3's 2^8."""
    if isinstance(part, Nvfp4):
        return (emit.NVFP4, _rows(part.codes), _rows(part.block_scales),
                np.float32(part.global_scale) * np.float32(256))
    if isinstance(part, Fp8):
        codes, scales = _rows(part.codes), np.ascontiguousarray(part.scales, np.float32)
        if scales.shape[1] == 1:
            return emit.FP8, codes, _NONE, np.repeat(scales[:, 0], part.block[0])[:len(codes)] * np.float32(256)
        return emit.FP8_BLOCK, codes, scales, 256.0
    if isinstance(part, Mxfp4):
        return emit.MXFP4, _rows(part.codes), np.repeat(part.block_scales, 2, axis=1), 1.0
    assert isinstance(part, Dense)
    return _DENSE[part.format], _rows(part.data), _NONE, 1.0
