"""The hand between a checkpoint and a backend: reads a layer's weights, hands them over, remembers what there was."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fp4rt.checkpoint import Scope
from fp4rt.errors import Fp4rtError
from fp4rt.formats import (Dense, ExpertShape, Weight, count_parts, has_weight, is_copy, read_experts, read_kv_scales,
                           read_vector, read_weight, split)
from fp4rt.ops import AttentionShape, Linear, MambaShape, Ops

KV_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class Loaded:
    """One linear as loaded: its parts' names, formats and bytes in the file, and the backend's handle.

    part_bytes: 0 for a part that lies in the file together with an earlier one.
    """

    names: tuple[str, ...]
    formats: tuple[str, ...]  # "NVFP4 (of BF16)" where it was quantized on its way
    shape: tuple[int, int]  # rows of all parts, columns
    part_bytes: tuple[int, ...]
    linear: Linear
    experts: int = 0   # it is the same linear of so many; 0: not experts
    chosen: int = 0    # how many of them a token chooses
    always: int = 0    # how many of them, the last ones, every token takes besides
    is_head: bool = False  # of which a prompt needs its last token's row alone

    @property
    def stored(self) -> int:
        """How many linears of the file these are."""
        return sum(nbytes > 0 for nbytes in self.part_bytes)

    def read(self, tokens: int = 1) -> float:
        """The share of it that a step of so many tokens reads: of experts, those expected to be taken by any.

        Expected as if each token chose at random; tokens that choose alike read fewer.
        """
        if not self.experts:
            return 1.0
        routed = self.experts - self.always
        return (self.always + routed * (1 - (1 - self.chosen / routed) ** tokens)) / self.experts


def _as_stored(weight: Weight, place: str) -> Weight:
    return weight


@dataclass
class Loader:
    """Builds handles for model blocks. `linears` is the inventory, in the order the model asked.

    kv_dtype: "auto" (the backend's own precision for keys and values) or "fp8".
    requantize: (weight, place) -> the weight to load instead; place is "layers", "router" or "lm_head".
    """

    ops: Ops
    kv_dtype: str = "auto"
    requantize: Callable[[Weight, str], Weight] = _as_stored
    linears: list[Loaded] = field(default_factory=list)
    norm_bytes: int = 0
    embedding_bytes: int = 0  # of a token table that is not the head as well
    tied: bool = False  # the token table and the head are one tensor of the file
    fp8_layers: dict[bool, int] = field(default_factory=dict)  # with FP8 keys and values: scaled by the file or not

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_DTYPES:
            raise Fp4rtError("request", f"kv_dtype is {self.kv_dtype!r}; it must be one of {', '.join(KV_DTYPES)}")

    def remembered(self, scope: Scope, shape: AttentionShape) -> AttentionShape:
        """What the attention module at `scope` remembers: `shape`, with its FP8 scales where FP8 is asked for."""
        if self.kv_dtype == "auto" or shape.shares is not None:
            return shape
        scales = read_kv_scales(scope)
        self.fp8_layers[scales is not None] = self.fp8_layers.get(scales is not None, 0) + 1
        return replace(shape, fp8_scales=scales or (1.0, 1.0))

    def linear(self, scope: Scope, parts: dict[str, int], in_features: int, *, bias: bool = False,
               gated: bool = False) -> Linear:
        """The linears of `scope` with these names and row counts, stacked in this order."""
        return self._stack([read_weight(scope.at(name), rows, in_features, bias=bias) for name, rows in parts.items()],
                           gated=gated)

    def router(self, scope: Scope, name: str, experts: int, in_features: int, *, bias: bool = False) -> Linear:
        """The linear whose outputs choose experts; it is never quantized on its way."""
        return self._stack([read_weight(scope.at(name), experts, in_features, bias=bias)], "router")

    def _stack(self, weights: list[Weight], place: str = "layers", *, gated: bool = False) -> Linear:
        taken = [self.requantize(weight, place) for weight in weights]
        linear = self.ops.linear_weight(taken, gated=gated)
        self.linears.append(Loaded(tuple(w.name for w in weights), _formats(weights, taken),
                                   (sum(w.shape[0] for w in weights), weights[0].shape[1]),
                                   tuple(w.nbytes for w in weights), linear, is_head=place == "lm_head"))
        return linear

    def experts(self, scope: Scope, shape: ExpertShape, top_k: int) -> tuple[Linear, Linear]:
        """The experts below `scope`, of which a token takes top_k: (gate and) up, and down."""
        up, down = read_experts(scope, shape)
        return self._experts(up, top_k, gated=shape.gated), self._experts(down, top_k)

    def experts_and_shared(self, scope: Scope, shape: ExpertShape, top_k: int, shared_up: Sequence[Weight],
                           shared_down: Weight) -> tuple[Linear, Linear, int]:
        """The same with a shared expert, and as how many experts behind the others it was taken (Routing.always).

        0, and the shared expert remains to be loaded by itself, where the backend prefers that or the two do not fit.
        """
        up, down = read_experts(scope, shape)
        count = count_parts(shared_up, shared_down, up[0], down[0][0]) if self.ops.shared_as_experts else 0
        return (self._experts(up, top_k, gated=shape.gated, shared=shared_up, count=count, axis=0),
                self._experts(down, top_k, shared=[shared_down], count=count, axis=1), count)

    def _experts(self, experts: list[list[Weight]], top_k: int, *, gated: bool = False, shared: Sequence[Weight] = (),
                 count: int = 0, axis: int = 0) -> Linear:
        """shared: parts of the same linear of a shared expert, split into those of `count` experts along an axis."""
        taken = [[self.requantize(part, "layers") for part in expert] for expert in experts]
        part_bytes = [part.nbytes for expert in experts for part in expert]
        if count:  # quantized as a whole, so that its values do not depend on the backend
            experts = experts + _transposed(split(part, count, axis) for part in shared)
            taken += _transposed(split(self.requantize(part, "layers"), count, axis) for part in shared)
            part_bytes += [part.nbytes for part in shared] + [0] * (count - 1) * len(shared)
        handle = self.ops.expert_weight(taken, gated=gated)
        parts = [part for expert in experts for part in expert]
        self.linears.append(Loaded(tuple(p.name for p in parts),
                                   _formats(parts, [part for expert in taken for part in expert]),
                                   (sum(p.shape[0] for p in parts), parts[0].shape[1]),
                                   tuple(part_bytes), handle, len(experts), top_k, count))
        return handle

    def vector(self, scope: Scope, suffix: str, size: int) -> Any:
        self.norm_bytes += 4 * size
        return self.ops.vector(read_vector(scope, suffix, size))

    def norm(self, scope: Scope, name: str, size: int, eps: float) -> Any:
        self.norm_bytes += 4 * size
        return self.ops.norm_weight(read_vector(scope, f"{name}.weight", size), eps)

    def embedding_and_head(self, embedding: Scope, head: Scope, vocab: int, hidden: int, *, tied: bool,
                           scale: float = 1.0) -> tuple[Any, Linear]:
        """The token table and the head. One tensor shares its memory, unless the head is quantized on its way.

        tied: config.json says that they are one. A head that lies in the file all the same is used unless it is a copy
        (as transformers 5 does): ModelOpt quantizes the head of a tied model and does not tell config.json.
        """
        if tied and has_weight(head) and not has_weight(embedding):
            embedding = head  # some exporters drop this one of the two names
        table = read_weight(embedding, vocab, hidden)
        self.tied = tied and (embedding == head or not has_weight(head) or is_copy(head, embedding))
        if self.tied:
            linear = self._stack([table], "lm_head")
            if isinstance(table, Dense) and self.linears[-1].formats == (table.format,):
                return self.ops.embedding_weight(table, tied_to=linear, scale=scale), linear
        else:
            linear = self._stack([read_weight(head, vocab, hidden)], "lm_head")
        self.embedding_bytes += table.nbytes if isinstance(table, Dense) else 4 * vocab * hidden
        return self.ops.embedding_weight(table, scale=scale), linear

    def host_embedding(self, scope: Scope, vocab: int, width: int, scale: float) -> Any:
        """A table that stays in host memory: a row is read per token, and it may be larger than the model."""
        return self.ops.host_embedding_weight(read_weight(scope, vocab, width), scale)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights held: linears, norms, and the token table where it is not the head."""
        return sum(one.linear.nbytes for one in self.linears) + self.norm_bytes + self.embedding_bytes

    def step_bytes(self, tokens: int = 1, experts: float | None = None) -> int:
        """Bytes of weights that a decode step of so many sequences reads; of the token table it reads a row for each.

        experts: the share of a layer's experts that are taken; None: as Loaded.read expects.
        """
        read = sum(one.linear.nbytes * (one.read(tokens) if experts is None or not one.experts else experts)
                   for one in self.linears)
        return round(read) + self.norm_bytes

    def token_flops(self, *, head: bool) -> float:
        """Floating-point operations of one token in all linears, with or without the head: two for each weight."""
        return sum(2 * math.prod(one.shape) * one.read() for one in self.linears if head or not one.is_head)

    def report(self) -> list[str]:
        """One line per kind of weight: how many, how many bytes, which kernel runs it, and why that one."""
        kinds: dict[tuple[str, str, str], list[Loaded]] = {}
        for loaded in self.linears:
            formats = "+".join(dict.fromkeys(loaded.formats))
            kinds.setdefault((formats, loaded.linear.kernel, loaded.linear.reason), []).append(loaded)
        lines = [f"{sum(one.stored for one in group)} {formats} linears, "
                 f"{sum(one.linear.nbytes for one in group) / 1e6:.1f} MB: {kernel} ({reason})"
                 for (formats, kernel, reason), group in kinds.items()]
        for scaled, count in self.fp8_layers.items():
            lines.append(f"FP8 K/V of {count} layers, " + ("with the checkpoint's scales" if scaled else
                         "with scale 1.0, for the checkpoint has none: what exceeds 448 saturates"))
        return lines


def different_layers(linears: Sequence[Loaded], memory: Sequence[AttentionShape | MambaShape | None]) -> list[int]:
    """The first of each kind of layers: those of one kind remember alike, and their linears have the same names,
    formats and sizes."""
    parts: list[list[tuple]] = [[] for _ in memory]
    for one in linears:
        if place := re.search(r"\blayers\.(\d+)\.(.*)", one.names[0]):
            parts[int(place[1])].append((place[2], one.formats, one.shape, one.linear.nbytes))
    kinds: dict[tuple, int] = {}
    for layer, (shape, linear) in enumerate(zip(memory, parts)):
        if isinstance(shape, AttentionShape):
            shape = replace(shape, shares=shape.shares and 0, fp8_scales=shape.fp8_scales and (1.0, 1.0))
        kinds.setdefault((shape, *linear), layer)
    return list(kinds.values())


def _transposed(parts: Iterable[Sequence[Weight]]) -> list[list[Weight]]:
    """Of each part its pieces, to the parts of each piece."""
    return [list(piece) for piece in zip(*parts)]


def _formats(weights: list[Weight], taken: list[Weight]) -> tuple[str, ...]:
    return tuple(new.format if new.format == old.format else f"{new.format} (of {old.format})"
                 for old, new in zip(weights, taken))
