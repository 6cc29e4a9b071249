"""Kernel launches through the driver's cuLaunchKernelEx, which CuPy does not offer: it allows dependent launch.

Programmatic dependent launch (sm_90 and later): a kernel that was launched with it may start while the one before it
on the stream is still running, and must execute griddepcontrol.wait before it touches anything the others write or
read. Every kernel launched so must wait in some block, or the kernel after it would not wait for those before; a block
that touches nothing may leave without a wait. The first one behind another stream's work is launched without it.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cupy

from fp4rt.errors import Fp4rtError

if TYPE_CHECKING:
    from fp4rt.ops.cuda.device import Device

_MAX_ARGUMENTS = 32
_CLUSTER_DIMENSION = 4                  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_SHARED_WITHOUT_ASKING = 32 << 10                # static shared memory counts towards the driver's 48 KB, too
_MAX_DYNAMIC_SHARED = 8                 # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_CARVEOUT = 9                    # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, percent
_CLUSTER_POLICY, _BALANCE = 15, 2       # CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE, ..._LOAD_BALANCING


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)]


class Driver:
    """The few driver calls fp4rt makes itself; a failing one raises Fp4rtError("device")."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        self._library = ctypes.CDLL(name)
        self.most_clusters = self._library.cuOccupancyMaxActiveClusters
        # These take microseconds, and a step makes hundreds of them: they keep the GIL, which they would else have to
        # get back each time from a thread that is busy, such as a server's.
        quick = ctypes.PyDLL(name)
        self.launch = quick.cuLaunchKernelEx
        self.launch.argtypes = [ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.push = quick.cuCtxPushCurrent_v2
        self.push.argtypes = [ctypes.c_void_p]
        self.pop = quick.cuCtxPopCurrent_v2
        self.pop.argtypes = [ctypes.POINTER(ctypes.c_void_p)]

    def check(self, status: int, what: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise Fp4rtError("device", f"{what}: {(text.value or b'unknown error').decode()} (CUDA error {status})")

    def current_context(self) -> int:
        context = ctypes.c_void_p()
        self.check(self._library.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        return context.value

    def set_attribute(self, function: int, attribute: int, value: int, what: str) -> None:
        self.check(self._library.cuFuncSetAttribute(ctypes.c_void_p(function), attribute, value), what)


class Kernel:
    """One entry of a loaded module.

    Call it with grid and block (an int or up to three), then the arguments: int -> int32, float -> float32,
    array -> its address, None -> a null pointer. `shared`: dynamic shared bytes per block. `pdl`: see above; it has no
    effect on architectures without it. An empty grid launches nothing. Not for use from two threads at once, like the
    Device it belongs to.
    """

    def __init__(self, device: Device, function: Any, name: str):
        self.name = name
        self._device, self._function, self._pointer = device, function, function.ptr
        self._slots = (ctypes.c_uint64 * _MAX_ARGUMENTS)()
        base = ctypes.addressof(self._slots)
        self._parameters = (ctypes.c_void_p * _MAX_ARGUMENTS)(*(base + 8 * i for i in range(_MAX_ARGUMENTS)))
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
        self._config = _Config(attributes=ctypes.pointer(self._attribute))
        self._config_pointer = ctypes.byref(self._config)
        self._shared_allowed = 0
        # One split between L1 and shared memory for all kernels: an SM must be idle to change it, so two kernels with
        # different ones could not overlap.
        device.driver.set_attribute(self._pointer, _SHARED_CARVEOUT, 100, name)
        if device.has_pdl:  # a cluster's blocks else crowd few SMs
            device.driver.set_attribute(self._pointer, _CLUSTER_POLICY, _BALANCE, name)

    def most_clusters(self, size: int, block: int, shared: int) -> int:
        """Clusters of `size` blocks, each of so many threads and dynamic shared bytes, that run at once."""
        driver, found = self._device.driver, ctypes.c_int()
        attribute = _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(size, 1, 1))
        config = _Config((size, 1, 1), (block, 1, 1), shared, None, ctypes.pointer(attribute), 1)
        driver.set_attribute(self._pointer, _MAX_DYNAMIC_SHARED, shared, self.name)
        driver.check(driver.most_clusters(ctypes.byref(found), ctypes.c_void_p(self._pointer), ctypes.byref(config)),
                     "cuOccupancyMaxActiveClusters")
        return found.value

    def __call__(self, grid: int | Sequence[int], block: int | Sequence[int], *args: Any, shared: int = 0,
                 pdl: bool = False) -> None:
        device, grid, block = self._device, _three(grid), _three(block)
        if device.planning or 0 in grid:
            return
        if device.uploading:
            device.later(lambda: self(grid, block, *args, shared=shared, pdl=pdl))
            return
        codes, values = [], []
        for value in args:
            if isinstance(value, cupy.ndarray):
                codes.append("Q")
                values.append(value.data.ptr)
            elif isinstance(value, int):
                codes.append("i4x")
                values.append(value)
            elif isinstance(value, float):
                codes.append("f4x")
                values.append(value)
            elif value is None:
                codes.append("Q")
                values.append(0)
            else:
                raise TypeError(f"{self.name}: cannot pass a {type(value).__name__} to a kernel")
        struct.pack_into("=" + "".join(codes), self._slots, 0, *values)
        config = self._config
        config.grid[:] = grid
        config.block[:] = block
        config.shared = shared
        config.stream = device.launching.ptr
        config.count = 1 if pdl and device.has_pdl and not device.crosses else 0
        device.crosses = False
        if shared > max(self._shared_allowed, _SHARED_WITHOUT_ASKING):
            device.driver.set_attribute(self._pointer, _MAX_DYNAMIC_SHARED, shared, self.name)
            self._shared_allowed = shared
        status = device.driver.launch(self._config_pointer, self._pointer, self._parameters, None)
        if status:
            device.driver.check(status, f"launching {self.name} with grid {grid}, block {block}, {shared} shared bytes")


def _three(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes, 1, 1) if isinstance(sizes, int) else (*sizes, *(1,) * (3 - len(sizes)))
