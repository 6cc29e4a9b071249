"""Sequences become steps, steps become tokens."""

from fp4rt.engine.engine import LEASE, Engine
from fp4rt.engine.sequence import Sequence

__all__ = ["LEASE", "Engine", "Sequence"]
