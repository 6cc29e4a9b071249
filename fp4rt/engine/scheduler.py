"""Which sequences go into the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque

from fp4rt.batch import PAGE_TOKENS
from fp4rt.cache import Cache, pages_for
from fp4rt.engine.sequence import Sequence
from fp4rt.errors import Fp4rtError

Step = list[tuple[Sequence, int]]  # how many of each sequence's not yet remembered ids, then of its drafts
LOGITS_ROWS = 64                   # of a prompt, or of tokens and guesses, whose logits one step computes


def most_rows(max_sequences: int, speculate: int) -> int:
    """Of logits that one step draws from: a recorded one may have a row that means nothing."""
    return max_sequences + (LOGITS_ROWS if speculate else 1)


class Scheduler:
    """Continuous batching (Yu et al. 2022): a step takes a token of each sequence that decodes, and pieces of prompts.

    What is planned may follow steps that are still under way: see Sequence.ahead.

    Of the tokens that a step has left for prompts, the oldest prompt is sure of half and the shortest go first: a long
    prompt is always under way and never holds up a short one. Sequences are admitted in their order, once their
    prompts' pages are free beside what earlier prompts still need. A sequence takes more pages as it grows. When none
    are left the newest running sequence gives its pages back and is computed again later; the oldest one always fits,
    since the cache holds at least one sequence of full length, unless a scored prompt holds pages: then it waits, too.
    """

    def __init__(self, cache: Cache, max_sequences: int, step_tokens: int, speculate: int = 0):
        self.cache, self.max_sequences, self.step_tokens = cache, max_sequences, step_tokens
        self.speculate = speculate
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.scored: Sequence | None = None  # a prompt that is looked at beside them and keeps what it holds
        self.preemptions = self.drafted = self.accepted = 0  # accepted: of the drafted tokens
        self.prompt_tokens_asked = self.prompt_tokens_found = 0  # of admitted prompts; found: in the prefix cache

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def retire(self) -> None:
        """Take finished sequences out and free their pages, of which those with known text can be found."""
        for sequence in [s for s in (*self.running, *self.waiting) if s.finish_reason]:
            if sequence.error is None:
                self.publish(sequence)
            self.remove(sequence)

    def publish(self, sequence: Sequence) -> None:
        """Let others find the whole pages of what is remembered of a sequence and known."""
        known = min(sequence.remembered, len(sequence.ids))
        self.cache.publish(sequence.held, sequence.ids, known, sequence.cache_salt)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.cache.give_back(sequence.held)
        sequence.history = None

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for its first `tokens` tokens, preempting newer ones; False if it had to go."""
        self.cache.trim(sequence.held, sequence.remembered)
        while not self.cache.grow(sequence.held, tokens):
            if self.running[-1] is self.running[0] and self.scored is None:
                raise Fp4rtError("memory", f"{tokens} tokens do not fit the K/V cache of {self.cache.tokens} tokens")
            newest = self.running.pop()
            self._forget(newest)
            newest.remembered, newest.drafts = 0, []
            self.preemptions += 1
            self.waiting.appendleft(newest)
            if newest is sequence:
                return False
        return True

    def plan(self) -> Step:
        """The next step. Empty when nothing is left to do."""
        self.retire()
        step: Step = []
        decoding = {id(s) for s in self.running if s.decoding}
        for sequence in [s for s in self.running if s.decoding and s.remaining > 0 and not s.awaited]:
            if sequence in self.running and self.grow(sequence, sequence.length):
                step.append((sequence, 1))
        if self.speculate:
            step = self._draft([sequence for sequence, _ in step if sequence in self.running])
        self._admit()
        budget = max(1, self.step_tokens - sum(count for _, count in step))
        prompts = [s for s in self.running if id(s) not in decoding]
        for sequence, count in self._share(prompts, budget):
            if sequence in self.running and self.grow(sequence, sequence.remembered + count):
                step.append((sequence, count))
        return [(sequence, count) for sequence, count in step if sequence in self.running]

    def _draft(self, sequences: list[Sequence]) -> Step:
        """A token of each, and guesses at what follows as far as there is room for them without anyone's leaving."""
        room, step = min(LOGITS_ROWS, self.step_tokens) - len(sequences), []
        for sequence in sequences:
            known = sequence.ahead == 0 and sequence.grammar is None
            most = min(self.speculate, room, sequence.remaining - 1) if known else 0
            drafts = sequence.lookup.guess(sequence.ids, most) if most > 0 else []
            sequence.drafts = drafts if self.cache.grow(sequence.held, sequence.length + len(drafts)) else []
            room -= len(sequence.drafts)
            self.drafted += len(sequence.drafts)
            step.append((sequence, 1 + len(sequence.drafts)))
        return step

    def _admit(self) -> None:
        """Let waiting sequences run, in their order, as far as their prompts' pages are free."""
        if self.scored is not None and not self.scored.held.slot:
            return  # the next slot is for it
        before = [s for s in (*self.running, self.scored) if s is not None and not s.decoding]
        promised = [sum(group) for group in zip(*map(self._needs, before))]
        while self.waiting and len(self.running) < self.max_sequences and self.cache.has_slot:
            head = self.waiting[0]
            if head.ahead:  # it was preempted, and what it drew before has to be read first
                return
            head.remembered = self.cache.attach(head.held, head.ids, head.cache_salt)
            needs = self._needs(head)
            total = [a + b for a, b in zip(promised, needs)] if promised else needs
            alone = not self.running and self.scored is None
            if not alone and not self.cache.fits([n + len(self.running) for n in total]):  # room for all to grow
                self.cache.give_back(head.held)
                head.remembered = 0
                return
            promised = total
            self.cache.take_slot(head.held)
            if not head.generated:
                head.cached_tokens = head.remembered
                self.prompt_tokens_asked += head.prompt_length
                self.prompt_tokens_found += head.remembered
            self.running.append(self.waiting.popleft())

    def _needs(self, sequence: Sequence) -> list[int]:
        """Pages per group that a prompt has still to take; behind a window they are freed on the way."""
        return [min(n, pages_for((window or n * PAGE_TOKENS) + self.step_tokens) + 1) for n, window in
                zip(self.cache.missing(sequence.held, len(sequence.ids)), self.cache.plan.windows)]

    def _share(self, prompts: list[Sequence], budget: int) -> Step:
        """How a step's tokens are shared among prompts (oldest first): at most `budget` in all.

        Of a prompt it takes none beyond where a snapshot of its state is to be taken.
        """
        ends = [min([n for n in s.held.snapshots if n > s.remembered], default=len(s.ids)) for s in prompts]
        rest = {id(s): end - s.remembered for s, end in zip(prompts, ends)}
        counts = dict.fromkeys(rest, 0)
        shortest_first = sorted(prompts, key=lambda s: rest[id(s)])
        for sequence, most in [(s, -(-budget // 2)) for s in prompts[:1]] + [(s, budget) for s in shortest_first]:
            count = min(rest[id(sequence)] - counts[id(sequence)], most, budget)
            counts[id(sequence)] += count
            budget -= count
        return [(s, counts[id(s)]) for s in prompts if counts[id(s)]]
