"""Sequences become steps, steps become tokens."""

from fp4rt.engine.engine import LEASE, LOGITS_ROWS, Engine, Event
from fp4rt.engine.sequence import Grammar, Sequence, TokenLogprobs

__all__ = ["LEASE", "LOGITS_ROWS", "Engine", "Event", "Grammar", "Sequence", "TokenLogprobs"]
