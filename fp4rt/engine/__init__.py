"""Sequences become steps, steps become tokens."""

from fp4rt.engine.engine import LEASE, LOGITS_ROWS, RECORDED, Engine, Event
from fp4rt.engine.scheduler import most_rows
from fp4rt.engine.sequence import Grammar, Sequence, TokenLogprobs

__all__ = ["LEASE", "LOGITS_ROWS", "RECORDED", "Engine", "Event", "Grammar", "Sequence", "TokenLogprobs", "most_rows"]
