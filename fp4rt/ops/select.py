"""Which backend runs: what the caller asked for, or CUDA where an NVIDIA driver answers, else the CPU."""

from __future__ import annotations

from fp4rt.errors import Fp4rtError
from fp4rt.ops import Ops
from fp4rt.ops.driver import driver_answers

DEVICES = ("auto", "cuda", "cpu", "reference")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")


def check_options(device: str, arch: str | None, gpu_memory: int | None) -> None:
    """Raises Fp4rtError("request") for options that no backend, or not this one, has."""
    if device not in DEVICES:
        raise Fp4rtError("request", f"device is {device!r}; it must be one of {', '.join(DEVICES)}")
    if arch is not None and arch not in ARCHITECTURES:
        raise Fp4rtError("request", f"arch is {arch!r}; it must be one of {', '.join(ARCHITECTURES)}")
    if device in ("cpu", "reference") and (arch is not None or gpu_memory is not None):
        option = "arch" if arch is not None else "gpu_memory"
        raise Fp4rtError("request", f"{option} concerns a GPU, and device is {device}")


def make_ops(device: str, arch: str | None, gpu_memory: int | None, deterministic: bool) -> Ops:
    """The backend for `device`. Raises Fp4rtError("device") where it cannot run; never falls back silently."""
    if device == "auto":
        device = "cuda" if driver_answers() else "cpu"
    check_options(device, arch, gpu_memory)
    if device == "reference":
        from fp4rt.ops.reference import ReferenceOps

        return ReferenceOps(deterministic=deterministic)
    if device == "cpu":
        from fp4rt.ops.cpu import CpuOps

        return CpuOps(deterministic=deterministic)
    from fp4rt.ops.cuda import CudaOps

    return CudaOps(arch=arch, gpu_memory=gpu_memory, deterministic=deterministic)
