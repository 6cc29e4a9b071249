"""Weights as they lie in a checkpoint; a format is told from the tensors that are there, never from the config."""

from fp4rt.formats.dense import Dense
from fp4rt.formats.fp8 import Fp8
from fp4rt.formats.nvfp4 import Nvfp4
from fp4rt.formats.read import read_vector, read_weight
from fp4rt.formats.weight import Weight

__all__ = ["Dense", "Fp8", "Nvfp4", "Weight", "read_vector", "read_weight"]
