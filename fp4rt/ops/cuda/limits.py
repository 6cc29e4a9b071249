"""What this GPU can do at most, measured now: how fast it reads memory, and how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable

import cupy
import numpy as np

from fp4rt.ops.cuda.device import Device

_PRODUCTS = 4  # as in kernels/matrix_rate.cu, like these (threads of a block, columns), by mma.sync and by warpgroups
_BLOCKS = (512, 32), (256, 128)


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    return [("bandwidth", {}, 0), ("matrix_rate", {"WARPGROUPS": int(capability == 90)}, 0)]


def read_bandwidth(device: Device, nbytes: int = 1 << 30, repeats: int = 10) -> float:
    """Bytes per second of a kernel that reads `nbytes` (far more than the L2) and nothing else; median of `repeats`."""
    data, out = device.scratch(nbytes // 16 * 4, np.uint32), device.scratch(1, np.uint32)
    kernel = device.kernel("bandwidth", "read_stream")
    return nbytes / _median_seconds(device, lambda: kernel(device.sm_count * 4, 512, data, nbytes // 16, out), repeats)


def matrix_rate(device: Device, flops: float = 2e12, repeats: int = 10) -> float:
    """Floating-point operations per second of a kernel that multiplies fp16 matrices into float32 sums on the tensor
    cores, without fetching them from memory; median of `repeats` of about `flops` each (an addition and a
    multiplication are two). bf16 has the same rate."""
    warpgroups = device.arch == "sm_90a"
    threads, columns = _BLOCKS[warpgroups]
    kernel, out = device.kernel("matrix_rate", "multiply", WARPGROUPS=int(warpgroups)), device.scratch(1, np.float32)
    round_flops = device.sm_count * threads // 32 * 2 * 16 * 16 * _PRODUCTS * columns
    rounds = round(flops / round_flops)
    seconds = _median_seconds(device, lambda: kernel(device.sm_count, threads, rounds, out), repeats)
    return rounds * round_flops / seconds


def _median_seconds(device: Device, launch: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(device.stream)
        launch()
        end.record(device.stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 1e-3)
    return float(np.median(times[2:]))
