"""Steps of all sizes, for a backend to get ready before anybody waits for one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fp4rt.batch import PAGE_TOKENS
from fp4rt.engine.recorded import decode_sizes, make_batch
from fp4rt.engine.scheduler import most_rows
from fp4rt.engine.sequence import Sequence as Tokens

if TYPE_CHECKING:
    from fp4rt.engine.engine import Engine

GRAIN = 16     # tokens: kernels are chosen by how many blocks there are of so many, or of a multiple
COARSE = 1024  # tokens from which on four times as many seldom make a difference
WIDEST = 128   # pages of a sequence: longer ones run the same kernels


def rehearse(engine: Engine, nobody: Tokens, layers: Sequence[int]) -> None:
    """Let the backend get ready for a step of every size that runs other kernels than the others.

    nobody: a sequence on the pages that nobody owns. layers: those of the model that differ.
    """
    def steps() -> None:
        ops, model = engine.ops, replace(engine.model, layers=[engine.model.layers[i] for i in layers])
        pages = [engine.cache.layers[i] for i in layers]
        for sequences, width, tokens, rows in sizes(engine):
            logits = model(ops.batch(make_batch([(nobody, 1)], rows, sequences, width, tokens)), pages)
            ops.logprobs(logits, ops.sample(logits, engine.sampler), 1)

    engine.ops.rehearse(steps)


def sizes(engine: Engine) -> Iterator[tuple[int, int, int, list[int] | None]]:
    """(sequences, pages of each, tokens, rows with logits or None for each sequence's last)."""
    if not engine.ops.lookahead:  # nothing depends on sizes but whether there are few tokens
        yield 1, 1, 1, None
        yield 2, 1, GRAIN, None
        return
    most, rows = engine.scheduler.max_sequences, most_rows(engine.scheduler.max_sequences, engine.scheduler.speculate)
    longest = engine.scheduler.step_tokens
    for tokens in (*range(GRAIN, min(longest, COARSE) + GRAIN, GRAIN), *range(COARSE, longest + GRAIN, 4 * GRAIN)):
        yield 2, -(-tokens // PAGE_TOKENS), tokens, list(range(min(tokens, rows)))
    for count in decode_sizes(most):
        for power in range(min(WIDEST, engine.cache.tokens // PAGE_TOKENS).bit_length()):
            yield count, 1 << power, count, None
