"""One sequence on its way: its ids, what of them is remembered where, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fp4rt.cache import Remembered
from fp4rt.engine.lookup import Lookup
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

    ahead: tokens drawn by steps that have been launched and not been read: they follow `ids`, though the host does not
    know them yet, and count among the remembered. history: of the ids, on the device, where penalties need it.
    finish_reason: None while it runs, then "stop" (a stop id or stop string), "length", "cancelled", or "error", which
    `error` tells. Whoever sets it ends the sequence; any thread may.
    cache_salt: only sequences of the same salt share pages. cached_tokens: of the prompt, how many were found so.
    top_logprobs: how many of the likeliest tokens are told beside each drawn one's log-probability; None for neither.
    drafts: what the step that is planned guesses after `ids`: remembered, and drawn after, as if they were there.
    logprobs: of the generated tokens. prompt_logprobs: of the prompt's from the second on, where they were asked for.
    """

    ids: list[int]
    sampling: Sampling          # resolved: no field is None, except max_tokens where only the model's length ends it
    seed: int
    stop_ids: frozenset[int]
    limit: int                  # ids may not grow beyond this many
    prompt_length: int = 0
    remembered: int = 0
    ahead: int = 0
    history: Any = None
    held: Remembered = field(default_factory=Remembered)
    drafts: list[int] = field(default_factory=list)
    lookup: Lookup = field(default_factory=Lookup)
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
    def length(self) -> int:
        """Tokens, with those that the host does not know yet."""
        return len(self.ids) + self.ahead

    @property
    def decoding(self) -> bool:
        """Only the newest token is not yet remembered."""
        return self.remembered == self.length - 1 and self.length > self.prompt_length

    @property
    def awaited(self) -> bool:
        """Whether its next step takes what the host does not know yet: what a grammar allows after the newest token."""
        return self.ahead > 0 and self.grammar is not None

    @property
    def remaining(self) -> int:
        """Tokens it may still draw."""
        return self.limit - self.length

    def fail(self, error: Fp4rtError) -> None:
        self.finish_reason, self.error = "error", error

    def append(self, token: int) -> None:
        self.ids.append(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        ended = token in self.stop_ids and not self.sampling.ignore_eos
        if ended or self.grammar is not None and self.grammar.finished:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.limit:
            self.finish_reason = "length"

    def sampler_row(self, drafts: int = 0) -> SamplerRow:
        """How the token after the first so many drafts is drawn; after none, what was seen must be in `history`."""
        s = self.sampling
        row = SamplerRow(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty,
                         s.frequency_penalty, self.seed, self.length - self.prompt_length + drafts, (), (),
                         s.logit_bias, history=None if drafts else self.history)
        if drafts and row.penalised:
            return replace(row, prompt=self.ids[:self.prompt_length], generated=self.generated + self.drafts[:drafts])
        return row
