"""The loop: plan a step, run the model, draw tokens; decode runs on the device alone while the host reads behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.cache import Cache
from fp4rt.engine.scheduler import LOGITS_ROWS, Scheduler, Step
from fp4rt.engine.sequence import Sequence, TokenLogprobs
from fp4rt.errors import Fp4rtError
from fp4rt.layers import Decoder
from fp4rt.ops import Ops, SamplerRow

LEASE = 256       # decode steps that run on pages and settings put on the device once
UNGUESSED = 4     # of them where nothing could be guessed, before the host looks again: it costs the device a wait

Event = tuple[Sequence, int]


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
        tokens += (sequence.ids[first:] + sequence.drafts)[:count]
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

    def __init__(self, engine: Engine, sequences: list[Sequence], settings: list[SamplerRow], size: int, width: int):
        ops, self.size, self.width = engine.ops, size, width
        self.engine = engine
        self.batch = self.sampler = None
        self.refill(sequences, settings)

        def step() -> Any:
            ids = ops.sample(engine.model(self.batch, engine.cache.layers), self.sampler)
            ops.advance(self.batch, ids)
            return ids

        self.replay = ops.record(step)

    def refill(self, sequences: list[Sequence], settings: list[SamplerRow]) -> None:
        ops, padding = self.engine.ops, self.size - len(sequences)
        batch = make_batch([(s, 1) for s in sequences], list(range(len(sequences))), self.size, self.width)
        self.batch = ops.batch(batch, into=self.batch)
        vocab_size = self.engine.model.config.vocab_size
        self.sampler = ops.sampler(settings + settings[:1] * padding, vocab_size, into=self.sampler)


class Engine:
    """Runs sequences through a model. One thread drives it; any may submit sequences, and end them, at any moment."""

    def __init__(self, ops: Ops, model: Decoder, cache: Cache, max_sequences: int, step_tokens: int | None = None,
                 speculate: int = 0):
        self.ops, self.model, self.cache = ops, model, cache
        self.scheduler = Scheduler(cache, max_sequences, step_tokens or ops.step_tokens, speculate)
        self._arrivals: deque[Sequence] = deque()
        self._scores: deque[Iterator[None]] = deque()  # begun or to be begun, a chunk of the first between two steps
        self._decodes: dict[tuple[int, int, bool], Decode] = {}

    @property
    def busy(self) -> bool:
        return bool(self._arrivals or self._scores or self.scheduler.busy)

    def submit(self, sequence: Sequence) -> None:
        """Let a sequence take part from the next step on (any thread). Setting its finish_reason ends it."""
        self._arrivals.append(sequence)

    def run(self, sequences: list[Sequence]) -> Iterator[Event]:
        """Events until these sequences have finished, where nobody else submits any.

        However the caller leaves the loop, they are forgotten and their pages free.
        """
        for sequence in sequences:
            self.submit(sequence)
        try:
            yield from self.events()
        finally:
            self.forget(sequences)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Take sequences out wherever they are, when no step is under way any more, and free their pages."""
        self.ops.synchronize()
        for sequence in sequences:
            if sequence in self._arrivals:
                self._arrivals.remove(sequence)
            self.scheduler.remove(sequence)

    def events(self) -> Iterator[Event]:
        """(sequence, token) as tokens are drawn, until no sequence is left; -1 for one that failed, and says why."""
        behind: deque = deque()  # steps that no token came of: the host runs one ahead of the device, not all
        while True:
            while self._arrivals:
                self.scheduler.add(self._arrivals.popleft())
            if self._scores and next(self._scores[0], self) is self:
                self._scores.popleft()
            step = self.scheduler.plan()
            if not step:
                if not self.busy:
                    return
            elif all(s.decoding and s.top_logprobs is None and not s.drafts for s, _ in step):
                yield from self._decode([sequence for sequence, _ in step])
            else:
                yield from self._mixed(step, behind)
            for sequence, _ in step:
                if sequence.error is None:
                    self.cache.publish(sequence.held, sequence.ids, sequence.remembered, sequence.cache_salt)

    def _mixed(self, step: Step, behind: deque) -> Iterator[Event]:
        """One step with a piece of a prompt in it, or in which the host has a part.

        After a sequence's drafts a token is drawn, too, and after each of them: as long as what is drawn is what was
        drafted, the next one was drawn where it should be. What was remembered of the others is written again.
        """
        drawing: list[tuple[Sequence, int]] = []  # each drawn token's sequence, and the drafts before it
        rows: list[int] = []
        for (sequence, count), end in zip(step, np.cumsum([count for _, count in step]).tolist()):
            drafts = len(sequence.drafts)
            if sequence.remembered + count == len(sequence.ids) + drafts:
                drawing += [(sequence, before) for before in range(drafts + 1)]
                rows += range(end - drafts - 1, end)
        batch = self.ops.batch(make_batch(step, rows))
        logits = self.model(batch, self.cache.layers)
        for sequence, count in step:
            sequence.remembered += count
        if not drawing:
            behind.append(self.ops.fetch(logits))
            if len(behind) > 1:
                behind.popleft().result()
            return
        behind.clear()
        sampler = self.ops.sampler([self._sampler_row(*one) for one in drawing], self.model.config.vocab_size)
        ids = self.ops.sample(logits, sampler)
        tops = [sequence.top_logprobs for sequence, _ in drawing if sequence.top_logprobs is not None]
        told = self.ops.fetch(self.ops.logprobs(logits, ids, max(tops))).result() if tops else None
        refused: set[int] = set()  # sequences of whose drafts one was not what was drawn
        for row, ((sequence, before), token) in enumerate(zip(drawing, self.ops.fetch(ids).result().tolist())):
            if sequence.error is not None:
                yield sequence, -1
            elif sequence.finish_reason is None and id(sequence) not in refused:
                if sequence.top_logprobs is not None and token >= 0:
                    sequence.logprobs.append(TokenLogprobs.read(token, told[row], sequence.top_logprobs))
                if before < len(sequence.drafts) and token == sequence.drafts[before]:
                    self.scheduler.accepted += 1
                else:
                    refused.add(id(sequence))
                sequence.remembered = len(sequence.ids)
                yield self._accept(sequence, token)
        for sequence, _ in drawing:
            sequence.drafts, sequence.remembered = [], min(sequence.remembered, len(sequence.ids))

    def _decode(self, sequences: list[Sequence]) -> Iterator[Event]:
        """Steps of one token for each sequence, until one of them ends, another arrives, or pages run out."""
        steps = LEASE if not self.scheduler.waiting else PAGE_TOKENS  # whoever waits needs pages, too
        if any(sequence.grammar for sequence in sequences):
            steps = 1
        elif self.scheduler.speculate:
            steps = UNGUESSED
        steps = min(steps, max(sequence.remaining for sequence in sequences))
        lease = [(sequence, min(len(sequence.ids) + steps, sequence.limit)) for sequence in sequences]
        missing = [self.cache.missing(s.held, tokens) for s, tokens in lease]
        if not self.cache.fits([sum(group) for group in zip(*missing)]):
            steps, lease = 1, [(sequence, len(sequence.ids)) for sequence in sequences]
        for sequence, tokens in lease:
            self.scheduler.grow(sequence, tokens)
        steps = min(steps, min(s.remaining for s in sequences))
        settings = [self._sampler_row(sequence, 0) for sequence in sequences]
        for sequence in sequences:
            if sequence.error is not None:
                yield sequence, -1
        decode = self._recorded(sequences, settings)
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
            if self._arrivals or self._scores or any(sequence.finish_reason for sequence in sequences):
                steps = launched  # what is already on its way is kept, nothing more is asked for

    def _recorded(self, sequences: list[Sequence], settings: list[SamplerRow]) -> Decode:
        """The recorded step for this many sequences and pages, filled with these."""
        exact = self.ops.lookahead == 0  # nothing is captured: padding would only cost
        size = len(sequences) if exact else _power_of_two(len(sequences))
        pages = max(len(pages) for sequence in sequences for pages in sequence.held.pages)
        width = pages if exact else _power_of_two(max(pages, 16))
        greedy = all(s.sampling.temperature == 0 for s in sequences)
        key = (size, width, greedy)
        if exact:
            return Decode(self, sequences, settings, size, width)
        if key not in self._decodes:
            self._decodes[key] = Decode(self, sequences, settings, size, width)
        else:
            self._decodes[key].refill(sequences, settings)
        return self._decodes[key]

    def _accept(self, sequence: Sequence, token: int) -> Event:
        if token < 0:
            sequence.fail(self._not_finite(sequence))
            return sequence, -1
        try:
            sequence.append(token)
        except Exception as error:  # a grammar's own: it ends its own sequence only
            sequence.fail(Fp4rtError("request", f"the grammar failed after token {token}: {error}"))
            return sequence, -1
        return sequence, token

    def _sampler_row(self, sequence: Sequence, drafts: int) -> SamplerRow:
        """How a sequence's token after so many drafts is drawn; it fails where its grammar has nothing to allow."""
        row = sequence.sampler_row(drafts)
        if sequence.grammar is None:
            return row
        mask = np.zeros(-(-self.model.config.vocab_size // 32), np.uint32)
        try:
            sequence.grammar.mask(mask)
            if mask.any():
                return replace(row, mask=mask)
            sequence.fail(Fp4rtError("request", "the grammar allows no token here"))
        except Exception as error:
            sequence.fail(Fp4rtError("request", f"the grammar failed: {error}"))
        return row

    def _not_finite(self, sequence: Sequence) -> Fp4rtError:
        """Run the sequence again, layer by layer, to say which one first left the numbers."""
        position = sequence.remembered - 1
        self.cache.give_back(sequence.held)
        self.cache.take_slot(sequence.held)
        sequence.remembered = 0
        while sequence.remembered <= position:
            count = min(self.scheduler.step_tokens, position + 1 - sequence.remembered)
            self.cache.trim(sequence.held, sequence.remembered)
            self.cache.grow(sequence.held, sequence.remembered + count)
            batch = self.ops.batch(make_batch([(sequence, count)], [count - 1]))
            for name, h in self.model.residuals(batch, self.cache.layers):
                if not self.ops.is_finite(h):
                    last = sequence.remembered + count - 1
                    return Fp4rtError("checkpoint", f"{name}: its output holds NaN or infinity for tokens "
                                      f"{sequence.remembered} to {last}; the weights of this layer are damaged, or "
                                      "their scales are")
            sequence.remembered += count
        return Fp4rtError("checkpoint", f"lm_head: the logits at position {position} hold NaN or infinity though every "
                          "layer's output is finite; the head's weights are damaged, or their scales are")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Float32 [len(ids), vocab_size]: every position's logits."""
        if self.busy:
            raise Fp4rtError("request", "logits cannot be asked for while sequences are being generated")
        logits = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        for first, part in self._prompt_logits(ids):
            rows = self.ops.fetch(part).result()
            logits[first:first + len(rows)] = rows
        return logits

    def score(self, sequence: Sequence, top: int) -> None:
        """Fill sequence.prompt_logprobs, for its prompt's tokens but the first, and then submit it (any thread)."""
        def chunks() -> Iterator[None]:
            ids = sequence.ids
            try:
                for first, part in self._prompt_logits(ids):
                    if sequence.finish_reason:
                        break
                    if part is not None:
                        following = ids[first + 1:first + 1 + len(part)]
                        padded = np.array(following + [0] * (len(part) - len(following)), np.int32)
                        told = self.ops.fetch(self.ops.logprobs(part, padded, top))
                        sequence.prompt_logprobs += [TokenLogprobs.read(token, row, top)
                                                     for token, row in zip(following, told.result())]
                    yield
            except Fp4rtError as error:
                sequence.fail(error)
            self.submit(sequence)

        self._scores.append(chunks())

    def _prompt_logits(self, ids: list[int]) -> Iterator[tuple[int, Any]]:
        """(first position, logits of a chunk from there), the logits None where it has to wait for room."""
        sequence = Sequence(list(ids), None, 0, frozenset(), len(ids))
        chunk = min(self.scheduler.step_tokens, LOGITS_ROWS)
        try:
            while not self.cache.has_slot:
                yield 0, None
            self.cache.take_slot(sequence.held)
            while sequence.remembered < len(ids):
                count = min(chunk, len(ids) - sequence.remembered)
                self.cache.trim(sequence.held, sequence.remembered)
                while not self.cache.grow(sequence.held, sequence.remembered + count):
                    if not self.scheduler.running:
                        raise Fp4rtError("memory", f"{len(ids)} tokens do not fit the K/V cache of "
                                                   f"{self.cache.tokens} tokens")
                    yield sequence.remembered, None
                batch = self.ops.batch(make_batch([(sequence, count)], list(range(count))))
                part = self.model(batch, self.cache.layers)
                finite = self.ops.is_finite(part)
                if finite:
                    yield sequence.remembered, part
                sequence.remembered += count
                if not finite:
                    raise self._not_finite(sequence)
        finally:
            self.cache.give_back(sequence.held)
