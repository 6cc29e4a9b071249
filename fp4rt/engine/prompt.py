"""Prompts that are looked at and not continued: every position's logits, and where a model's numbers end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fp4rt.engine.recorded import make_batch
from fp4rt.engine.scheduler import LOGITS_ROWS
from fp4rt.engine.sequence import Sequence, TokenLogprobs
from fp4rt.errors import Fp4rtError
from fp4rt.ops import Pending
from fp4rt.sampling import Sampling

if TYPE_CHECKING:
    from fp4rt.engine.engine import Engine


def logits(engine: Engine, ids: list[int]) -> np.ndarray:
    """Float32 [len(ids), vocab_size]: every position's logits."""
    found = np.empty((len(ids), engine.model.config.vocab_size), np.float32)
    with _held(engine, ids) as prompt:
        for first, part in _chunks(engine, prompt):
            rows = engine.ops.fetch(part).result()
            if not np.isfinite(rows).all():
                raise not_finite(engine, prompt)
            found[first:first + len(rows)] = rows
    return found


def score(engine: Engine, sequence: Sequence, top: int) -> Iterator[None]:
    """Fill sequence.prompt_logprobs, for its prompt's tokens but the first, and then submit it; a chunk at each step."""
    unread: deque[tuple[list[int], Pending]] = deque()

    def read() -> None:
        following, pending = unread.popleft()
        told = pending.result()
        if np.isnan(told[:, 0]).any():
            raise not_finite(engine, prompt)
        sequence.prompt_logprobs += [TokenLogprobs.read(token, row, top) for token, row in zip(following, told)]

    try:
        with _held(engine, sequence.ids) as prompt:
            for first, part in _chunks(engine, prompt):
                if sequence.finish_reason:
                    break
                if part is not None:
                    following = prompt.ids[first + 1:first + 1 + len(part)]
                    padded = np.array(following + [0] * (len(part) - len(following)), np.int32)
                    unread.append((following, engine.ops.fetch(engine.ops.logprobs(part, padded, top))))
                del part  # its memory is for the steps that come between
                if len(unread) > 1:
                    read()
                yield
            while unread and not sequence.finish_reason:
                read()
    except Fp4rtError as error:
        sequence.fail(error)
    engine.submit(sequence)


def not_finite(engine: Engine, sequence: Sequence) -> Fp4rtError:
    """Run the sequence again, layer by layer, to say which one first left the numbers, if there is room for that."""
    position = len(sequence.ids) - 1
    sequence.ahead = 0
    engine.cache.give_back(sequence.held)
    engine.cache.take_slot(sequence.held)
    sequence.remembered = 0
    while sequence.remembered <= position:
        count = min(engine.scheduler.step_tokens, position + 1 - sequence.remembered)
        engine.cache.trim(sequence.held, sequence.remembered)
        if not engine.cache.grow(sequence.held, sequence.remembered + count):  # others hold what it shared with them
            return Fp4rtError("checkpoint", f"the logits at position {position} hold NaN or infinity; the weights of a "
                              "layer or the head are damaged, or their scales are")
        batch = engine.ops.batch(make_batch([(sequence, count)], [count - 1]))
        for name, h in engine.model.residuals(batch, engine.cache.layers):
            if not engine.ops.is_finite(h):
                last = sequence.remembered + count - 1
                return Fp4rtError("checkpoint", f"{name}: its output holds NaN or infinity for tokens "
                                  f"{sequence.remembered} to {last}; the weights of this layer are damaged, or "
                                  "their scales are")
        sequence.remembered += count
    return Fp4rtError("checkpoint", f"lm_head: the logits at position {position} hold NaN or infinity though every "
                      "layer's output is finite; the head's weights are damaged, or their scales are")


@contextmanager
def _held(engine: Engine, ids: list[int]) -> Iterator[Sequence]:
    """A sequence whose prompt is looked at and not continued; what it holds is given back."""
    prompt = Sequence(list(ids), Sampling(), 0, frozenset(), len(ids))
    engine.scheduler.scored = prompt
    try:
        yield prompt
    finally:
        engine.scheduler.scored = None
        engine.cache.give_back(prompt.held)


def _chunks(engine: Engine, prompt: Sequence) -> Iterator[tuple[int, Any]]:
    """(first position, logits of a chunk from there), the logits None where it has to wait for room."""
    total, chunk = len(prompt.ids), min(engine.scheduler.step_tokens, LOGITS_ROWS)
    while not engine.cache.has_slot:
        yield 0, None
    engine.cache.take_slot(prompt.held)
    while (first := prompt.remembered) < total:
        count = min(chunk, total - first)
        engine.cache.trim(prompt.held, first)
        while not engine.cache.grow(prompt.held, first + count):
            if not engine.scheduler.running:
                raise Fp4rtError("memory", f"{total} tokens do not fit the K/V cache of {engine.cache.tokens} tokens")
            yield first, None
        batch = engine.ops.batch(make_batch([(prompt, count)], list(range(count))))
        prompt.remembered += count
        yield first, engine.model(batch, engine.cache.layers)
