"""Weights as they lie in a checkpoint; a format is told from the tensors that are there, never from the config."""

from fp4rt.formats.dense import Dense
from fp4rt.formats.experts import ExpertShape, read_experts
from fp4rt.formats.fp8 import Fp8
from fp4rt.formats.mxfp4 import Mxfp4
from fp4rt.formats.nvfp4 import Nvfp4
from fp4rt.formats.read import has_weight, is_copy, read_kv_scales, read_vector, read_weight
from fp4rt.formats.split import count_parts, split
from fp4rt.formats.weight import Weight

__all__ = ["Dense", "ExpertShape", "Fp8", "Mxfp4", "Nvfp4", "Weight", "count_parts", "has_weight", "is_copy",
           "read_experts", "read_kv_scales", "read_vector", "read_weight", "split"]
