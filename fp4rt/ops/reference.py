"""The operations in plain numpy: slow, obvious, and the meaning that the other backends are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fp4rt import sampling
from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.formats.fp8 import E4M3, to_e4m3
from fp4rt.ops import GREEDY, AttentionShape, MambaShape, Routing, SamplerRow


# -- The mathematics ----------------------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., n] * weight / sqrt(mean(x^2) + eps)."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)) * weight


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x), without overflow for large negative x."""
    return x * np.where(x >= 0, 1, np.exp(np.minimum(x, 0))) / (1 + np.exp(-np.abs(x)))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding: x [T, heads, head_dim], cos and sin [T, head_dim/2]; pairs are (i, i + head_dim/2)."""
    low, high = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh approximation (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)))


def activate(y: np.ndarray, activation: str) -> np.ndarray:
    """One of ops.ACTIVATIONS on [..., N]; for the gated ones the first half of N is the gate."""
    if activation == "relu2":
        return np.square(np.maximum(y, 0))
    gate, up = np.split(y, 2, axis=-1)
    if activation == "silu":
        return silu(gate) * up
    if activation == "gelu_tanh":
        return gelu_tanh(gate) * up
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return silu(gate * np.float32(1.702)) / np.float32(1.702) * (up + 1)
    raise Fp4rtError("request", f"unknown activation {activation!r}")


def softplus(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def choose(logits: np.ndarray, routing: Routing, correction: np.ndarray | None,
           expert_scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Router logits [T, E] to experts [T, slots] and their weights: the chosen ones, best first, then all tokens'."""
    if routing.scoring == "softmax":
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    ranked = scores if correction is None else scores + correction
    if routing.groups > 1:
        grouped = ranked.reshape(len(ranked), routing.groups, -1)
        best_two = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-best_two, axis=1, kind="stable")[:, :routing.groups_kept]
        outside = np.ones(best_two.shape, bool)
        np.put_along_axis(outside, kept, False, axis=1)
        ranked = np.where(np.repeat(outside, grouped.shape[2], axis=1), -np.inf, ranked)
    ids = np.argsort(-ranked, axis=1, kind="stable")[:, :routing.top_k]
    weights = np.take_along_axis(scores, ids, axis=1)
    if routing.normalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    weights = weights * np.float32(routing.scaling)
    if expert_scale is not None:
        weights = weights * expert_scale[ids]
    always = np.broadcast_to(routing.num_experts + np.arange(routing.always), (len(ids), routing.always))
    return (np.concatenate([ids, always], axis=1, dtype=np.int32),
            np.concatenate([weights, np.ones(always.shape, weights.dtype)], axis=1))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, shape: AttentionShape,
           sinks: np.ndarray | None = None) -> np.ndarray:
    """Causal attention of one sequence: q [t, H, hd] at positions first.., k and v [n, Hk, hd] at 0..n-1 -> [t, H hd]."""
    t, n = len(q), len(k)
    group = shape.num_heads // shape.num_kv_heads
    query, key = first + np.arange(t)[:, None], np.arange(n)[None]
    visible = key <= query
    if shape.window is not None:
        visible &= key > query - shape.window
    out = np.empty_like(q)
    for head in range(shape.num_heads):
        scores = np.where(visible, (q[:, head] @ k[:, head // group].T) * np.float32(shape.scale), -np.inf)
        top = scores.max(axis=1, keepdims=True)
        if sinks is not None:
            top = np.maximum(top, sinks[head])
        weights = np.exp(scores - top)
        total = weights.sum(axis=1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[head] - top)
        out[:, head] = weights @ v[:, head // group] / total
    return out.reshape(t, -1)


# -- The backend --------------------------------------------------------------------------------------------------

KEPT_ELEMENTS = 1 << 18  # of a linear that stays in float32 once it has been used


@dataclass(frozen=True)
class ReferenceLinear:
    parts: tuple[Weight, ...]
    gated: bool
    kernel: str = "numpy"
    reason: str = "the reference dequantizes and multiplies"

    @property
    def out_features(self) -> int:
        rows = sum(part.shape[0] for part in self.parts)
        return rows // 2 if self.gated else rows

    @property
    def in_features(self) -> int:
        return self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def matrices(self) -> Sequence[np.ndarray]:
        """The parts as float32; those of a small weight are kept, as tests ask for them thousands of times."""
        small = sum(math.prod(part.shape) for part in self.parts) <= KEPT_ELEMENTS
        return self._matrices if small else [part.dequantize() for part in self.parts]

    @cached_property
    def _matrices(self) -> Sequence[np.ndarray]:
        return [part.dequantize() for part in self.parts]


@dataclass(frozen=True)
class Norm:
    weight: np.ndarray
    eps: float


@dataclass(frozen=True)
class ReferenceExperts:
    experts: tuple[ReferenceLinear, ...]
    kernel: str = "numpy"
    reason: str = "the reference dequantizes and multiplies"

    @property
    def out_features(self) -> int:
        return self.experts[0].out_features

    @property
    def in_features(self) -> int:
        return self.experts[0].in_features

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)


@dataclass(frozen=True)
class Mamba:
    """float32: conv [conv_width, conv_kernel], conv_bias [conv_width], A, D, dt_bias [num_heads], norm [inner]."""

    conv: np.ndarray
    conv_bias: np.ndarray
    A: np.ndarray
    D: np.ndarray
    dt_bias: np.ndarray
    norm: np.ndarray
    eps: float


@dataclass
class MambaState:
    """The newest conv_kernel - 1 inputs of the convolution, and one matrix per head, of each slot."""

    conv: np.ndarray  # [slots, conv_width, conv_kernel - 1]
    ssm: np.ndarray   # [slots, num_heads, head_dim, state_size]


@dataclass
class Pages:
    """Keys and values [num_pages, num_kv_heads, PAGE_TOKENS, head_dim]; their page table is pages[group].

    float32, or with fp8_scales (of k and of v) uint8: E4M3 codes.
    """

    keys: np.ndarray
    values: np.ndarray
    group: int
    fp8_scales: tuple[float, float] | None = None

    def write(self, page: np.ndarray, slot: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Remember k and v [n, num_kv_heads, head_dim] in these places."""
        if self.fp8_scales:
            k, v = (to_e4m3(x / np.float32(scale)) for x, scale in zip((k, v), self.fp8_scales))
        self.keys[page, :, slot], self.values[page, :, slot] = k, v

    def read(self, pages: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `length` keys and values of a sequence with these pages: [length, num_kv_heads, head_dim]."""
        count = -(-length // PAGE_TOKENS)
        gathered = (store[pages[:count]].transpose(0, 2, 1, 3) for store in (self.keys, self.values))
        keys, values = (g.reshape(-1, *g.shape[2:])[:length] for g in gathered)
        if self.fp8_scales:
            keys, values = (E4M3[x] * np.float32(scale) for x, scale in zip((keys, values), self.fp8_scales))
        return keys, values


class Sampler:
    """The rows' settings and what they have drawn."""

    def __init__(self, rows: Sequence[SamplerRow]):
        self.rows = list(rows)

    def drawn(self, row: int, token: int) -> None:
        old = self.rows[row]
        if old.history is not None:
            old.history.generated.append(token)
        generated = [*old.generated, token] if old.history is None else old.history.generated
        self.rows[row] = replace(old, step=old.step + 1, generated=generated)


@dataclass(frozen=True)
class History:
    """What penalties look at; rows hold its lists, which grow."""

    prompt: list[int]
    generated: list[int]


@dataclass(frozen=True)
class Ready:
    """A Pending that has already arrived."""

    array: np.ndarray

    def result(self) -> np.ndarray:
        return self.array


class ReferenceOps:
    """Ops in numpy, float32 throughout.

    deterministic: each row is multiplied by itself, since BLAS sums in an order that depends on how many there are.
    """

    name = "reference"
    device = "numpy reference"
    notice = ""
    step_tokens = 256
    lookahead = 0
    shared_as_experts = False

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> ReferenceLinear:
        return ReferenceLinear(tuple(parts), gated)

    def expert_weight(self, experts: Sequence[Sequence[Weight]], *, gated: bool = False) -> ReferenceExperts:
        return ReferenceExperts(tuple(ReferenceLinear(tuple(parts), gated) for parts in experts))

    def vector(self, values: np.ndarray) -> np.ndarray:
        return np.asarray(values, np.float32)

    def norm_weight(self, weight: np.ndarray, eps: float) -> Norm:
        return Norm(np.asarray(weight, np.float32), eps)

    def embedding_weight(self, weight: Weight, *, tied_to: ReferenceLinear | None = None, scale: float = 1.0):
        return weight, np.float32(scale)

    def host_embedding_weight(self, weight: Weight, scale: float):
        return weight, np.float32(scale)

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int):
        angles = np.arange(max_positions, dtype=np.float32)[:, None] * inv_freq.astype(np.float32)
        factor = np.float32(attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def mamba_weight(self, shape: MambaShape, conv, conv_bias, A, D, dt_bias, norm, eps: float) -> Mamba:
        return Mamba(conv, conv_bias, A, D, dt_bias, norm, eps)

    def mamba_state(self, shape: MambaShape, num_slots: int) -> MambaState:
        return MambaState(np.zeros((num_slots, shape.conv_width, shape.conv_kernel - 1), np.float32),
                          np.zeros((num_slots, shape.num_heads, shape.head_dim, shape.state_size), np.float32))

    def copy_mamba_state(self, state: MambaState, source: int, target: int) -> None:
        state.conv[target], state.ssm[target] = state.conv[source], state.ssm[source]

    def mamba_state_bytes(self, shape: MambaShape) -> int:
        return 4 * (shape.conv_width * (shape.conv_kernel - 1) + shape.inner * shape.state_size)

    def kv_pages(self, shape: AttentionShape, num_pages: int, group: int = 0) -> Pages:
        size = (num_pages, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
        dtype = np.uint8 if shape.fp8_scales else np.float32
        return Pages(np.zeros(size, dtype), np.zeros(size, dtype), group, shape.fp8_scales)

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        return 2 * shape.num_kv_heads * PAGE_TOKENS * shape.head_dim * (1 if shape.fp8_scales else 4)

    def batch(self, batch: Batch, into: Batch | None = None) -> Batch:
        if into is None:
            return Batch(**{name: np.array(value, np.int32) for name, value in batch.__dict__.items()})
        for name, value in batch.__dict__.items():
            getattr(into, name)[...] = value
        return into

    def feed(self, batch: Batch, ids: np.ndarray) -> None:
        unknown = batch.tokens < 0
        batch.tokens[unknown] = np.maximum(ids[-1 - batch.tokens[unknown]], 0)

    def embed(self, batch: Batch, table: tuple[Weight, np.float32]) -> np.ndarray:
        weight, scale = table
        return np.concatenate([weight.dequantize(slice(token, token + 1)) for token in batch.tokens.tolist()]) * scale

    def linear(self, x, weight, *, norm=None, activation=None, residual=None, then=None):
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps)
        columns = []
        for part, matrix in zip(weight.parts, weight.matrices()):
            scaled = x if part.pre_quant_scale is None else x * part.pre_quant_scale
            y = self._multiply(scaled, matrix)
            columns.append(y if part.bias is None else y + part.bias)
        y = np.concatenate(columns, axis=1)
        if activation is not None:
            y = activate(y, activation)
        return y if residual is None else residual + y

    def _multiply(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """x [T, K] @ weight [N, K]^T."""
        if not self.deterministic:
            return x @ weight.T
        y = np.empty((len(x), len(weight)), np.float32)
        for token, row in enumerate(x):
            y[token] = weight @ row
        return y

    def attention(self, qkv, batch, pages, shape, *, rope, q_norm=None, k_norm=None, v_norm=None, sinks=None,
                  then=None):
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim

        def prepare(x, norm, rotated):
            if norm is not None:
                x = rms_norm(x, norm.weight, norm.eps)
            if rotated and rope is not None:
                x = rotate(x, *(table[batch.positions] for table in rope))
            return x

        q, k, v = np.split(qkv.reshape(len(qkv), -1, dim), [heads, heads + kv_heads], axis=1)
        q = prepare(q, q_norm, rotated=True)
        if shape.shares is None:
            v = prepare(k if shape.values_are_keys else v, v_norm, rotated=False)
            k = prepare(k, k_norm, rotated=True)
        table = batch.pages[pages.group]
        out = np.empty((len(qkv), heads * dim), np.float32)
        for s, length in enumerate(batch.lengths.tolist()):
            rows = slice(batch.starts[s], batch.starts[s + 1])
            where = batch.positions[rows]
            if shape.shares is None:
                pages.write(table[s, where // PAGE_TOKENS], where % PAGE_TOKENS, k[rows], v[rows])
            keys, values = pages.read(table[s], length)
            first = int(where[0])
            step = 1 if self.deterministic else len(where)
            for t in range(0, len(where), step):
                some, seen = slice(rows.start + t, rows.start + t + step), first + t + step
                out[some] = attend(q[some], keys[:seen], values[:seen], first + t, shape, sinks)
        return out

    def logits(self, h, batch, norm, head, *, softcap=None):
        y = self.linear(h[batch.rows], head, norm=norm)
        return y if softcap is None else np.float32(softcap) * np.tanh(y / np.float32(softcap))

    def route(self, x, router, routing, *, norm=None, correction=None, expert_scale=None, experts_norm=None,
              beside=False):
        return choose(self.linear(x, router, norm=norm), routing, correction, expert_scale)

    def experts(self, x, choice, up, down, *, activation, norm=None, residual=None):
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps)
        y = np.zeros((len(x), down.out_features), np.float32)
        for token, (ids, weights) in enumerate(zip(*choice)):
            for expert, weight in zip(ids.tolist(), weights):
                inner = self.linear(x[token:token + 1], up.experts[expert], activation=activation)
                y[token] += weight * self.linear(inner, down.experts[expert])[0]
        return y if residual is None else residual + y

    def merge(self, residual, branches, *, norm=None, scale=1.0):
        total = sum(x if one is None else rms_norm(x, one.weight, one.eps) for x, one in branches)
        return (residual + (total if norm is None else rms_norm(total, norm.weight, norm.eps))) * np.float32(scale)

    def per_layer_inputs(self, h, batch, table, projection, norm):
        looked_up = self.embed(batch, table).reshape(len(h), -1, len(norm.weight))
        projected = self.linear(h, projection).reshape(looked_up.shape) * np.float32(h.shape[1] ** -0.5)
        return (rms_norm(projected, norm.weight, norm.eps) + looked_up) * np.float32(2**-0.5)

    def per_layer_gate(self, h, gate, inputs, layer):
        return gelu_tanh(self.linear(h, gate)) * inputs[:, layer]

    def mamba(self, projected, batch, state, weight, shape):
        z, xbc, dt = np.split(projected, [shape.inner, shape.inner + shape.conv_width], axis=1)
        heads, dim, groups, size = shape.num_heads, shape.head_dim, shape.num_groups, shape.state_size
        dt = softplus(dt + weight.dt_bias)
        y = np.empty((len(projected), heads, dim), np.float32)
        for s, slot in enumerate(batch.slots.tolist()):
            first, last = batch.starts[s], batch.starts[s + 1]
            if batch.positions[first] == 0:
                state.conv[slot], state.ssm[slot] = 0, 0
            for t in range(first, last):
                inputs = np.concatenate([state.conv[slot], xbc[t][:, None]], axis=1)
                state.conv[slot] = inputs[:, 1:]
                x, B, C = np.split(silu((inputs * weight.conv).sum(axis=1) + weight.conv_bias),
                                   [shape.inner, shape.inner + groups * size])
                x = x.reshape(heads, dim)
                B, C = (np.repeat(one.reshape(groups, size), heads // groups, axis=0) for one in (B, C))
                decay = np.exp(dt[t] * weight.A)[:, None, None]
                state.ssm[slot] = decay * state.ssm[slot] + (dt[t][:, None] * x)[:, :, None] * B[:, None]
                y[t] = (state.ssm[slot] * C[:, None]).sum(axis=2) + weight.D[:, None] * x
        gated = (y.reshape(len(y), -1) * silu(z)).reshape(len(y), groups, -1)
        return rms_norm(gated, weight.norm.reshape(groups, -1), weight.eps).reshape(len(y), -1)

    def sampler(self, rows: Sequence[SamplerRow], vocab_size: int, into: Sampler | None = None) -> Sampler:
        for row in rows:
            sampling.check_row(row, vocab_size)
        rows = [row if row.mask is None else replace(row, mask=row.mask.copy()) for row in rows]
        rows = [row if (seen := row.history) is None else replace(row, prompt=seen.prompt, generated=seen.generated)
                for row in rows]
        if into is None:
            return Sampler(rows)
        into.rows = rows + [GREEDY] * (len(into.rows) - len(rows))
        return into

    def batch_bytes(self, sequences: int, pages: int) -> int:
        return 0

    def sampler_bytes(self, vocab_size: int) -> int:
        return 0

    def history(self, prompt: Sequence[int], generated: Sequence[int], vocab_size: int) -> History:
        return History(list(prompt), list(generated))

    def sample(self, logits: np.ndarray, sampler: Sampler) -> np.ndarray:
        ids = np.array([sampling.draw(row, settings) for row, settings in zip(logits, sampler.rows)], np.int32)
        for row, token in enumerate(ids.tolist()):
            sampler.drawn(row, token)
        return ids

    def logprobs(self, logits: np.ndarray, ids: np.ndarray, top: int) -> np.ndarray:
        sampling.check_logprobs(top, logits.shape[1])
        return np.stack([sampling.logprobs(row, token, top) for row, token in zip(logits, ids.tolist(), strict=True)])

    def advance(self, batch: Batch, ids: np.ndarray) -> None:
        batch.tokens[...] = np.maximum(ids, 0)
        batch.positions[...] += 1
        batch.lengths[...] += 1

    def fetch(self, array: np.ndarray) -> Ready:
        return Ready(array.copy())

    def record(self, step: Callable) -> Callable:
        return step

    def is_finite(self, x: np.ndarray) -> bool:
        return bool(np.isfinite(x).all())

    def free_memory(self) -> int | None:
        return None

    def expect(self, nbytes: int) -> None:
        pass

    def reserve(self, step: Callable[[], object]) -> int:
        return 0

    def rehearse(self, step: Callable[[], object]) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass
