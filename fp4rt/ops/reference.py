"""The operations in plain numpy: slow, obvious, and the meaning that the other backends are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight
from fp4rt.ops import AttentionShape, SamplerRow


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


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, shape: AttentionShape) -> np.ndarray:
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
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights @ v[:, head // group] / weights.sum(axis=1, keepdims=True)
    return out.reshape(t, -1)


# -- The backend --------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Norm:
    weight: np.ndarray
    eps: float


@dataclass
class Pages:
    """Keys and values [num_pages, num_kv_heads, PAGE_TOKENS, head_dim] float32."""

    keys: np.ndarray
    values: np.ndarray

    def read(self, pages: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `length` keys and values of a sequence with these pages: [length, num_kv_heads, head_dim]."""
        count = -(-length // PAGE_TOKENS)
        gathered = (store[pages[:count]].transpose(0, 2, 1, 3) for store in (self.keys, self.values))
        keys, values = (g.reshape(-1, *g.shape[2:])[:length] for g in gathered)
        return keys, values


class Sampler:
    """The rows' settings and what they have drawn."""

    def __init__(self, rows: Sequence[SamplerRow]):
        self.rows = list(rows)

    def drawn(self, row: int, token: int) -> None:
        old = self.rows[row]
        self.rows[row] = SamplerRow(**{**old.__dict__, "step": old.step + 1, "generated": [*old.generated, token]})


@dataclass(frozen=True)
class Ready:
    """A Pending that has already arrived."""

    array: np.ndarray

    def result(self) -> np.ndarray:
        return self.array


class ReferenceOps:
    """Ops in numpy, float32 throughout."""

    name = "reference"
    device = "numpy reference"
    step_tokens = 256
    lookahead = 0

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic  # always is

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> ReferenceLinear:
        return ReferenceLinear(tuple(parts), gated)

    def norm_weight(self, weight: np.ndarray, eps: float) -> Norm:
        return Norm(np.asarray(weight, np.float32), eps)

    def embedding_weight(self, weight: Weight, *, tied_to: ReferenceLinear | None = None) -> Weight:
        return weight

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int):
        angles = np.arange(max_positions, dtype=np.float32)[:, None] * inv_freq.astype(np.float32)
        factor = np.float32(attention_factor)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def kv_pages(self, shape: AttentionShape, num_pages: int) -> Pages:
        size = (num_pages, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
        return Pages(np.zeros(size, np.float32), np.zeros(size, np.float32))

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        return 2 * shape.num_kv_heads * PAGE_TOKENS * shape.head_dim * 4

    def batch(self, batch: Batch, into: Batch | None = None) -> Batch:
        if into is None:
            return Batch(**{name: np.array(value, np.int32) for name, value in batch.__dict__.items()})
        for name, value in batch.__dict__.items():
            getattr(into, name)[...] = value
        return into

    def embed(self, batch: Batch, table: Weight) -> np.ndarray:
        return np.concatenate([table.dequantize(slice(token, token + 1)) for token in batch.tokens.tolist()])

    def linear(self, x, weight, *, norm=None, activation=None, residual=None):
        if norm is not None:
            x = rms_norm(x, norm.weight, norm.eps)
        columns = []
        for part in weight.parts:
            scaled = x if part.pre_quant_scale is None else x * part.pre_quant_scale
            y = scaled @ part.dequantize().T
            columns.append(y if part.bias is None else y + part.bias)
        y = np.concatenate(columns, axis=1)
        if activation is not None:
            if activation != "silu":
                raise Fp4rtError("request", f"unknown activation {activation!r}")
            gate, up = np.split(y, 2, axis=1)
            y = silu(gate) * up
        return y if residual is None else residual + y

    def attention(self, qkv, batch, pages, shape, *, rope, q_norm=None, k_norm=None):
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        q, k, v = np.split(qkv.reshape(len(qkv), -1, dim), [heads, heads + kv_heads], axis=1)
        if q_norm is not None:
            q = rms_norm(q, q_norm.weight, q_norm.eps)
        if k_norm is not None:
            k = rms_norm(k, k_norm.weight, k_norm.eps)
        if rope is not None:
            cos, sin = (table[batch.positions] for table in rope)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = np.empty((len(qkv), heads * dim), np.float32)
        for s, length in enumerate(batch.lengths.tolist()):
            rows = slice(batch.starts[s], batch.starts[s + 1])
            where = batch.positions[rows]
            page, slot = batch.pages[s, where // PAGE_TOKENS], where % PAGE_TOKENS
            pages.keys[page, :, slot], pages.values[page, :, slot] = k[rows], v[rows]
            keys, values = pages.read(batch.pages[s], length)
            out[rows] = attend(q[rows], keys, values, int(where[0]), shape)
        return out

    def logits(self, h, batch, norm, head):
        return self.linear(h[batch.rows], head, norm=norm)

    def sampler(self, rows: Sequence[SamplerRow], vocab_size: int, into: Sampler | None = None) -> Sampler:
        if into is None:
            return Sampler(rows)
        into.rows = list(rows)
        return into

    def sample(self, logits: np.ndarray, sampler: Sampler) -> np.ndarray:
        from fp4rt.sampling import draw

        ids = np.array([draw(row, settings) for row, settings in zip(logits, sampler.rows)], np.int32)
        for row, token in enumerate(ids.tolist()):
            sampler.drawn(row, token)
        return ids

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

    def reserve(self, step: Callable[[], object]) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass
