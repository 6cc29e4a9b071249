"""The loop: plan a step, run the model, draw tokens; decode runs on the device by itself while the host reads behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from fp4rt.batch import Batch
from fp4rt.cache import Cache
from fp4rt.engine.scheduler import Scheduler
from fp4rt.engine.sequence import Sequence
from fp4rt.errors import Fp4rtError
from fp4rt.layers import Decoder
from fp4rt.ops import Ops

LEASE = 256       # decode steps that run on pages and settings put on the device once
LOGITS_ROWS = 64  # rows of a prompt whose logits are computed in one step


def make_batch(step: list[tuple[Sequence, int]], rows: list[int], size: int | None = None,
               table_width: int | None = None) -> Batch:
    """The Batch of a planned step; padded to `size` one-token sequences on page 0 and to the page tables' width."""
    size = size or len(step)
    width = table_width or max(len(pages) for sequence, _ in step for pages in sequence.held.pages)
    pages = np.zeros((len(step[0][0].held.pages), size, width), np.int32)
    tokens, positions, lengths = [], [], []
    starts = [0]
    for s, (sequence, count) in enumerate(step):
        first = sequence.remembered
        tokens += sequence.ids[first:first + count]
        positions += range(first, first + count)
        lengths.append(first + count)
        starts.append(starts[-1] + count)
        for group, held in enumerate(sequence.held.pages):
            pages[group, s, :len(held)] = held
    padded = size - len(step)
    starts += range(starts[-1] + 1, starts[-1] + padded + 1)
    return Batch(*(np.array(values, np.int32) for values in (
        tokens + [0] * padded, positions + [0] * padded, starts, lengths + [1] * padded)), pages,
        np.array([sequence.held.slot for sequence, _ in step] + [0] * padded, np.int32),
        np.array(rows + list(range(len(tokens), len(tokens) + padded)), np.int32))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Decode:
    """A recorded decode step for up to `size` sequences of up to `width` pages: it feeds itself its own tokens."""

    def __init__(self, engine: Engine, sequences: list[Sequence], size: int, width: int):
        ops, self.size, self.width = engine.ops, size, width
        self.engine = engine
        self.batch = self.sampler = None
        self.refill(sequences)

        def step() -> Any:
            ids = ops.sample(engine.model(self.batch, engine.cache.layers), self.sampler)
            ops.advance(self.batch, ids)
            return ids

        self.replay = ops.record(step)

    def refill(self, sequences: list[Sequence]) -> None:
        ops, padding = self.engine.ops, self.size - len(sequences)
        batch = make_batch([(s, 1) for s in sequences], list(range(len(sequences))), self.size, self.width)
        self.batch = ops.batch(batch, into=self.batch)
        rows = [s.sampler_row() for s in sequences]
        self.sampler = ops.sampler(rows + rows[:1] * padding, self.engine.model.config.vocab_size, into=self.sampler)


class Engine:
    """Runs sequences through a model. Not thread-safe by itself: LLM holds the lock."""

    def __init__(self, ops: Ops, model: Decoder, cache: Cache, max_sequences: int):
        self.ops, self.model, self.cache = ops, model, cache
        self.scheduler = Scheduler(cache, max_sequences, ops.step_tokens)
        self._decodes: dict[tuple[int, int, bool], Decode] = {}

    def run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """(sequence, token) as tokens are drawn, until all have finished. Setting a sequence's finish_reason ends it.

        However the caller leaves the loop, these sequences are forgotten and their pages free.
        """
        for sequence in sequences:
            self.scheduler.add(sequence)
        try:
            while step := self.scheduler.plan():
                if all(sequence.decoding for sequence, _ in step) and not self.scheduler.waiting:
                    yield from self._decode([sequence for sequence, _ in step])
                else:
                    yield from self._mixed(step)
        finally:
            self.ops.synchronize()
            for sequence in sequences:
                self.scheduler.remove(sequence)

    def _mixed(self, step: list[tuple[Sequence, int]]) -> Iterator[tuple[Sequence, int]]:
        """One step with at least one piece of a prompt in it."""
        ends = np.cumsum([count for _, count in step])
        drawing = [(sequence, int(end) - 1) for (sequence, count), end in zip(step, ends)
                   if sequence.remembered + count == len(sequence.ids)]
        batch = self.ops.batch(make_batch(step, [row for _, row in drawing]))
        logits = self.model(batch, self.cache.layers)
        for sequence, count in step:
            sequence.remembered += count
        if not drawing:
            return
        sampler = self.ops.sampler([sequence.sampler_row() for sequence, _ in drawing], self.model.config.vocab_size)
        ids = self.ops.fetch(self.ops.sample(logits, sampler)).result()
        for (sequence, _), token in zip(drawing, ids.tolist()):
            yield self._accept(sequence, token)

    def _decode(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """Steps of one token for each sequence, until one of them ends or its pages run out."""
        steps = min(LEASE, max(sequence.remaining for sequence in sequences))
        lease = [(sequence, min(len(sequence.ids) + steps, sequence.limit)) for sequence in sequences]
        missing = [self.cache.missing(s.held, tokens) for s, tokens in lease]
        if not self.cache.fits([sum(group) for group in zip(*missing)]):
            steps, lease = 1, [(sequence, len(sequence.ids)) for sequence in sequences]
        for sequence, tokens in lease:
            self.scheduler.grow(sequence, tokens)
        steps = min(steps, min(s.remaining for s in sequences))
        decode = self._recorded(sequences)
        pending: deque = deque()
        launched = 0
        while pending or launched < steps:
            while launched < steps and len(pending) <= self.ops.lookahead:
                pending.append(self.ops.fetch(decode.replay()))
                launched += 1
            ids = pending.popleft().result().tolist()
            for sequence, token in zip(sequences, ids):
                if sequence.finish_reason is None:
                    sequence.remembered += 1
                    yield self._accept(sequence, token)
            if any(sequence.finish_reason for sequence in sequences):
                steps = launched  # what is already on its way is kept, nothing more is asked for

    def _recorded(self, sequences: list[Sequence]) -> Decode:
        """The recorded step for this many sequences and pages, filled with these."""
        exact = self.ops.lookahead == 0  # nothing is captured: padding would only cost
        size = len(sequences) if exact else _power_of_two(len(sequences))
        pages = max(len(pages) for sequence in sequences for pages in sequence.held.pages)
        width = pages if exact else _power_of_two(max(pages, 16))
        greedy = all(s.sampling.temperature == 0 for s in sequences)
        key = (size, width, greedy)
        if exact:
            return Decode(self, sequences, size, width)
        if key not in self._decodes:
            self._decodes[key] = Decode(self, sequences, size, width)
        else:
            self._decodes[key].refill(sequences)
        return self._decodes[key]

    def _accept(self, sequence: Sequence, token: int) -> tuple[Sequence, int]:
        if token < 0:
            raise self._not_finite(sequence)
        sequence.append(token)
        return sequence, token

    def _not_finite(self, sequence: Sequence) -> Fp4rtError:
        """Run the sequence again, layer by layer, to say which one first left the numbers."""
        position = sequence.remembered - 1
        self.cache.give_back(sequence.held)
        self.cache.take_slot(sequence.held)
        sequence.remembered = 0
        while sequence.remembered <= position:
            count = min(self.ops.step_tokens, position + 1 - sequence.remembered)
            self.cache.trim(sequence.held, sequence.remembered)
            self.cache.grow(sequence.held, sequence.remembered + count)
            batch = self.ops.batch(make_batch([(sequence, count)], [count - 1]))
            for name, h in self.model.residuals(batch, self.cache.layers):
                if not self.ops.is_finite(h):
                    return Fp4rtError("checkpoint", f"{name}: its output holds NaN or infinity for tokens "
                                      f"{sequence.remembered} to {sequence.remembered + count - 1}; the weights of this "
                                      "layer are damaged, or their scales are")
            sequence.remembered += count
        return Fp4rtError("checkpoint", f"lm_head: the logits at position {position} hold NaN or infinity though every "
                          "layer's output is finite; the head's weights are damaged, or their scales are")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Float32 [len(ids), vocab_size]: every position's logits, in chunks that bound the memory they take."""
        if self.scheduler.busy:
            raise Fp4rtError("request", "logits cannot be asked for while sequences are being generated")
        sequence = Sequence(list(ids), None, 0, frozenset(), len(ids))
        self.cache.take_slot(sequence.held)
        chunk = min(self.ops.step_tokens, LOGITS_ROWS)
        logits = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        try:
            while sequence.remembered < len(ids):
                count = min(chunk, len(ids) - sequence.remembered)
                self.cache.trim(sequence.held, sequence.remembered)
                if not self.cache.grow(sequence.held, sequence.remembered + count):
                    raise Fp4rtError("memory", f"{len(ids)} tokens do not fit the K/V that is free now")
                batch = self.ops.batch(make_batch([(sequence, count)], list(range(count))))
                part = self.ops.fetch(self.model(batch, self.cache.layers)).result()
                logits[sequence.remembered:sequence.remembered + count] = part
                sequence.remembered += count
                if not np.isfinite(part).all():
                    raise self._not_finite(sequence)
        finally:
            self.cache.give_back(sequence.held)
        return logits
