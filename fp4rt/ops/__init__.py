"""The operations a model is made of: a Protocol with every shape, dtype and meaning, implemented by three backends.

`reference` (plain numpy) is the specification; `cpu` (Numba) and `cuda` (CuPy memory, own kernels) must agree with it
on every row of tests/cases.py. Models see handles only: a backend decides how weights and activations lie in memory.

The activations' arithmetic: the residual stream is float32 on every backend. Everything else between operations is
float32 on `reference` and `cpu`, and on `cuda` fp16 times one power of two per producing weight, fixed at load from a
Cauchy-Schwarz bound on what that weight can produce, so that nothing can overflow fp16. Products accumulate in
float32; scales are applied in float32 before anything narrows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from fp4rt.batch import Batch
    from fp4rt.formats import Weight

Handle = Any  # an array or object that only its backend looks into


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and constants of one attention layer.

    scale: what q.k is multiplied by. window: how many keys a query sees, itself included; None for all.
    Query head h reads K/V head h // (num_heads // num_kv_heads).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None


class Linear(Protocol):
    """A linear layer's weight as a backend keeps it: [out_features, in_features], one or several parts stacked."""

    out_features: int  # rows of all parts together; of the product for a gated pair: half of that
    in_features: int
    nbytes: int        # bytes of memory held, all of which are read for each step
    kernel: str        # the kernel that runs it at decode, for reports
    reason: str        # why that one


class Pending(Protocol):
    """Numbers on their way from the device."""

    def result(self) -> np.ndarray: ...


@dataclass(frozen=True)
class SamplerRow:
    """How the next token of one sequence is drawn; see sampling.py for the meaning of each number.

    step: tokens drawn so far for this sequence (the random stream's position). prompt/generated: the ids that
    penalties look at.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    step: int
    prompt: Sequence[int]
    generated: Sequence[int]


class Ops(Protocol):
    """What a backend provides. T tokens, S sequences, R rows with logits, d hidden size, V vocabulary."""

    name: str
    device: str       # one line for people: "NVIDIA H100 80GB HBM3 (sm_90a)", "CPU, 2 threads, avx512"
    step_tokens: int  # tokens worth putting into one step of a long prompt
    lookahead: int    # decode steps worth queueing before the first one's ids are read (0: steps run as called)

    # -- At load ------------------------------------------------------------------------------------------------

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> Linear:
        """Take over the parts of one linear, stacked along their rows in this order (q, k, v; or gate, up).

        Each part keeps its own format, scales, bias and pre_quant_scale, so stacking changes no value. `gated`: the
        two parts have equal shapes and will be used as activation(gate) * up. Raises Fp4rtError("memory").
        """

    def norm_weight(self, weight: np.ndarray, eps: float) -> Handle:
        """RMSNorm: weight float32 [n]; x * weight / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019)."""

    def embedding_weight(self, weight: Weight, *, tied_to: Linear | None = None) -> Handle:
        """The token table [V, d]. `tied_to`: the head made from the same tensor, whose memory is then shared."""

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int) -> Handle:
        """Rotary angles (Su et al. 2021): inv_freq float32 [head_dim/2]; cos and sin of position * inv_freq.

        Angles, cos and sin are float32; both are multiplied by attention_factor. Dimension i pairs with
        i + head_dim/2 (the half-split layout of published checkpoints).
        """

    def kv_pages(self, shape: AttentionShape, num_pages: int) -> Handle:
        """Room for the keys and values of one layer: each [num_pages, num_kv_heads, PAGE_TOKENS, head_dim]."""

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        """Bytes of one page of one layer, keys and values together."""

    # -- A step -------------------------------------------------------------------------------------------------

    def batch(self, batch: Batch, into: Handle | None = None) -> Handle:
        """Put a Batch where the operations can read it; `into` refills one with the same S, P, T and R."""

    def embed(self, batch: Handle, table: Handle) -> Handle:
        """Residual float32 [T, d]: the rows of the table."""

    def linear(self, x: Handle, weight: Linear, *, norm: Handle | None = None, activation: str | None = None,
               residual: Handle | None = None) -> Handle:
        """y = x @ W^T + bias, [T, K] -> [T, N], with its neighbours.

        norm: x is the residual stream and is RMS-normed first (without it, x is an activation).
        activation: "silu" for a gated weight: y = silu(x @ gate^T) * (x @ up^T), [T, N/2].
        residual: returns residual + y (float32); the residual handed in is used up.
        """

    def attention(self, qkv: Handle, batch: Handle, pages: Handle, shape: AttentionShape, *, rope: Handle | None,
                  q_norm: Handle | None = None, k_norm: Handle | None = None) -> Handle:
        """Causal attention of T new tokens over everything remembered, [T, (H + 2 Hk) hd] -> [T, H hd].

        Each head of q and k is RMS-normed over head_dim (where given), then rotated; k and v are written to their
        pages; softmax(scale * q.k) v over positions j <= i, and j > i - window. Scores and softmax in float32.
        """

    def logits(self, h: Handle, batch: Handle, norm: Handle, head: Linear) -> Handle:
        """Final norm and head on the wanted rows of the residual stream: float32 [R, V]."""

    # -- Tokens -------------------------------------------------------------------------------------------------

    def sampler(self, rows: Sequence[SamplerRow], vocab_size: int, into: Handle | None = None) -> Handle:
        """Put the settings of R rows where `sample` can read them; `into` refills one with the same R."""

    def sample(self, logits: Handle, sampler: Handle) -> Handle:
        """Next ids int32 [R], as sampling.draw defines; -1 where a row's logits hold a NaN or an infinity.

        Advances the sampler: its step and its counts now include the drawn ids.
        """

    def advance(self, batch: Handle, ids: Handle) -> None:
        """Make a decode batch the next step's: tokens <- ids, positions + 1, lengths + 1 (padded rows stay)."""

    def fetch(self, array: Handle) -> Pending:
        """Start copying a step's ids or logits to the host; result() waits for it."""

    def record(self, step: Callable[[], Handle]) -> Callable[[], Handle]:
        """A callable that repeats the launches of `step` on the same buffers (a CUDA graph; `step` itself elsewhere)."""

    def is_finite(self, x: Handle) -> bool:
        """Whether a residual stream or logits hold neither NaN nor infinity (waits for the device)."""

    # -- Room ---------------------------------------------------------------------------------------------------

    def free_memory(self) -> int | None:
        """Bytes that may still be allocated within this backend's budget; None if unknown."""

    def reserve(self, step: Callable[[], object]) -> int:
        """Size the scratch memory for `step` (the largest one that will ever run) without running it: bytes."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""

    def close(self) -> None:
        """Give all memory back; the backend cannot be used afterwards."""
