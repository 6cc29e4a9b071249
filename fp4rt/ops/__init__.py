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
    """Sizes and constants of one attention layer, and so what it remembers: pages of keys and values.

    scale: what q.k is multiplied by. window: how many keys a query sees, itself included; None for all.
    Query head h reads K/V head h // (num_heads // num_kv_heads).
    values_are_keys: there is no v in the input; the values are the raw keys (Gemma 4's K=V layers).
    shares: the layer whose pages this one reads instead of writing its own; its input is q alone.
    fp8_scales: (k, v) of pages in FP8: E4M3 codes of k and v divided by these, to nearest, saturating at 448 times the
    scale; what is read is code times scale. None for pages in the backend's own precision.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    values_are_keys: bool = False
    shares: int | None = None
    fp8_scales: tuple[float, float] | None = None

    @property
    def input_width(self) -> int:
        """Columns of the projection that attention takes: q, then k, then v, as far as they are there."""
        others = 0 if self.shares is not None else self.num_kv_heads * (1 if self.values_are_keys else 2)
        return (self.num_heads + others) * self.head_dim


@dataclass(frozen=True)
class MambaShape:
    """Sizes of one Mamba2 mixer (Dao and Gu 2024), and so its state: convolution inputs and a float32 matrix per head.

    The input projection gives z [inner], xBC [conv_width] and dt [num_heads], in this order.
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_width(self) -> int:
        return self.inner + 2 * self.num_groups * self.state_size

    @property
    def input_width(self) -> int:
        return self.inner + self.conv_width + self.num_heads


@dataclass(frozen=True)
class Routing:
    """How a token chooses `top_k` of its experts and weighs them.

    scoring: "softmax" over all experts, or "sigmoid" of each; a correction bias, where given, is added for choosing
    only. normalize: the chosen weights are divided by their sum. scaling multiplies them at last. With groups > 1
    only experts of the groups_kept groups whose two best sum highest can be chosen. Ties go to the lowest index.
    always: experts behind those num_experts, from number num_experts on, that every token takes besides its top_k, with
    weight 1.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalize: bool = True
    scaling: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    always: int = 0

    @property
    def slots(self) -> int:
        """Experts that a token takes."""
        return self.top_k + self.always


# What may stand behind a linear. Gated ones take a gate and an up projection, g and u:
#   "silu"       silu(g) * u                      "gelu_tanh"  gelu(g) * u, with the tanh approximation
#   "swiglu_oai" g' sigmoid(1.702 g') (u' + 1), g' = min(g, 7), u' = clamp(u, -7, 7)      (gpt-oss)
# and one that takes one projection:
#   "relu2"      max(y, 0)^2                      (Nemotron-H)
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai", "relu2")


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
    penalties look at. logit_bias: (id, what is added to its logit), each id once. mask: uint32 [ceil(V / 32)]; an id i
    whose bit i % 32 of word i // 32 is 0 cannot be drawn. It holds for every draw until the sampler is refilled; None
    allows all. history: from Ops.history, in place of prompt and generated; what is drawn is added to it.
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
    logit_bias: tuple[tuple[int, float], ...] = ()
    mask: np.ndarray | None = None
    history: Handle | None = None

    @property
    def penalised(self) -> bool:
        """Whether it matters which ids were seen."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


# How rows that nobody reads are drawn.
GREEDY = SamplerRow(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
                    frequency_penalty=0.0, seed=0, step=0, prompt=(), generated=())


class Ops(Protocol):
    """What a backend provides. T tokens, S sequences, R rows with logits, d hidden size, V vocabulary."""

    name: str
    device: str       # one line for people: "NVIDIA H100 80GB HBM3 (sm_90a)", "CPU, 2 threads, avx512"
    notice: str       # what a person should know before the first step; "" if there is nothing
    step_tokens: int  # tokens worth putting into one step of a long prompt
    lookahead: int    # decode steps worth queueing before the first one's ids are read (0: steps run as called)
    shared_as_experts: bool  # whether a shared expert is best taken as some that are always chosen (Routing.always)

    # -- At load ------------------------------------------------------------------------------------------------

    def linear_weight(self, parts: Sequence[Weight], *, gated: bool = False) -> Linear:
        """Take over the parts of one linear, stacked along their rows in this order (q, k, v; or gate, up).

        Each part keeps its own format, scales, bias and pre_quant_scale, so stacking changes no value. `gated`: the
        two parts have equal shapes and will be used as activation(gate) * up. Raises Fp4rtError("memory").
        """

    def expert_weight(self, experts: Sequence[Sequence[Weight]], *, gated: bool = False) -> Linear:
        """The same linear of every expert, as `linear_weight` takes one: experts[e] are the parts of expert e."""

    def vector(self, values: np.ndarray) -> Handle:
        """Small float32 numbers that an operation takes as they are: sinks, a router's bias or scale."""

    def norm_weight(self, weight: np.ndarray, eps: float) -> Handle:
        """RMSNorm: weight float32 [n]; x * weight / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019)."""

    def embedding_weight(self, weight: Weight, *, tied_to: Linear | None = None, scale: float = 1.0) -> Handle:
        """The token table [V, d], its rows multiplied by `scale` when looked up.

        tied_to: the head made from the same tensor (unscaled), whose memory is then shared.
        """

    def host_embedding_weight(self, weight: Weight, scale: float) -> Handle:
        """A table [V, n] that stays in host memory (mapped from its file); rows are multiplied by scale."""

    def rope_table(self, inv_freq: np.ndarray, attention_factor: float, max_positions: int) -> Handle:
        """Rotary angles (Su et al. 2021): inv_freq float32 [head_dim/2]; cos and sin of position * inv_freq.

        Angles, cos and sin are float32; both are multiplied by attention_factor. Dimension i pairs with
        i + head_dim/2 (the half-split layout of published checkpoints).
        """

    def mamba_weight(self, shape: MambaShape, conv: np.ndarray, conv_bias: np.ndarray, A: np.ndarray, D: np.ndarray,
                     dt_bias: np.ndarray, norm: np.ndarray, eps: float) -> Handle:
        """What a mixer holds besides its two linears, float32: conv [conv_width, conv_kernel], conv_bias [conv_width],
        A (negative), D and dt_bias [num_heads], norm [inner]."""

    def mamba_state(self, shape: MambaShape, num_slots: int) -> Handle:
        """Room for the state of num_slots sequences; slot 0 is nobody's."""

    def mamba_state_bytes(self, shape: MambaShape) -> int:
        """Bytes of one slot."""

    def kv_pages(self, shape: AttentionShape, num_pages: int, group: int = 0) -> Handle:
        """Room for the keys and values of one layer: each [num_pages, num_kv_heads, PAGE_TOKENS, head_dim].

        float32 on `reference` and `cpu`, fp16 on `cuda`, or one byte each where the shape has fp8_scales.
        group: which of the batch's page tables numbers them.
        """

    def kv_page_bytes(self, shape: AttentionShape) -> int:
        """Bytes of one page of one layer, keys and values together."""

    # -- A step -------------------------------------------------------------------------------------------------

    def batch(self, batch: Batch, into: Handle | None = None) -> Handle:
        """Put a Batch where the operations can read it; `into` refills one with the same S, P, T and R.

        A token below 0 is one that the host does not know yet; see `feed`.
        """

    def feed(self, batch: Handle, ids: Handle) -> None:
        """Put what `sample` drew last into a batch: tokens -1 - r become ids[r] (int32 [R]; 0 for a failed row)."""

    def embed(self, batch: Handle, table: Handle) -> Handle:
        """Residual float32 [T, d]: the rows of the table."""

    def linear(self, x: Handle, weight: Linear, *, norm: Handle | None = None, activation: str | None = None,
               residual: Handle | None = None, then: Linear | None = None) -> Handle:
        """y = x @ W^T + bias, [T, K] -> [T, N], with its neighbours.

        norm: x is the residual stream and is RMS-normed first (without it, x is an activation).
        activation: one of ACTIVATIONS; the gated ones halve N.
        residual: returns residual + y (float32); the residual handed in is used up.
        then: the linear that takes y next, as nothing else does: y may come in an order of that linear's own.
        """

    def attention(self, qkv: Handle, batch: Handle, pages: Handle, shape: AttentionShape, *, rope: Handle | None,
                  q_norm: Handle | None = None, k_norm: Handle | None = None, v_norm: Handle | None = None,
                  sinks: Handle | None = None, then: Linear | None = None) -> Handle:
        """Causal attention of T new tokens over everything remembered, [T, input_width] -> [T, H hd].

        Each head of q, k and v is RMS-normed over head_dim (where given), q and k are then rotated; k and v are
        written to their pages; softmax(scale * q.k) v over positions j <= i, and j > i - window, in float32.
        sinks [H]: one more logit per head in the softmax's sum, without a value (gpt-oss). then: as for `linear`.
        """

    def logits(self, h: Handle, batch: Handle, norm: Handle, head: Linear, *, softcap: float | None = None) -> Handle:
        """Final norm and head on the wanted rows of the residual stream: float32 [R, V]; softcap: c tanh(y / c)."""

    def route(self, x: Handle, router: Linear, routing: Routing, *, norm: Handle | None = None,
              correction: Handle | None = None, expert_scale: Handle | None = None,
              experts_norm: Handle | None = None, beside: bool = False) -> Handle:
        """Each token's experts, int32 [T, slots], and their weights, float32 [T, slots]; x and norm as for `linear`.

        The router's logits are float32. correction [E] is added to the scores for choosing; expert_scale [E]
        multiplies the weights of the chosen experts at last. experts_norm: the norm that `experts` will be given for
        this x, if another than the router's: both may be computed here. beside: other operations, which leave x alone,
        come between this one and the `experts` that take its choice, and may be computed at the same time.
        """

    def experts(self, x: Handle, choice: Handle, up: Linear, down: Linear, *, activation: str,
                norm: Handle | None = None, residual: Handle | None = None) -> Handle:
        """sum over a token's experts e of weight_e * down_e(activation(up_e(x))), [T, d]; `up` is gate and up if gated.

        norm and residual as for `linear`. Only chosen experts are read. If x was the router's, too, its numbers must be
        the same as then.
        """

    def merge(self, residual: Handle, branches: Sequence[tuple[Handle, Handle | None]], *, norm: Handle | None = None,
              scale: float = 1.0) -> Handle:
        """(residual + norm(sum of norm_i(x_i))) * scale: what follows a sublayer in models that norm after it."""

    def per_layer_inputs(self, h: Handle, batch: Handle, table: Handle, projection: Linear, norm: Handle) -> Handle:
        """Gemma 4's per-layer embeddings [T, L, w]: (norm(projection(h) / sqrt(d)) + table[token]) / sqrt(2).

        h is the residual stream after the embedding, taken as it is; norm is over w.
        """

    def per_layer_gate(self, h: Handle, gate: Linear, inputs: Handle, layer: int) -> Handle:
        """gelu_tanh(h @ gate^T) * inputs[:, layer], [T, w]; h is the residual stream as it is."""

    def mamba(self, projected: Handle, batch: Handle, state: Handle, weight: Handle, shape: MambaShape) -> Handle:
        """A Mamba2 mixer between its linears: [T, input_width] -> [T, inner].

        Causal convolution over xBC and SiLU; dt = softplus(dt + dt_bias), not clamped; per head S <- exp(dt A) S +
        dt x B^T, y = S C + D x, in float32 from the sequence's slot (from zero at position 0) and back into it;
        then RMSNorm over each of num_groups groups of y * silu(z).
        """

    def copy_mamba_state(self, state: Handle, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds after the steps asked for so far."""

    # -- Tokens -------------------------------------------------------------------------------------------------

    def sampler(self, rows: Sequence[SamplerRow], vocab_size: int, into: Handle | None = None) -> Handle:
        """Put the settings of R rows where `sample` can read them.

        `into` refills one that was made for as many rows or more: those beyond are then drawn as GREEDY says. Masks
        are copied. Raises Fp4rtError("request") for a bias outside the vocabulary, or a mask that allows nothing.
        """

    def batch_bytes(self, sequences: int, pages: int) -> int:
        """Device memory of a batch of so many sequences with a token each, and so many pages in all their tables."""

    def sampler_bytes(self, vocab_size: int) -> int:
        """Device memory that one row's settings take at most, its history included."""

    def history(self, prompt: Sequence[int], generated: Sequence[int], vocab_size: int) -> Handle:
        """What penalties know of a sequence, for SamplerRow.history: kept up to date by `sample`, not by the host."""

    def sample(self, logits: Handle, sampler: Handle) -> Handle:
        """Next ids int32 [R], as sampling.draw defines; -1 where a row's logits hold a NaN or an infinity.

        Advances the sampler: its step and its counts now include the drawn ids. The logits stay as they are.
        """

    def logprobs(self, logits: Handle, ids: Handle | np.ndarray, top: int) -> Handle:
        """Natural log-probabilities under the softmax of logits [R, V] as the model gave them: float32 [R, 1 + 2 top].

        In each row: that of its id (int32 [R]: as `sample` gave them, or the host's own); then the `top` (0 to 20)
        likeliest ids, as floats, which hold them exactly, ties to the lowest id; then theirs. A row of NaN where the id
        is -1 or the logits hold a NaN or an infinity. Raises Fp4rtError("request").
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

    def expect(self, nbytes: int) -> None:
        """Take so many bytes from the device in one piece: for pages, slots, and what batches and samplers need later.
        """

    def reserve(self, step: Callable[[], object]) -> int:
        """Size the scratch memory for `step` (the largest one that will ever run) without running it: bytes."""

    def rehearse(self, step: Callable[[], object]) -> None:
        """Compile and load what `step` runs, so that nobody waits for it later; it may be run, on pages of nobody's."""

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""

    def close(self) -> None:
        """Give all memory back; the backend cannot be used afterwards."""
