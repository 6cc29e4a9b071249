"""Sequences become steps, steps become tokens."""

from fp4rt.engine.engine import Engine
from fp4rt.engine.sequence import Sequence

__all__ = ["Engine", "Sequence"]
