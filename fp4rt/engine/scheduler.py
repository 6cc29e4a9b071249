"""Which sequences go into the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque

from fp4rt.cache import Cache
from fp4rt.engine.sequence import Sequence
from fp4rt.errors import Fp4rtError


class Scheduler:
    """First come, first served; decoding sequences get their token before prompts get theirs, in chunks.

    A sequence takes pages as it grows. When none are left the newest running sequence gives its pages back and is
    computed again later; the oldest one always fits, since the cache holds at least one sequence of full length.
    """

    def __init__(self, cache: Cache, max_sequences: int, step_tokens: int):
        self.cache, self.max_sequences, self.step_tokens = cache, max_sequences, step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def retire(self) -> None:
        """Take finished sequences out and free their pages."""
        for sequence in [s for s in self.running if s.finish_reason]:
            self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its pages unless they are to be kept."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.keep:
            self.cache.give_back_slot(sequence.held)
        else:
            self.cache.give_back(sequence.held)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for its first `tokens` tokens, preempting newer ones; False if it had to go."""
        self.cache.trim(sequence.held, sequence.remembered)
        while not self.cache.grow(sequence.held, tokens):
            if self.running[-1] is self.running[0]:
                raise Fp4rtError("memory", f"{tokens} tokens do not fit the K/V cache of {self.cache.tokens} tokens")
            newest = self.running.pop()
            self.cache.give_back(newest.held)
            newest.remembered = 0
            self.waiting.appendleft(newest)
            if newest is sequence:
                return False
        return True

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next step: (sequence, how many of its not yet remembered ids). Empty when nothing is left to do."""
        self.retire()
        budget, step = self.step_tokens, []
        for sequence in [s for s in self.running if s.decoding]:
            if sequence in self.running and self.grow(sequence, len(sequence.ids)):
                step.append((sequence, 1))
        budget -= len(step)
        for sequence in [s for s in self.running if not s.decoding]:
            budget -= self._prefill(sequence, budget, step)
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            head = self.waiting[0]
            first = min(len(head.ids), head.remembered + self.step_tokens)
            if self.running and not self.cache.fits(self.cache.missing(head.held, first)):
                break
            self.running.append(self.waiting.popleft())
            self.cache.take_slot(head.held)
            budget -= self._prefill(head, budget, step)
        return [(sequence, count) for sequence, count in step if sequence in self.running]

    def _prefill(self, sequence: Sequence, budget: int, step: list[tuple[Sequence, int]]) -> int:
        count = min(len(sequence.ids) - sequence.remembered, budget)
        if count > 0 and sequence in self.running and self.grow(sequence, sequence.remembered + count):
            step.append((sequence, count))
            return count
        return 0
