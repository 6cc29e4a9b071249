"""Which layout a weight gets on the device: that of the kernels that read its format."""

from __future__ import annotations

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Dense, Fp8, Mxfp4, Nvfp4, Weight
from fp4rt.ops.cuda.dense_linear import DENSE, DENSE_F32, dense_layout
from fp4rt.ops.cuda.fp8_linear import FP8, FP8_BLOCKS, fp8_layout
from fp4rt.ops.cuda.mxfp4_linear import MXFP4
from fp4rt.ops.cuda.nvfp4_linear import NVFP4
from fp4rt.ops.cuda.tiles import Layout

LAYOUTS = (NVFP4, MXFP4, FP8, FP8_BLOCKS, DENSE, DENSE_F32)


def choose_layout(part: Weight) -> tuple[Layout, str]:
    """The layout for a weight and the reason, for reports too."""
    if isinstance(part, Nvfp4):
        return NVFP4, NVFP4.reason
    if isinstance(part, Mxfp4):
        return MXFP4, MXFP4.reason
    if isinstance(part, Dense):
        layout = dense_layout(part)
        return layout, layout.reason
    if isinstance(part, Fp8):
        layout = fp8_layout(part)
        return layout, layout.reason
    raise Fp4rtError("checkpoint", f"{part.name}: the CUDA backend has no kernel for {part.format}")
