"""A step's Batch on the device: one upload, then advanced there from one decode step to the next."""

from __future__ import annotations

from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.ops.cuda.device import Device

TICKETS = 256  # attention blocks per sequence and chunk that may count each other
_THREADS = 128
_FIELDS = ("tokens", "positions", "starts", "lengths", "pages", "slots", "rows")


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("batch", {}, 0)]


@dataclass(frozen=True)
class DeviceBatch:
    """The arrays of a Batch as views of one buffer; tickets int32 [S, TICKETS], zero between launches."""

    packed: cupy.ndarray
    tickets: cupy.ndarray
    tokens: cupy.ndarray
    positions: cupy.ndarray
    starts: cupy.ndarray
    lengths: cupy.ndarray
    pages: cupy.ndarray
    slots: cupy.ndarray
    rows: cupy.ndarray
    tables: tuple[cupy.ndarray, ...]  # pages[g] for each page group

    @property
    def is_decode(self) -> bool:
        """One new token for every sequence, and every row's logits wanted, in order."""
        return len(self.tokens) == len(self.lengths) == len(self.rows)


def put_batch(device: Device, batch: Batch, into: DeviceBatch | None = None) -> DeviceBatch:
    """Copy a Batch to the device, or into one of the same sizes, where a recorded step finds it."""
    arrays = [np.ascontiguousarray(getattr(batch, name), np.int32) for name in _FIELDS]
    packed = np.concatenate([array.reshape(-1) for array in arrays])
    if into is None:
        buffer, views, first = device.memory.array(packed.shape, np.int32), [], 0
        for array in arrays:
            views.append(buffer[first:first + array.size].reshape(array.shape))
            first += array.size
        into = DeviceBatch(buffer, device.zeros((len(batch.lengths), TICKETS), np.int32), *views,
                           tuple(views[_FIELDS.index("pages")]))
    elif [array.shape for array in arrays] != [getattr(into, name).shape for name in _FIELDS]:
        raise ValueError("a batch can only be refilled with one of the same sizes")
    device.put(packed, into.packed)
    return into


def batch_bytes(sequences: int, pages: int) -> int:
    """Of a batch of so many sequences with a token each, and so many pages in all their tables."""
    return 4 * (sequences * (TICKETS + len(_FIELDS) - 1) + 1 + pages)


def feed(device: Device, batch: DeviceBatch, ids: cupy.ndarray) -> None:
    """Tokens -1 - r of a batch become ids[r], int32 [R]; 0 for a failed row."""
    device.kernel("batch", "feed")(-(-len(batch.tokens) // _THREADS), _THREADS, ids, batch.tokens, len(batch.tokens))


def advance(device: Device, batch: DeviceBatch, ids: cupy.ndarray) -> None:
    """Make a decode batch the next step's: tokens <- ids, positions and lengths + 1; rows on page 0 stay."""
    sequences, width = batch.tables[0].shape
    device.kernel("batch", "advance")(-(-sequences // _THREADS), _THREADS, ids, batch.tokens, batch.positions,
                                      batch.lengths, batch.tables[0], sequences, width, PAGE_TOKENS)


def is_finite(device: Device, x: cupy.ndarray) -> bool:
    """Whether float32 [n, m] holds neither NaN nor infinity; waits for the device."""
    flag = device.zeros(1, np.int32)
    device.kernel("batch", "find_not_finite")(4 * device.sm_count, _THREADS, x, *x.shape, flag)
    return not device.fetch(flag).result()[0]
