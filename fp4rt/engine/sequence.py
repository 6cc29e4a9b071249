"""One sequence on its way: its ids, what of them is remembered where, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fp4rt.cache import Remembered
from fp4rt.errors import Fp4rtError
from fp4rt.ops import SamplerRow
from fp4rt.sampling import Sampling


class Grammar(Protocol):
    """What may come next, where an answer must have a form."""

    finished: bool  # nothing may follow but the end

    def mask(self, words: np.ndarray) -> None:
        """Set bit t % 32 of words[t // 32], uint32, for every token t that may be drawn now, and clear the others."""

    def accept(self, token: int) -> None:
        """This token was drawn."""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability under the model itself (no penalty, no temperature), and the likeliest tokens'."""

    id: int
    logprob: float
    top: list[tuple[int, float]]

    @classmethod
    def read(cls, token: int, row: np.ndarray, top: int) -> TokenLogprobs:
        """From a row of Ops.logprobs, of whose likeliest tokens the first `top` are wanted."""
        most = len(row) // 2
        return cls(token, float(row[0]), [(int(i), float(p)) for i, p in zip(row[1:1 + top], row[1 + most:])])


@dataclass(eq=False)
class Sequence:
    """ids holds the prompt and what was generated; the first `remembered` of them are remembered in `held`.

    finish_reason: None while it runs, then "stop" (a stop id or stop string), "length", "cancelled", or "error", which
    `error` tells. Whoever sets it ends the sequence; any thread may.
    cache_salt: only sequences of the same salt share pages. cached_tokens: of the prompt, how many were found so.
    top_logprobs: how many of the likeliest tokens are told beside each drawn one's log-probability; None for neither.
    logprobs: of the generated tokens. prompt_logprobs: of the prompt's from the second on, where they were asked for.
    """

    ids: list[int]
    sampling: Sampling          # resolved: no field is None, except max_tokens where only the model's length ends it
    seed: int
    stop_ids: frozenset[int]
    limit: int                  # ids may not grow beyond this many
    prompt_length: int = 0
    remembered: int = 0
    held: Remembered = field(default_factory=Remembered)
    cache_salt: str = ""
    cached_tokens: int = 0
    top_logprobs: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    grammar: Grammar | None = None
    finish_reason: str | None = None
    error: Fp4rtError | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def generated(self) -> list[int]:
        return self.ids[self.prompt_length:]

    @property
    def stepwise(self) -> bool:
        """Whether the host has a part in every token: a grammar's mask before it, log-probabilities beside it."""
        return self.grammar is not None or self.top_logprobs is not None

    @property
    def decoding(self) -> bool:
        """Only the newest id is not yet remembered."""
        return self.remembered == len(self.ids) - 1 and len(self.ids) > self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens it may still draw."""
        return self.limit - len(self.ids)

    def fail(self, error: Fp4rtError) -> None:
        self.finish_reason, self.error = "error", error

    def append(self, token: int) -> None:
        self.ids.append(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        ended = token in self.stop_ids and not self.sampling.ignore_eos
        if ended or self.grammar is not None and self.grammar.finished:
            self.finish_reason = "stop"
        elif self.remaining <= 0:
            self.finish_reason = "length"

    def sampler_row(self) -> SamplerRow:
        s = self.sampling
        return SamplerRow(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty,
                          s.frequency_penalty, self.seed, len(self.ids) - self.prompt_length,
                          self.ids[:self.prompt_length], self.generated, s.logit_bias)
