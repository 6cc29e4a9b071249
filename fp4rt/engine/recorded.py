"""Steps as batches, and steps that are recorded: what they have room for, and how they are filled and run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fp4rt.batch import Batch
from fp4rt.engine.scheduler import Step
from fp4rt.engine.sequence import Sequence

if TYPE_CHECKING:
    from fp4rt.engine.engine import Engine


def make_batch(step: Step, rows: list[int] | None = None, size: int | None = None, table_width: int | None = None,
               tokens: int | None = None, drawn: Mapping[int, int] | None = None) -> Batch:
    """The Batch of a planned step, padded to so many sequences on page 0, pages in a table, and tokens in all.

    rows: whose logits are wanted; None for the last token of each sequence. drawn: by a sequence's id(), the row of the
    step before in which it drew the token that the host does not know yet.
    """
    ids, positions, lengths, starts = [], [], [], [0]
    width = table_width or max(len(pages) for sequence, _ in step for pages in sequence.held.pages)
    pages = np.zeros((len(step[0][0].held.pages), size or len(step), width), np.int32)
    for s, (sequence, count) in enumerate(step):
        first = sequence.remembered
        ids += ([-1 - drawn[id(sequence)]] if sequence.ahead
                else (sequence.ids[first:first + count] + sequence.drafts)[:count])
        positions += range(first, first + count)
        lengths.append(first + count)
        starts.append(starts[-1] + count)
        for group, held in enumerate(sequence.held.pages):
            pages[group, s, :len(held)] = held
    padded = (size or len(step)) - len(step)
    for left in reversed(range(padded)):
        count = 1 if left or tokens is None else tokens - starts[-1]  # the last one takes all that are left
        ids += [0] * count
        positions += range(count)
        lengths.append(count)
        starts.append(starts[-1] + count)
    slots = [sequence.held.slot for sequence, _ in step] + [0] * padded
    rows = [end - 1 for end in starts[1:]] if rows is None else rows
    ids, positions, starts, lengths, slots, rows = (np.array(values, np.int32) for values in (
        ids, positions, starts, lengths, slots, rows))
    return Batch(ids, positions, starts, lengths, pages, slots, rows)


class Sizes(NamedTuple):
    """What a recorded step has room for: sequences, pages of each, tokens in all; told: with log-probabilities;
    guessed: it draws after every token."""

    sequences: int
    pages: int
    tokens: int
    told: bool
    guessed: bool = False


def room_for(count: int) -> int:
    """How many sequences a recorded step has room for in which `count` decode: as many up to 8, then up to a quarter
    more (numbers of three significant bits), because it takes the time of all that it has room for."""
    grain = max(1, (1 << (count - 1).bit_length()) // 8)
    return -(-count // grain) * grain


def decode_sizes(most: int) -> list[int]:
    """The rooms of all recorded steps that decode, where at most so many sequences run."""
    return sorted({min(room_for(count), most) for count in range(1, most + 1)})


class Recorded:
    """A recorded step that draws after each sequence's last token, or every one; one that decodes feeds itself.

    `replay` launches it once more: the drawn ids and, if `told`, their log-probabilities as Ops.logprobs gives them.
    """

    def __init__(self, engine: Engine, sizes: Sizes, step: Step, drawing: list[Sequence | None]):
        self._engine, self._sizes, self._batch = engine, sizes, None
        self.refill(step, drawing)
        ops = engine.ops

        def run() -> tuple[Any, Any]:
            logits = engine.model(self._batch, engine.cache.layers)
            ids = ops.sample(logits, engine.sampler)
            if sizes.tokens == sizes.sequences:
                ops.advance(self._batch, ids)
            return ids, ops.logprobs(logits, ids, engine.most_logprobs) if sizes.told else None

        self.replay = ops.record(run)

    def refill(self, step: Step, drawing: list[Sequence | None]) -> None:
        rows = list(range(self._sizes.tokens)) if self._sizes.guessed else None
        self._batch = self._engine.put(step, drawing, rows, self._sizes[:3], self._batch)
