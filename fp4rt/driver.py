"""What the NVIDIA driver says, asked without CuPy, and which extra of fp4rt fits it."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata

EXTRAS = (12, 13)  # CUDA majors that fp4rt has an extra for


def system_library(linux: str, windows: str) -> ctypes.CDLL | None:
    """A library of the system; None where it is not installed."""
    try:
        return ctypes.CDLL(windows if sys.platform == "win32" else linux)
    except OSError:
        return None


def driver_library() -> ctypes.CDLL | None:
    return system_library("libcuda.so.1", "nvcuda.dll")


def driver_answers() -> bool:
    """Whether an NVIDIA driver is installed and sees a GPU."""
    driver, count = driver_library(), ctypes.c_int(0)
    return (driver is not None and driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
            and count.value > 0)


def device_memory() -> int:
    """Bytes of the first GPU; 0 without one."""
    driver, device, size = driver_library(), ctypes.c_int(), ctypes.c_size_t()
    if driver_answers() and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    return size.value


def cuda_version() -> int:
    """The newest CUDA that the driver knows, 1000 * major + 10 * minor; 0 without one."""
    driver, version = driver_library(), ctypes.c_int()
    if driver is not None:
        driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def cuda_extra() -> str:
    """What to install: the extra of the CuPy that is there, else the one that fits the driver (CUDA 12 without one)."""
    newest = cuda_version() // 1000
    there = [major for major in EXTRAS if _installed(f"cupy-cuda{major}x")]
    if len(there) == 1 and (not newest or there[0] <= newest):
        return f"'fp4rt[cuda{there[0]}]'"
    return f"'fp4rt[cuda{13 if newest >= 13 else 12}]'"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
