"""Which backend runs: what the caller asked for, or CUDA where an NVIDIA driver answers, else the CPU."""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from importlib import import_module

from fp4rt.driver import driver_answers, driver_library
from fp4rt.errors import Fp4rtError
from fp4rt.ops import Ops

DEVICES = ("auto", "cuda", "cpu", "reference")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def _import_cuda() -> None:
    """Import the CUDA backend while the driver starts and makes its context, a fifth of a second each.

    Where this process has used CUDA already, which device is current is its own affair, and nothing is started.
    """
    driver, context = driver_library(), ctypes.c_void_p()
    if driver is None or driver.cuCtxGetCurrent(ctypes.byref(context)) != _NOT_INITIALIZED:
        return

    def start() -> None:
        device = ctypes.c_int()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    thread = threading.Thread(target=start)
    thread.start()
    with suppress(Fp4rtError):  # said where the backend is really wanted
        import_module("fp4rt.ops.cuda")
    thread.join()


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
    if device in ("auto", "cuda"):
        _import_cuda()
    if device == "auto":
        device = "cuda" if driver_answers() else "cpu"
    check_options(device, arch, gpu_memory)
    if device == "reference":
        from fp4rt.ops.reference import ReferenceOps

        return ReferenceOps(deterministic=deterministic)
    if device == "cpu":
        from fp4rt.ops.cpu import CpuOps

        return CpuOps(deterministic=deterministic)
    if driver_library() is None:
        raise Fp4rtError("device", "device is 'cuda' and no NVIDIA driver is installed here (its library libcuda is "
                                   "missing); install one (`fp4rt doctor` says more), or use device='cpu'")
    from fp4rt.ops.cuda import CudaOps

    return CudaOps(arch=arch, gpu_memory=gpu_memory, deterministic=deterministic)
