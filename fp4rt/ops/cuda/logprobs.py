"""Log-probabilities on the device, of chosen tokens and of the likeliest ones: one launch."""

from __future__ import annotations

import cupy
import numpy as np

from fp4rt.ops.cuda.device import Device
from fp4rt.sampling import check_logprobs

_THREADS = 1024  # as in kernels/vocabulary.cuh


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("logprobs", {}, 0)]


def logprobs(device: Device, logits: cupy.ndarray, ids: cupy.ndarray | np.ndarray, top: int) -> cupy.ndarray:
    """Ops.logprobs: logits float32 [R, V], ids int32 [R] -> float32 [R, 1 + 2 top], in memory that lasts."""
    count, vocab_size = logits.shape
    check_logprobs(top, vocab_size)
    if isinstance(ids, np.ndarray):
        host, ids = ids, device.memory.array(count, np.int32)
        device.put(np.asarray(host, np.int32), ids)
    out = device.memory.array((count, 1 + 2 * top), np.float32)
    device.kernel("logprobs", "logprobs")(count, _THREADS, logits, ids, out, vocab_size, top)
    return out
