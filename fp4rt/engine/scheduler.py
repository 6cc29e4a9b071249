"""Which sequences go into the next step, and with how many tokens."""

from __future__ import annotations

from collections import deque

from fp4rt.batch import PAGE_TOKENS
from fp4rt.cache import Cache, pages_for
from fp4rt.engine.sequence import Sequence
from fp4rt.errors import Fp4rtError

Step = list[tuple[Sequence, int]]  # how many of each sequence's not yet remembered ids


class Scheduler:
    """Continuous batching (Yu et al. 2022): a step takes a token of each sequence that decodes, and pieces of prompts.

    Of the tokens that a step has left for prompts, the oldest prompt is sure of half and the shortest go first: a long
    prompt is always under way and never holds up a short one. Sequences are admitted in their order, once their
    prompts' pages are free beside what earlier prompts still need. A sequence takes more pages as it grows. When none
    are left the newest running sequence gives its pages back and is computed again later; the oldest one always fits,
    since the cache holds at least one sequence of full length.
    """

    def __init__(self, cache: Cache, max_sequences: int, step_tokens: int):
        self.cache, self.max_sequences, self.step_tokens = cache, max_sequences, step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens_asked = self.prompt_tokens_found = 0  # of admitted prompts; found: in the prefix cache

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def retire(self) -> None:
        """Take finished sequences out and free their pages."""
        for sequence in [s for s in (*self.running, *self.waiting) if s.finish_reason]:
            self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
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
            self.preemptions += 1
            self.waiting.appendleft(newest)
            if newest is sequence:
                return False
        return True

    def plan(self) -> Step:
        """The next step. Empty when nothing is left to do."""
        self.retire()
        step: Step = []
        for sequence in [s for s in self.running if s.decoding]:
            if sequence in self.running and self.grow(sequence, len(sequence.ids)):
                step.append((sequence, 1))
        self._admit()
        budget = max(1, self.step_tokens - len(step))
        decoding = {id(sequence) for sequence, _ in step}
        prompts = [s for s in self.running if id(s) not in decoding]
        for sequence, count in self._share(prompts, budget):
            if sequence in self.running and self.grow(sequence, sequence.remembered + count):
                step.append((sequence, count))
        return [(sequence, count) for sequence, count in step if sequence in self.running]

    def _admit(self) -> None:
        """Let waiting sequences run, in their order, as far as their prompts' pages are free."""
        promised = [sum(group) for group in zip(*(self._needs(s) for s in self.running if not s.decoding))]
        while self.waiting and len(self.running) < self.max_sequences:
            head = self.waiting[0]
            head.remembered = self.cache.attach(head.held, head.ids, head.cache_salt)
            needs = self._needs(head)
            total = [a + b for a, b in zip(promised, needs)] if promised else needs
            if self.running and not self.cache.fits([n + len(self.running) for n in total]):  # room for all to grow
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
        """How a step's tokens are shared among prompts (oldest first): at most `budget` in all."""
        rest = {id(s): len(s.ids) - s.remembered for s in prompts}
        counts = dict.fromkeys(rest, 0)
        shortest_first = sorted(prompts, key=lambda s: rest[id(s)])
        for sequence, most in [(s, -(-budget // 2)) for s in prompts[:1]] + [(s, budget) for s in shortest_first]:
            count = min(rest[id(sequence)] - counts[id(sequence)], most, budget)
            counts[id(sequence)] += count
            budget -= count
        return [(s, counts[id(s)]) for s in prompts if counts[id(s)]]
