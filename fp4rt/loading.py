"""The hand between a checkpoint and a backend: reads a layer's weights, hands them over, remembers what there was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fp4rt.checkpoint import Scope
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Weight, read_vector, read_weight
from fp4rt.ops import Linear, Ops


@dataclass(frozen=True)
class Loaded:
    """One linear as loaded: its parts' names and formats, bytes in the file, and the backend's handle."""

    names: tuple[str, ...]
    formats: tuple[str, ...]
    shape: tuple[int, int]  # rows of all parts, columns
    file_bytes: int
    linear: Linear


@dataclass
class Loader:
    """Builds handles for model blocks. `linears` is the inventory, in the order the model asked."""

    ops: Ops
    linears: list[Loaded] = field(default_factory=list)
    norm_bytes: int = 0
    embedding_bytes: int = 0  # of a token table that is not the head as well

    def linear(self, scope: Scope, parts: dict[str, int], in_features: int, *, bias: bool = False,
               gated: bool = False) -> Linear:
        """The linears of `scope` with these names and row counts, stacked in this order."""
        return self.stack([read_weight(scope.at(name), rows, in_features, bias=bias) for name, rows in parts.items()],
                          gated=gated)

    def stack(self, weights: list[Weight], *, gated: bool = False) -> Linear:
        linear = self.ops.linear_weight(weights, gated=gated)
        self.linears.append(Loaded(tuple(w.name for w in weights), tuple(w.format for w in weights),
                                   (sum(w.shape[0] for w in weights), weights[0].shape[1]),
                                   sum(w.nbytes for w in weights), linear))
        return linear

    def norm(self, scope: Scope, name: str, size: int, eps: float) -> Any:
        self.norm_bytes += 4 * size
        return self.ops.norm_weight(read_vector(scope, f"{name}.weight", size), eps)

    def embedding_and_head(self, embedding: Scope, head: Scope | None, vocab: int, hidden: int) -> tuple[Any, Linear]:
        """The token table and the head; without a `head` the two are one tensor and share its memory."""
        table = read_weight(embedding, vocab, hidden)
        if table.format not in ("BF16", "F16", "F32"):
            raise Fp4rtError("checkpoint", f"{table.name}: an embedding in {table.format} is not supported; use an "
                                           "export that keeps embeddings in BF16")
        if head is None:
            linear = self.stack([table])
            return self.ops.embedding_weight(table, tied_to=linear), linear
        self.embedding_bytes += table.nbytes
        return self.ops.embedding_weight(table), self.stack([read_weight(head, vocab, hidden)])

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that every decode step reads; of the token table it reads single rows."""
        return sum(one.linear.nbytes for one in self.linears) + self.norm_bytes

    def report(self) -> list[str]:
        """One line per kind of weight: how many, how many bytes, which kernel runs it, and why that one."""
        kinds: dict[tuple[str, str, str], list[Loaded]] = {}
        for loaded in self.linears:
            formats = "+".join(dict.fromkeys(loaded.formats))
            kinds.setdefault((formats, loaded.linear.kernel, loaded.linear.reason), []).append(loaded)
        return [f"{sum(len(one.names) for one in group)} {formats} linears, "
                f"{sum(one.linear.nbytes for one in group) / 1e6:.1f} MB: {kernel} ({reason})"
                for (formats, kernel, reason), group in kinds.items()]
