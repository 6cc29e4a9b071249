"""Which sequences go into the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque

from fp4rt.cache import Cache, pages_for
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
        self.cache.give_back_slot(sequence.slot)
        sequence.slot = 0
        if not sequence.keep_pages:
            self.cache.give_back(sequence.pages)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give a running sequence pages for its first `tokens` tokens, preempting newer ones; False if it had to go."""
        while (missing := pages_for(tokens) - len(sequence.pages)) > 0:
            if missing <= self.cache.free_pages:
                sequence.pages += self.cache.take(missing)
                break
            if self.running[-1] is self.running[0]:
                raise Fp4rtError("memory", f"{tokens} tokens do not fit the K/V cache of {self.cache.tokens} tokens")
            newest = self.running.pop()
            self.cache.give_back(newest.pages)
            self.cache.give_back_slot(newest.slot)
            newest.remembered = newest.slot = 0
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
            if pages_for(len(head.ids)) - len(head.pages) > self.cache.free_pages and self.running:
                break
            self.running.append(self.waiting.popleft())
            head.slot = self.cache.take_slot()
            budget -= self._prefill(head, budget, step)
        return [(sequence, count) for sequence, count in step if sequence in self.running]

    def _prefill(self, sequence: Sequence, budget: int, step: list[tuple[Sequence, int]]) -> int:
        count = min(len(sequence.ids) - sequence.remembered, budget)
        if count > 0 and sequence in self.running and self.grow(sequence, sequence.remembered + count):
            step.append((sequence, count))
            return count
        return 0
