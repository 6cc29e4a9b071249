"""Device memory taken from the driver in blocks, under one budget, and handed out first-fit by reference count."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import cupy
import numpy as np

from fp4rt.errors import Fp4rtError

_ALIGNMENT = 256
_GRANULE = 2 << 20  # what the driver rounds large allocations to
_LARGEST_SLAB = 64 << 20
_LARGEST_SHARER = 2 * _GRANULE  # of a slab: a larger array leaves less unused in a block of its own than in a slab


class Budget:
    """Counts what is taken from the driver; `limit` in bytes, None for all that the device has free."""

    def __init__(self, device_id: int, limit: int | None):
        self.device_id, self.limit = device_id, limit
        self.used = self.peak = 0

    def free(self) -> int:
        """Bytes that may still be taken."""
        free = cupy.cuda.runtime.memGetInfo()[0]
        return free if self.limit is None else min(free, self.limit - self.used)

    def take(self, nbytes: int, purpose: str) -> cupy.cuda.Memory:
        if nbytes <= self.free():
            try:
                memory = cupy.cuda.Memory(nbytes)
            except cupy.cuda.runtime.CUDARuntimeError:
                cupy.cuda.runtime.getLastError()
            else:
                self.used += nbytes
                self.peak = max(self.peak, self.used)
                return memory
        limit = "" if self.limit is None else f" of the {_size(self.limit)} allowed by gpu_memory"
        raise Fp4rtError("memory", f"{purpose} needs {_size(nbytes)} of GPU memory, {_size(max(self.free(), 0))}"
                                   f"{limit} is free; use a smaller max_model_len or model, or free GPU memory")

    def give_back(self, nbytes: int) -> None:
        self.used -= nbytes


class _Block:
    """One allocation and its free extents, sorted [start, end) offsets."""

    def __init__(self, memory: cupy.cuda.Memory | None, size: int):
        self.memory, self.size = memory, size
        self.base = memory.ptr if memory is not None else 1 << 40
        self.free = [[0, size]]

    def take(self, nbytes: int) -> int | None:
        for index, extent in enumerate(self.free):
            if extent[1] - extent[0] >= nbytes:
                start = extent[0]
                extent[0] += nbytes
                if extent[0] == extent[1]:
                    del self.free[index]
                return start
        return None

    def give_back(self, start: int, end: int) -> None:
        index = next((i for i, extent in enumerate(self.free) if extent[0] >= end), len(self.free))
        self.free.insert(index, [start, end])
        for left in (index, index - 1):
            if 0 <= left < len(self.free) - 1 and self.free[left][1] == self.free[left + 1][0]:
                self.free[left][1] = self.free.pop(left + 1)[1]


class _Extent:
    """Owns a piece of a block; returns it when the last array over it dies.

    It may die in any thread and at any moment (garbage collection), so it only leaves a note for the arena.
    """

    __slots__ = ("_note", "_returned")

    def __init__(self, returned: deque, note: tuple[_Block, int, int]):
        self._returned, self._note = returned, note

    def __del__(self) -> None:
        self._returned.append(self._note)


class Arena:
    """Arrays out of few driver allocations. The same takes and returns in the same order give the same addresses.

    Work runs on one stream, so memory may be handed out again as soon as its Python handle is gone; but while it does
    not, none is: `keeps`.
    `slabs`: take more from the driver than asked for, because many small arrays follow.
    """

    def __init__(self, budget: Budget, purpose: str, *, slabs: bool = False, virtual: bool = False):
        self._budget, self._purpose, self._slabs = budget, purpose, slabs
        self._returned: deque[tuple[_Block, int, int]] = deque()
        self._blocks = [_Block(None, 1 << 50)] if virtual else []
        self.high_water = 0
        self.keeps = False

    @property
    def nbytes(self) -> int:
        """Bytes taken from the driver."""
        return sum(block.size for block in self._blocks)

    def array(self, shape: int | Sequence[int], dtype: np.typing.DTypeLike) -> cupy.ndarray:
        """An uninitialised array; its memory returns to the arena when it and all its views are gone."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        dtype = np.dtype(dtype)
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        size = max(-(-nbytes // _ALIGNMENT), 1) * _ALIGNMENT
        block, start = self._take(size)
        self.high_water = max(self.high_water, start + size)
        owner = _Extent(self._returned, (block, start, start + size))
        memory = cupy.cuda.UnownedMemory(block.base + start, size, owner, self._budget.device_id)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    def reserve(self, nbytes: int) -> None:
        """Replace the blocks that nothing uses by one of `nbytes`."""
        self._collect()
        for block in [b for b in self._blocks if b.free == [[0, b.size]]]:
            self._blocks.remove(block)
            self._budget.give_back(block.size)
        if nbytes:
            whole = -(-nbytes // _GRANULE) * _GRANULE
            self._grow(whole if whole <= self._budget.free() else nbytes)

    def close(self) -> None:
        for block in self._blocks:
            self._budget.give_back(block.size)
        self._blocks.clear()

    def _take(self, size: int) -> tuple[_Block, int]:
        if not self.keeps:
            self._collect()
        for block in self._blocks:
            if (start := block.take(size)) is not None:
                return block, start
        block = self._grow(self._growth(size))
        return block, block.take(size)

    def _growth(self, size: int) -> int:
        exact = -(-size // _GRANULE) * _GRANULE
        slab = min(_LARGEST_SLAB, max(2 * _GRANULE, self.nbytes)) if self._slabs else 0
        return slab if exact <= min(slab // 2, _LARGEST_SHARER) and slab <= self._budget.free() else exact

    def _grow(self, size: int) -> _Block:
        block = _Block(self._budget.take(size, self._purpose), size)
        self._blocks.append(block)
        return block

    def _collect(self) -> None:
        while self._returned:
            block, start, end = self._returned.popleft()
            block.give_back(start, end)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"
