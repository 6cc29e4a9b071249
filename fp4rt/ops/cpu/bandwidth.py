"""How fast this CPU reads memory: the limit that decode is measured against."""

from __future__ import annotations

import time

import numpy as np
from numba import njit, prange

from fp4rt.ops.cpu.runtime import Threads, available_threads, compiled


@njit
def _read_share(data):
    total = np.uint64(0)
    for i in range(data.size):
        total ^= data[i]
    return total


@compiled(parallel=True)
def _read(data, threads):
    """uint64 [n] in one contiguous share for each thread; the result keeps the compiler from leaving it out."""
    totals = np.zeros(threads, np.uint64)
    size = data.size // threads
    for share in prange(threads):
        totals[share] = _read_share(data[share * size:(share + 1) * size])
    return totals


def read_bandwidth(nbytes: int = 1 << 30, repeats: int = 8) -> float:
    """Bytes per second at which all threads read `nbytes` (far more than the caches).

    The best of `repeats`: what other programs took meanwhile is not the memory's limit, and must not flatter decode.
    """
    threads = available_threads()
    data = np.ones(nbytes // 8, np.uint64)
    times = []
    with Threads(threads):
        for _ in range(repeats + 1):  # the first compiles
            started = time.perf_counter()
            _read(data, threads)
            times.append(time.perf_counter() - started)
    return data.nbytes / min(times[1:])
