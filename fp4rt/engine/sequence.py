"""One sequence on its way: its ids, what of them is remembered where, and when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from fp4rt.cache import Remembered
from fp4rt.ops import SamplerRow
from fp4rt.sampling import Sampling


@dataclass(eq=False)
class Sequence:
    """ids holds the prompt and what was generated; the first `remembered` of them are remembered in `held`.

    finish_reason: None while it runs, then "stop" (a stop id or stop string) or "length".
    """

    ids: list[int]
    sampling: Sampling          # resolved: no field is None, except max_tokens where only the model's length ends it
    seed: int
    stop_ids: frozenset[int]
    limit: int                  # ids may not grow beyond this many
    prompt_length: int = 0
    remembered: int = 0
    held: Remembered = field(default_factory=Remembered)
    keep: bool = False          # a conversation's: what is remembered outlives the run
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.ids)

    @property
    def generated(self) -> list[int]:
        return self.ids[self.prompt_length:]

    @property
    def decoding(self) -> bool:
        """Only the newest id is not yet remembered."""
        return self.remembered == len(self.ids) - 1 and len(self.ids) > self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens it may still draw."""
        return self.limit - len(self.ids)

    def append(self, token: int) -> None:
        self.ids.append(token)
        if token in self.stop_ids and not self.sampling.ignore_eos:
            self.finish_reason = "stop"
        elif self.remaining <= 0:
            self.finish_reason = "length"

    def sampler_row(self) -> SamplerRow:
        s = self.sampling
        return SamplerRow(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.presence_penalty,
                          s.frequency_penalty, self.seed, len(self.ids) - self.prompt_length,
                          self.ids[:self.prompt_length], self.generated)
