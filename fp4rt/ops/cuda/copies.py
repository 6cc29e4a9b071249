"""Copies between the host and the device that let the device's thread go on: through pinned memory, in stream order."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cupy
import numpy as np
from cupy.cuda import runtime
from cupy.cuda.pinned_memory import PinnedMemory

if TYPE_CHECKING:
    from fp4rt.ops.cuda.device import Device

_UPLOAD_THREADS = 8       # as many fill the link of an H100 (PCIe 5, 50 GB/s); each copies 9 GB/s
_PIECE = 4 << 20          # bytes copied at a time through one pinned buffer: less is bound by Python's own time
_PINNED = 16              # such buffers at most
_ALIGNMENT = 256          # bytes: of pieces that share one
_RING = 1 << 20           # bytes of pinned memory for a step's own small copies
_LEAST_ROOM = 4 << 10     # bytes of pinned memory that something small is fetched to: powers of two, from 1024 ids to
_LARGEST_ROOM = 256 << 10  # as many rows' 20 likeliest ids and their log-probabilities


class Fetched:
    """An array on its way to the host."""

    def __init__(self, device: Device, array: cupy.ndarray):
        self._device, self._shape, self._dtype = device, array.shape, array.dtype
        self._value: np.ndarray | None = None
        # Pinning memory, and freeing it, waits for the device: what is small comes out of a pool.
        size, self._free = array.nbytes, None
        if size <= _LARGEST_ROOM:
            size = max(_LEAST_ROOM, 1 << (size - 1).bit_length())
            self._free = device.rooms.setdefault(size, [])
        if self._free:
            self._pinned, self._done = self._free.pop()
        else:
            self._pinned = PinnedMemory(size)
            self._done = cupy.cuda.Event(disable_timing=True)
        if not device.planning:
            runtime.memcpyAsync(self._pinned.ptr, array.data.ptr, array.nbytes, runtime.memcpyDeviceToHost,
                                device.stream.ptr)
        self._done.record(device.stream)

    def result(self) -> np.ndarray:
        """Wait for the copy: an array of the host's own."""
        if self._value is None:
            with self._device:
                self._done.synchronize()
            nbytes = int(np.prod(self._shape, dtype=np.int64)) * self._dtype.itemsize
            self._value = _view(self._pinned, nbytes).view(self._dtype).reshape(self._shape).copy()
            if self._free is not None:
                self._free.append((self._pinned, self._done))
        return self._value


class SmallCopies:
    """A ring of pinned memory for a step's inputs; its halves are reused once the copies out of them are done."""

    def __init__(self, device: Device):
        self._device = device
        self._pinned = PinnedMemory(_RING)
        self._bytes = _view(self._pinned, _RING)
        self._next = 0
        self._done = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]

    def put(self, host: np.ndarray, pointer: int) -> None:
        source, half = host.reshape(-1).view(np.uint8), _RING // 2
        for begin in range(0, len(source), half):
            piece = source[begin:begin + half]
            size = -(-len(piece) // 16) * 16
            if self._next % half + size > half:
                self._done[self._next // half].record(self._device.stream)
                self._next = half if self._next < half else 0
                self._done[self._next // half].synchronize()
            self._bytes[self._next:self._next + len(piece)] = piece
            runtime.memcpyAsync(pointer + begin, self._pinned.ptr + self._next, len(piece), runtime.memcpyHostToDevice,
                                self._device.stream.ptr)
            self._next += size
            if self._next == _RING:
                self._done[1].record(self._device.stream)
                self._next = 0
                self._done[0].synchronize()


class _Buffer:
    """Pinned memory that pieces of uploads pass through, small ones together: threads take turns to run Python, so what
    they are given to do must be few things. `copies`: of its pieces that are not on the stream yet."""

    def __init__(self) -> None:
        self.pinned = PinnedMemory(_PIECE)
        self.bytes = _view(self.pinned, _PIECE)
        self.pieces: list[tuple[int, np.ndarray]] = []
        self.used = self.copies = 0
        self.filled: Future[None] | None = None
        self.done = cupy.cuda.Event(disable_timing=True)

    def fill(self) -> None:
        self.done.synchronize()  # what was in it is on the device
        for offset, piece in self.pieces:
            np.copyto(self.bytes[offset:offset + len(piece)], piece)


@dataclass
class _Copy:
    """A piece of an upload, due on the stream once its buffer is filled. `into` keeps the target's memory."""

    buffer: _Buffer
    place: int
    into: cupy.ndarray
    offset: int
    nbytes: int

    def goes_on(self, buffer: _Buffer, place: int, into: cupy.ndarray, offset: int) -> bool:
        """Whether a piece there lies behind this one in both places."""
        return (buffer is self.buffer and into is self.into and place == self.place + self.nbytes
                and offset == self.offset + self.nbytes)


class Staging:
    """Uploads under way, and the launches that wait behind them, in the order of the stream.

    Threads fill pinned buffers ahead; the device's own thread alone puts copies and launches on the stream.
    """

    def __init__(self, device: Device):
        self._device = device
        self.pending: deque[_Copy | Callable[[], object]] = deque()
        self.defers = False
        self._pool: ThreadPoolExecutor | None = None
        self._free: deque[_Buffer] = deque()
        self._open: _Buffer | None = None  # takes more pieces
        self._buffers = 0

    def upload(self, source: np.ndarray, into: cupy.ndarray, offset: int = 0) -> None:
        """offset: bytes of `into` that stay as they are."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_UPLOAD_THREADS, "fp4rt-upload", initializer=runtime.setDevice,
                                            initargs=(self._device.id,))
        begin = 0
        while begin < len(source):
            if self._open is None:
                self._open = self._take()
            buffer, place = self._open, self._open.used
            piece = source[begin:begin + _PIECE - place]
            buffer.pieces.append((place, piece))
            buffer.used = min(place + -(-len(piece) // _ALIGNMENT) * _ALIGNMENT, _PIECE)
            last = self.pending[-1] if self.pending else None
            if isinstance(last, _Copy) and last.goes_on(buffer, place, into, offset + begin):
                last.nbytes += len(piece)
            else:
                buffer.copies += 1
                self.pending.append(_Copy(buffer, place, into, offset + begin, len(piece)))
            self.defers = True
            begin += len(piece)
            if buffer.used == _PIECE:
                self._submit()
                self._advance(lambda first: first.buffer.filled is not None and first.buffer.filled.done())

    def drain(self) -> None:
        if self.pending:
            self._submit()
            self._advance(lambda first: True)

    def close(self) -> None:
        self.pending.clear()
        self.defers = False
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        self._free.clear()
        self._open = None

    def _submit(self) -> None:
        """Nothing more goes into the open buffer: fill it."""
        if self._open is not None:
            self._open.filled = self._pool.submit(self._open.fill)
            self._open = None

    def _take(self) -> _Buffer:
        if not self._free and self._buffers < _PINNED:
            self._buffers += 1
            return _Buffer()
        while not self._free:
            self._advance(lambda first: not self._free)
        return self._free.popleft()

    def _advance(self, go_on: Callable[[_Copy], bool]) -> None:
        """Put on the stream what is first, launches always, copies as long as `go_on`."""
        self.defers = False
        try:
            while self.pending and (not isinstance(self.pending[0], _Copy) or go_on(self.pending[0])):
                first = self.pending.popleft()
                if not isinstance(first, _Copy):
                    first()
                    continue
                buffer = first.buffer
                buffer.filled.result()
                runtime.memcpyAsync(first.into.data.ptr + first.offset, buffer.pinned.ptr + first.place, first.nbytes,
                                    runtime.memcpyHostToDevice, self._device.stream.ptr)
                buffer.copies -= 1
                if not buffer.copies:
                    buffer.done.record(self._device.stream)
                    buffer.pieces.clear()
                    buffer.used, buffer.filled = 0, None
                    self._free.append(buffer)
        finally:
            self.defers = bool(self.pending)


def _view(pinned: PinnedMemory, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_uint8 * max(nbytes, 1)).from_address(pinned.ptr), np.uint8)[:nbytes]
