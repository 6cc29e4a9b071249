"""The inner loops in LLVM vector code, emitted with llvmlite and callable from Numba functions.

Compilers do not find these by themselves: decoding E2M1 by a table held in a register is what brings a matrix-vector
product to the speed of memory. All arithmetic is float32 and decoded values are exact. Addresses and byte counts are
int64, nothing needs to be aligned. One row's sum is always made in the same order, whatever else is computed with it.

How a weight is read, L lanes at a time (L: float32 values in one vector register):
- NVFP4 in chunks of 16 L codes: 2 L dwords of eight codes. Lane j of dword vector u, shifted right by 4 k, has the
  code of element 8 (u L + j) + k in its low nibble: a lookup that reads only the low bits needs no mask. The
  activations lie in that order, [chunk][u][k][lane]. Lanes 2b and 2b+1 share one block scale, which multiplies the
  sum of eight products, so L scales are decoded for 16 L codes.
- FP8, BF16, F16 and F32 in chunks of 4 L elements, in their natural order.
- E4M3 becomes a float16 of 2^-8 times its value by moving bits, subnormals included; whoever multiplies by the
  tensor's or row's scale restores the 2^8.
"""
from fp4rt.ops.cpu.emit.attention import (
    NARROW_COLUMNS, WIDE_COLUMNS, outer, outer_add, outer_add_narrow, silu_mul, softmax_page,
)
from fp4rt.ops.cpu.emit.builder import ENTRIES, LANES, ROWS, assembly
from fp4rt.ops.cpu.emit.formats import BF16, F16, F32, FP4, FP8, FP8_BLOCK, LAYOUTS, MXFP4, NVFP4, Layout
from fp4rt.ops.cpu.emit.linear import TILE_TOKENS, decode_row, dot_rows, tile
from fp4rt.ops.cpu.runtime import load_machine_code

__all__ = [
    "BF16", "F16", "F32", "FP4", "FP8", "FP8_BLOCK", "LANES", "LAYOUTS", "Layout", "MXFP4", "NARROW_COLUMNS", "NVFP4",
    "ROWS", "TILE_TOKENS", "WIDE_COLUMNS", "decode_row", "dot_rows", "outer", "outer_add", "outer_add_narrow",
    "silu_mul", "softmax_page", "tile",
]

load_machine_code("emit", assembly, ENTRIES)
