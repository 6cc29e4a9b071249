"""The CPU backend: fused kernels on packed weights for few tokens, decoded panels for many, float32 throughout."""

from fp4rt.ops.cpu.backend import CpuOps

__all__ = ["CpuOps"]
