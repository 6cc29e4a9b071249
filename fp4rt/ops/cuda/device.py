"""One GPU as fp4rt uses it: its architecture and limits, its streams, memory within a budget, kernels by name."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cupy
import numpy as np
from cupy.cuda import runtime
from cupy.cuda.pinned_memory import PinnedMemory

from fp4rt.errors import Fp4rtError
from fp4rt.ops.cuda.compile import Binary, compile_kernel
from fp4rt.ops.cuda.copies import Fetched, SmallCopies, Staging
from fp4rt.ops.cuda.launch import Driver, Kernel
from fp4rt.ops.cuda.memory import Arena, Budget

# Shared memory that one block may use, bytes (CUDA C++ Programming Guide, specifications per compute capability).
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10,
                100: 227 << 10, 103: 227 << 10, 110: 227 << 10, 120: 99 << 10, 121: 99 << 10}

_COMPILE_THREADS = 8


class Device:
    """The current CUDA device, seen as architecture `arch` ("sm_75" to "sm_90a"; None for its own).

    An older `arch` runs that generation's code, compiled by the driver from its PTX, and keeps to that chip's shared
    memory. gpu_memory: bytes that may be allocated, None for all. Use it as a context around everything that launches
    or allocates: it makes its CUDA context current and restores the thread's own. One thread at a time.

    arch, capability (10 * major + minor of `arch`), name, sm_count, shared_limit (bytes per block), has_pdl, stream.
    """

    def __init__(self, arch: str | None = None, gpu_memory: int | None = None):
        try:
            self.id = runtime.getDevice()
            properties = runtime.getDeviceProperties(self.id)
            self.driver = Driver()
        except (runtime.CUDARuntimeError, OSError) as error:
            raise Fp4rtError("device", f"no usable NVIDIA GPU: {error}; check the driver with nvidia-smi, or use "
                                       "device='cpu'") from None
        own = properties["major"] * 10 + properties["minor"]
        self.name = properties["name"].decode()
        self.arch, self.capability, self._code = _choose_arch(arch, own, self.name)
        self.sm_count = properties["multiProcessorCount"]
        self.shared_limit = min(SHARED_LIMIT.get(self.capability, 48 << 10), properties["sharedMemPerBlockOptin"])
        self.has_pdl = self.capability >= 90
        self.planning = False
        runtime.free(0)  # creates the context
        self._context = self.driver.current_context()
        self._popped = ctypes.byref(ctypes.c_void_p())
        self.stream = self.launching = cupy.cuda.Stream(non_blocking=True)
        self.crosses = False  # whether the next launch waits for another stream
        self._other_stream = cupy.cuda.Stream(non_blocking=True)
        self._branches = False
        self._parted, self._done = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        self.budget = Budget(self.id, gpu_memory)
        self.memory = Arena(self.budget, "the model", slabs=True)
        self._scratch = Arena(self.budget, "one step's work")
        self._handed_over: dict[int, cupy.ndarray] = {}
        self.modules: dict[tuple, Any] = {}  # by stem and defines
        self._kernels: dict[tuple, Kernel] = {}
        self._clusters: dict[tuple[int, int], int] = {}
        self.chosen: dict[tuple, Any] = {}  # variants by what they were chosen for: choosing takes longer than launching
        self._compiler: ThreadPoolExecutor | None = None
        self._compiling: dict[tuple, Future[Binary]] = {}
        self._rehearsed: list[tuple[str, str, dict[str, int]]] = []
        self._staging = Staging(self)
        self._small = SmallCopies(self)
        self.rooms: dict[int, list[tuple[PinnedMemory, cupy.cuda.Event]]] = {}  # by size: of Fetched, to use again

    def __enter__(self) -> Device:
        self.driver.check(self.driver.push(self._context), "cuCtxPushCurrent")
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.check(self.driver.pop(self._popped), "cuCtxPopCurrent")

    # -- Kernels --------------------------------------------------------------------------------------------------

    def kernel(self, stem: str, entry: str, **defines: int) -> Kernel | Callable[..., None]:
        """The entry of kernels/<stem>.cu compiled with these constants; compiled and loaded at the first call.

        In a rehearsal those that are not there yet are compiled side by side, and loaded at its end.
        """
        key = (stem, entry, *defines.items())
        found = self._kernels.get(key)
        if found is None:
            if self.planning:
                self.prepare(stem, defines)
                self._rehearsed.append((stem, entry, defines))
                return _launch_nothing
            found = self._kernels[key] = Kernel(self, self._module(stem, defines).get_function(entry), entry)
        return found

    def prepare(self, stem: str, defines: dict[str, int]) -> None:
        """Begin to compile (or to read from the disk cache) what `kernel` will be asked for, in another thread."""
        key = (stem, *sorted(defines.items()))
        if key not in self.modules and key not in self._compiling:
            if self._compiler is None:
                self._compiler = ThreadPoolExecutor(min(_COMPILE_THREADS, os.cpu_count() or 1), "fp4rt-compile")
            self._compiling[key] = self._compiler.submit(compile_kernel, stem, self._code, defines)

    def _module(self, stem: str, defines: dict[str, int]) -> Any:
        key = (stem, *sorted(defines.items()))
        if key not in self.modules:
            module = cupy.cuda.function.Module()
            started = self._compiling.pop(key, None)
            binary = started.result() if started else compile_kernel(stem, self._code, defines)
            try:
                module.load(binary.data)
            except cupy.cuda.driver.CUDADriverError as error:
                raise Fp4rtError("device", f"{self.name} cannot load kernels/{stem}.cu for {self._code}: {error}; "
                                           "update the NVIDIA driver") from None
            self.modules[key] = module
        return self.modules[key]

    def clusters(self, size: int, shared: int) -> int:
        """Clusters of `size` blocks that run at once where shared memory (bytes of a block) is what limits them: fewer
        than would fill the chip, whose parts have different numbers of SMs."""
        if (size, shared) not in self._clusters:
            kernel = Kernel(self, self._module("order", {}).get_function("order"), "order")  # one with few registers
            self._clusters[size, shared] = kernel.most_clusters(size, 256, shared)
        return self._clusters[size, shared]

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched within may run at the same time as what is launched after it, until `join`. Neither writes
        what the other touches, scratch memory included: none that is given back meanwhile is handed out again."""
        self.join()
        self._branches = self._scratch.keeps = True
        if not self.planning:
            self._staging.drain()
            self._parted.record(self.stream)
            self._other_stream.wait_event(self._parted)
            self.launching, self.crosses = self._other_stream, True
        try:
            yield
        finally:
            if not self.planning:
                self._done.record(self._other_stream)
                self.launching, self.crosses = self.stream, False

    def join(self) -> None:
        """What follows comes after what was launched beside."""
        if not self._branches:
            return
        self._branches = self._scratch.keeps = False
        if not self.planning:
            self.stream.wait_event(self._done)
            self.crosses = True

    # -- Memory ---------------------------------------------------------------------------------------------------

    def scratch(self, shape: int | Sequence[int], dtype: np.typing.DTypeLike) -> cupy.ndarray:
        """Uninitialised memory within a step. A recorded step may overwrite it when it is repeated, so what outlives
        a step (batches, samplers, drawn ids) belongs in `memory` instead."""
        return self._scratch.array(shape, dtype)

    def rehearse(self, step: Callable[[], object]) -> int:
        """Run `step` without launching or copying anything: the scratch bytes it needs. Its kernels are then loaded."""
        self._staging.drain()
        real, self._scratch, self.planning = self._scratch, Arena(self.budget, "rehearsal", virtual=True), True
        try:
            step()
            nbytes = self._scratch.high_water
        finally:
            self.join()
            self._scratch, self.planning = real, False
            rehearsed, self._rehearsed = self._rehearsed, []
        for stem, entry, defines in rehearsed:
            self.kernel(stem, entry, **defines)
        return nbytes

    def reserve(self, nbytes: int) -> None:
        """Hold this much scratch memory, in one piece, instead of what loading used."""
        self.synchronize()
        self._scratch.reserve(nbytes)

    def zeros(self, shape: int | Sequence[int], dtype: np.typing.DTypeLike) -> cupy.ndarray:
        """Zeroed memory that lasts."""
        array = self.memory.array(shape, dtype)
        runtime.memsetAsync(array.data.ptr, 0, array.nbytes, self.stream.ptr)
        return array

    def handed_over(self, count: int) -> cupy.ndarray:
        """uint64 [count], zero between kernels: through which blocks of one kernel meet. It lasts and is shared."""
        if count not in self._handed_over:
            self._handed_over[count] = self.zeros(count, np.uint64)
        return self._handed_over[count]

    # -- Copies ---------------------------------------------------------------------------------------------------

    def upload(self, host: np.ndarray, into: cupy.ndarray | None = None) -> cupy.ndarray:
        """Copy a host array (it may be a memory-mapped file) to `into` or to new memory that lasts.

        Returns before `host` has been read, which must not change: through pinned buffers, filled by several threads,
        because a copy from pageable memory runs at a fraction of the link's speed. Launches that follow wait their turn
        behind it, so that the order is that of the stream; whatever else touches the stream must `drain` first.
        """
        host = np.ascontiguousarray(host)
        if into is None:
            into = self.memory.array(host.shape, host.dtype)
        if host.nbytes and not self.planning:
            self._staging.upload(host.reshape(-1).view(np.uint8), into)
        return into

    def upload_all(self, hosts: Sequence[np.ndarray]) -> cupy.ndarray:
        """The bytes of host arrays behind each other, uint8, as `upload` brings them, in scratch memory."""
        hosts = [np.ascontiguousarray(host) for host in hosts]
        into, offset = self.scratch(sum(host.nbytes for host in hosts), np.uint8), 0
        for host in hosts if not self.planning else ():
            self._staging.upload(host.reshape(-1).view(np.uint8), into, offset)
            offset += host.nbytes
        return into

    @property
    def uploading(self) -> bool:
        """Whether a launch must wait behind uploads: hand it to `later`."""
        return self._staging.defers

    def later(self, launch: Callable[[], object]) -> None:
        """Call this once everything uploaded so far is on the stream."""
        self._staging.pending.append(launch)

    def drain(self) -> None:
        """Put every upload and the launches behind it on the stream."""
        self._staging.drain()

    def synchronize(self) -> None:
        """Wait until everything asked for is done."""
        self.join()
        self._staging.drain()
        self.stream.synchronize()

    def put(self, host: np.ndarray, into: cupy.ndarray) -> None:
        """Copy a step's small inputs: returns at once, ordered on the stream, `host` may change afterwards."""
        if not self.planning:
            self._staging.drain()
            self._small.put(np.ascontiguousarray(host), into.data.ptr)

    def copy(self, array: cupy.ndarray, into: cupy.ndarray) -> None:
        """Copy a contiguous array to another of the same bytes, in the order of the stream."""
        if not self.planning:
            self.join()
            self._staging.drain()
            runtime.memcpyAsync(into.data.ptr, array.data.ptr, array.nbytes, runtime.memcpyDeviceToDevice,
                                self.stream.ptr)

    def fetch(self, array: cupy.ndarray) -> Fetched:
        """Start copying a contiguous array to the host."""
        self.join()
        self._staging.drain()
        return Fetched(self, array)

    def read(self, array: cupy.ndarray) -> np.ndarray:
        """Copy to the host at once, in a rehearsal too (for what is known from loading)."""
        host = np.empty(array.shape, array.dtype)
        self.synchronize()
        runtime.memcpy(host.ctypes.data, array.data.ptr, array.nbytes, runtime.memcpyDeviceToHost)
        return host

    def close(self) -> None:
        """Give back all memory; no array of this device may be used afterwards."""
        with self:
            self._staging.close()
            self.stream.synchronize()
            if self._compiler is not None:
                self._compiler.shutdown(wait=False, cancel_futures=True)
            self._kernels.clear()
            self.modules.clear()
            self._compiling.clear()
            self._handed_over.clear()
            self._scratch.close()
            self.memory.close()


def _launch_nothing(*args: Any, **kwargs: Any) -> None:
    """What a kernel that is still being compiled does in a rehearsal."""


def _choose_arch(arch: str | None, own: int, name: str) -> tuple[str, int, str]:
    """(architecture, its capability, what to compile for): machine code for the card's own, PTX for an older one."""
    if own < 75:
        raise Fp4rtError("device", f"{name} has compute capability {own // 10}.{own % 10}; fp4rt needs 7.5 or newer")
    native = "sm_90a" if own == 90 else f"sm_{own}"
    if arch is None or arch == native:
        return native, own, native
    capability = int(arch.removeprefix("sm_").removesuffix("a"))
    if capability > own or arch.endswith("a"):
        raise Fp4rtError("device", f"{name} is {native} and cannot run code for {arch}; leave arch out, or name "
                                   "an older one")
    return arch, capability, f"compute_{capability}"
