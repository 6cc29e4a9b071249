"""How fast this GPU reads memory: the limit that decode is measured against."""

from __future__ import annotations

import cupy
import numpy as np

from fp4rt.ops.cuda.device import Device


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    return [("bandwidth", {}, 0)]


def read_bandwidth(device: Device, nbytes: int = 1 << 30, repeats: int = 10) -> float:
    """Bytes per second of a kernel that reads `nbytes` (far more than the L2) and nothing else; median of `repeats`."""
    data, out = device.scratch(nbytes // 16 * 4, np.uint32), device.scratch(1, np.uint32)
    kernel = device.kernel("bandwidth", "read_stream")
    times = []
    for _ in range(repeats + 2):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(device.stream)
        kernel(device.sm_count * 4, 512, data, nbytes // 16, out)
        end.record(device.stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 1e-3)
    return nbytes / float(np.median(times[2:]))
