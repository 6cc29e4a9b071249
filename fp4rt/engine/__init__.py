"""Sequences become steps, steps become tokens."""

from fp4rt.engine.engine import LEASE, LOGITS_ROWS, Engine
from fp4rt.engine.sequence import Sequence

__all__ = ["LEASE", "LOGITS_ROWS", "Engine", "Sequence"]
