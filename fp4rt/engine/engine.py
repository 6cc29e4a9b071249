"""The loop: plan a step, launch it, and read what the steps before it drew while the device goes on."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS
from fp4rt.cache import Cache
from fp4rt.engine import prompt
from fp4rt.engine.recorded import Recorded, Sizes, decode_sizes, make_batch, room_for
from fp4rt.engine.rehearsal import rehearse
from fp4rt.engine.scheduler import LOGITS_ROWS, Scheduler, Step, most_rows
from fp4rt.engine.sequence import Sequence, TokenLogprobs
from fp4rt.errors import Fp4rtError
from fp4rt.layers import Decoder
from fp4rt.ops import GREEDY, Ops, Pending, SamplerRow
from fp4rt.sampling import MAX_LOGPROBS, Sampling, allowed

LEASE = 256          # decode steps that run on pages and settings put on the device once
UNGUESSED = 4        # of them where nothing could be guessed, before the host looks again: it costs the device a wait
LARGE = 256          # tokens of a step that takes so long that beginning the next one before it ends would gain nothing
SMALL = 512          # tokens of a step that the host takes longer to launch than the device to compute: it is recorded
ROUND = 64           # so many tokens more than the next smaller one, unless it only decodes
ROUND_GUESSES = 8    # or has guesses, each of which has its row of logits
RECORDED = 64        # recorded steps that are kept
SHORTEST_TABLE = 16  # pages of a sequence that a step is recorded for at least

Event = tuple[Sequence, int]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Flight:
    """A step that has been launched and not been read.

    sequences: those that draw: one token, and one more after each of their drafts, in the order of the rows; None for
    a row that means nothing. ids: the drawn ones, on the device until the next step draws. drawn, told: they and their
    log-probabilities on their way.
    """

    sequences: list[Sequence | None]
    ids: Any
    drawn: Pending
    told: Pending | None


class Engine:
    """Runs sequences through a model. One thread drives it; any may submit sequences, and end them, at any moment.

    Steps are launched ahead of what the host has read: the next one takes its tokens from where the last one drew them.
    Only a sequence under a grammar, or a guess at what comes next, waits for what the host has to know before; and
    behind a large step with prompts nothing is launched where others may arrive, since they would have to wait for it.
    """

    def __init__(self, ops: Ops, model: Decoder, cache: Cache, max_sequences: int, step_tokens: int | None = None,
                 speculate: int = 0):
        self.ops, self.model, self.cache = ops, model, cache
        self.scheduler = Scheduler(cache, max_sequences, step_tokens or ops.step_tokens, speculate)
        self.sampler = ops.sampler([GREEDY] * most_rows(max_sequences, speculate), model.config.vocab_size)
        self.small = SMALL
        self.most_logprobs = min(MAX_LOGPROBS, model.config.vocab_size)
        self._arrivals: deque[Sequence] = deque()
        self._scores: deque[Iterator[None]] = deque()  # begun or to be begun, a chunk of the first between two steps
        self._flights: deque[Flight] = deque()
        self._recorded: OrderedDict[Sizes, Recorded | None] = OrderedDict()  # None: met once, and run as it was

    @property
    def busy(self) -> bool:
        return bool(self._arrivals or self._scores or self.scheduler.busy)

    def prepare(self, layers: SequenceOf[int]) -> None:
        """Get steps of all sizes ready, and record those in which any number of short sequences decode, so that nobody
        has to wait for it later. layers: those of the model that differ."""
        nobody = Sequence([0], Sampling().resolve({}), 0, frozenset(), 2)
        nobody.held.pages = [[0] for _ in self.cache.plan.windows]
        rehearse(self, nobody, layers)
        if not self.ops.lookahead:
            return
        for size in decode_sizes(self.scheduler.max_sequences):
            self._record(Sizes(size, SHORTEST_TABLE, size, False), [(nobody, 1)], [None])

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
        """Take sequences out wherever they are, with the steps that are under way, and free their pages."""
        self.ops.synchronize()
        self._flights.clear()
        for sequence in sequences:
            sequence.ahead = 0
            if sequence in self._arrivals:
                self._arrivals.remove(sequence)
            self.scheduler.remove(sequence)

    def events(self, others: bool = False) -> Iterator[Event]:
        """(sequence, token) as tokens are drawn, until no sequence is left; -1 for one that failed, and says why.

        others: more sequences may be submitted meanwhile; they wait for one large step at most.
        """
        while True:
            while self._arrivals:
                sequence = self._arrivals.popleft()
                if sequence.error is not None:  # its prompt could not be scored
                    yield sequence, -1
                else:
                    self.scheduler.add(sequence)
            if self._scores and next(self._scores[0], self) is self:
                self._scores.popleft()
            step = self.scheduler.plan()
            if step:
                if all(s.decoding and not s.drafts for s, _ in step):
                    yield from self._decode([sequence for sequence, _ in step])
                else:
                    yield from self._mixed(step, others)
                for sequence, _ in step:
                    if sequence.error is None:
                        self.scheduler.publish(sequence)
            elif self._flights:
                yield from self._read(len(self._flights) - 1)
            elif not self.busy:
                return

    def _mixed(self, step: Step, others: bool) -> Iterator[Event]:
        """One step with a piece of a prompt in it, or with drafts.

        After a sequence's drafts a token is drawn, too, and after each of them: as long as what is drawn is what was
        drafted, the next one was drawn where it should be. What was remembered of the others is written again.
        """
        sequences = [sequence if sequence.remembered + count == sequence.length + len(sequence.drafts) else None
                     for sequence, count in step]
        drawing = [sequence for sequence in sequences if sequence is not None]
        recorded = self._find(step, sequences)
        if recorded is None:
            ends = np.cumsum([count for _, count in step]).tolist()
            rows = [row for sequence, end in zip(sequences, ends) if sequence is not None
                    for row in range(end - len(sequence.drafts) - 1, end)]
            logits = self.model(self.put(step, drawing, rows), self.cache.layers)
            ids, told = logits, None
            if drawing:
                ids = self.ops.sample(logits, self.sampler)
                most = [sequence.top_logprobs for sequence in drawing if sequence.top_logprobs is not None]
                told = self.ops.logprobs(logits, ids, max(most)) if most else None
            del logits
        else:
            drawing = sequences
            ids, told = recorded.replay()
        for sequence, count in step:
            sequence.remembered += count
        self._launched(drawing, ids, told)
        yield from self._failed(drawing)
        large = others and sum(count for _, count in step) > LARGE
        yield from self._read(0 if large else min(self._unread(), 1))

    def _decode(self, sequences: list[Sequence]) -> Iterator[Event]:
        """Steps of one token for each sequence, until one of them ends, another arrives, or pages run out."""
        steps = self._lease(sequences)
        decode = self._find([(sequence, 1) for sequence in sequences], sequences)
        yield from self._failed(sequences)
        for left in reversed(range(steps)):
            for sequence in sequences:
                sequence.remembered += 1
            self._launched(sequences, *decode.replay())
            yield from self._read(self._unread(left))
            if self._arrivals or self._scores or any(sequence.finish_reason for sequence in sequences):
                return  # what is already on its way is kept, nothing more is asked for

    def _lease(self, sequences: list[Sequence]) -> int:
        """How many steps these sequences decode without a change; they get the pages for them."""
        steps = LEASE if not self.scheduler.waiting else PAGE_TOKENS  # whoever waits needs pages, too
        if any(sequence.grammar for sequence in self.scheduler.running):
            steps = 1
        elif self.scheduler.speculate:
            steps = UNGUESSED
        steps = min(steps, max(sequence.remaining for sequence in sequences))
        lease = [(sequence, min(sequence.length + steps, sequence.limit)) for sequence in sequences]
        missing = [self.cache.missing(s.held, tokens) for s, tokens in lease]
        if not self.cache.fits([sum(group) for group in zip(*missing)]):
            steps, lease = 1, [(sequence, sequence.length) for sequence in sequences]
        for sequence, tokens in lease:
            self.scheduler.grow(sequence, tokens)
        return min(steps, min(s.remaining for s in sequences))

    def _unread(self, left: int = 0) -> int:
        """How many steps may be under way unread, `left` steps before another one is planned.

        None where a guess comes next, or most sequences wait for their grammars; one where some do, so that the others
        keep the device busy meanwhile.
        """
        awaited = sum(sequence.awaited for sequence in self.scheduler.running)
        if 2 * awaited >= len(self.scheduler.running) or self.scheduler.speculate and not left:
            return 0
        return min(self.ops.lookahead, 1) if awaited else self.ops.lookahead

    def _find(self, step: Step, drawing: list[Sequence | None]) -> Recorded | None:
        """The recorded step of these sizes, filled with this one; None for one that is better run as it is."""
        count, tokens = len(step), sum(count for _, count in step)
        exact = self.ops.lookahead == 0  # nothing is captured: padding would only cost
        width = max(len(pages) for sequence, _ in step for pages in sequence.held.pages)
        if not exact:
            width = _power_of_two(max(width, SHORTEST_TABLE))
        told = any(sequence is not None and sequence.top_logprobs is not None for sequence in drawing)
        decoding, guessed = all(s.decoding for s, _ in step), any(s.drafts for s, _ in step)
        if decoding and not guessed:
            size = count if exact else min(room_for(count), self.scheduler.max_sequences)
            sizes = Sizes(size, width, size, told)
        else:
            size = min(_power_of_two(count + 1), self.scheduler.max_sequences + 1)  # one takes what tokens are left
            most, unit = (LOGITS_ROWS, ROUND_GUESSES) if guessed else (self.small, ROUND)
            if tokens % unit == 0 and count == _power_of_two(count):
                size = count  # none are left
            tokens = -(-(tokens + size - count) // unit) * unit
            if exact or tokens > min(most, self.scheduler.step_tokens) or guessed and not decoding:
                return None
            sizes = Sizes(size, width, tokens, told, guessed)
            if sizes not in self._recorded:
                self._keep(sizes, None)
                return None
        found = self._recorded.get(sizes)
        if found is None:
            return self._record(sizes, step, drawing)
        found.refill(step, drawing)
        self._recorded.move_to_end(sizes)
        return found

    def _record(self, sizes: Sizes, step: Step, drawing: list[Sequence | None]) -> Recorded:
        recorded = Recorded(self, sizes, step, drawing)
        if self.ops.lookahead:
            self._keep(sizes, recorded)
        return recorded

    def _keep(self, sizes: Sizes, recorded: Recorded | None) -> None:
        self._recorded[sizes] = recorded
        if len(self._recorded) > RECORDED:
            _, oldest = self._recorded.popitem(last=False)
            if oldest is not None:
                self.ops.synchronize()  # it may be under way

    def put(self, step: Step, drawing: list[Sequence | None], rows: list[int] | None,
            sizes: tuple[int | None, int | None, int | None] = (None, None, None), into: Any = None) -> Any:
        """Put a planned step's batch, and how `drawing` draw on these rows, where the step finds them; see make_batch.

        sizes: sequences, pages in a table, and tokens to pad to. `into`: a batch of the same sizes, overwritten.
        """
        newest = self._flights[-1].sequences if self._flights else []
        drawn = {id(sequence): row for row, sequence in enumerate(newest)}
        batch = self.ops.batch(make_batch(step, rows, *sizes, drawn), into=into)
        if any(sequence.ahead for sequence, _ in step):
            self.ops.feed(batch, self._flights[-1].ids)
        settings = [GREEDY if sequence is None else self._sampler_row(sequence, drafts) for sequence in drawing
                    for drafts in range(len(sequence.drafts) + 1 if sequence is not None else 1)]
        if settings:
            self.ops.sampler(settings, self.model.config.vocab_size, into=self.sampler)
        return batch

    def _launched(self, sequences: list[Sequence | None], ids: Any, told: Any) -> None:
        """A step is on its way; ids: anything that it computes, where none are drawn."""
        for sequence in sequences:
            if sequence is not None:
                sequence.ahead += 1
        told = told if told is None else self.ops.fetch(told)
        self._flights.append(Flight(sequences, ids if sequences else None, self.ops.fetch(ids), told))

    @staticmethod
    def _failed(sequences: list[Sequence | None]) -> Iterator[Event]:
        """Those whose grammar failed when their step was put together."""
        return ((sequence, -1) for sequence in sequences if sequence is not None and sequence.error is not None)

    def _read(self, most: int) -> Iterator[Event]:
        """Wait for the oldest steps, until `most` are left unread."""
        while len(self._flights) > most:
            flight = self._flights.popleft()
            drawn = flight.drawn.result().tolist()
            told = flight.told.result() if flight.told is not None else None
            row = 0
            for sequence in flight.sequences:
                first, row = row, row + 1 + (len(sequence.drafts) if sequence is not None else 0)
                if sequence is not None and sequence.finish_reason is None:
                    sequence.ahead -= 1
                    if sequence.top_logprobs is None and not sequence.drafts:
                        yield self._accept(sequence, drawn[first])
                    else:
                        yield from self._take(sequence, drawn[first:row], None if told is None else told[first:row])

    def _take(self, sequence: Sequence, tokens: list[int], told: np.ndarray | None) -> Iterator[Event]:
        """Accept the token after a sequence's ids, and those after its drafts as far as these were right."""
        drafts, sequence.drafts = sequence.drafts, []
        for i, token in enumerate(tokens):
            if sequence.top_logprobs is not None and token >= 0:
                sequence.logprobs.append(TokenLogprobs.read(token, told[i], sequence.top_logprobs))
            right = drafts[i:i + 1] == [token]
            self.scheduler.accepted += right
            yield self._accept(sequence, token)
            if sequence.finish_reason is not None or not right:
                break
        if drafts:
            sequence.remembered = len(sequence.ids) - 1
            sequence.history = None  # it misses what was drawn after the first of them

    def _accept(self, sequence: Sequence, token: int) -> Event:
        if token < 0:
            sequence.fail(prompt.not_finite(self, sequence))
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
        if row.penalised and not drafts and row.history is None:
            sequence.history = self.ops.history(sequence.ids[:sequence.prompt_length], sequence.generated,
                                                self.model.config.vocab_size)
            row = replace(row, history=sequence.history)
        if sequence.grammar is None:
            return row
        mask = np.zeros(-(-self.model.config.vocab_size // 32), np.uint32)
        try:
            sequence.grammar.mask(mask)
            if allowed(mask, self.model.config.vocab_size).any():
                return replace(row, mask=mask)
            sequence.fail(Fp4rtError("request", "the grammar allows no token here"))
        except Exception as error:
            sequence.fail(Fp4rtError("request", f"the grammar failed: {error}"))
        return row

    def logits(self, ids: list[int]) -> np.ndarray:
        """Float32 [len(ids), vocab_size]: every position's logits."""
        if self.busy:
            raise Fp4rtError("request", "logits cannot be asked for while sequences are being generated")
        return prompt.logits(self, ids)

    def score(self, sequence: Sequence, top: int) -> None:
        """Fill sequence.prompt_logprobs, for its prompt's tokens but the first, and then submit it (any thread)."""
        self._scores.append(prompt.score(self, sequence, top))
