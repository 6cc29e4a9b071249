"""Programmatic dependent launch: a kernel may start early and still reads nothing too early.

What the tests of operations put on the device as activations arrives late here: a kernel lets its dependents start at
once, waits, and only then writes it over NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import pytest
import test_cuda_attention
import test_cuda_experts
import test_cuda_mamba
import test_cuda_ops
from cases import ATTENTION, EXPERTS, MAMBA, ROUTE

pytestmark = pytest.mark.gpu

CYCLES = 300_000  # that what is copied comes late: longer than any kernel takes to start
SOURCE = r"""
extern "C" __global__ void late(const uint4* from, uint4* to, int count, long long cycles) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const long long start = clock64();
    while (clock64() - start < cycles);
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}
extern "C" __global__ void hasty(const unsigned* from, unsigned* to) { to[0] = from[0]; }
"""


class Late:
    """A device whose activations arrive late: those that were uploaded, before the next kernel."""

    def __init__(self, gpu, monkeypatch: pytest.MonkeyPatch):
        from fp4rt.ops.cuda.launch import Kernel

        self.gpu, self.module, self.count, self.cycles = gpu, cupy.RawModule(code=SOURCE), 0, CYCLES
        self.pending: list[tuple[cupy.ndarray, cupy.ndarray]] = []
        upload, call = gpu.upload, Kernel.__call__

        def delayed(host: np.ndarray, into: cupy.ndarray | None = None) -> cupy.ndarray:
            array = upload(host, into)
            # Numbers of several tokens; what lasts, such as weights, may be read early.
            if host.ndim == 2 and (host.dtype == np.float16 or host.dtype == np.float32 and into is not None):
                self.delay(array)
            return array

        def launched(kernel: Kernel, *args, **options) -> None:
            if kernel._device is gpu and not gpu.planning:
                self.flush()
            call(kernel, *args, **options)

        monkeypatch.setattr(gpu, "upload", delayed)
        monkeypatch.setattr(Kernel, "__call__", launched)

    def delay(self, array: cupy.ndarray) -> None:
        self.gpu.synchronize()
        words = -(-array.nbytes // 16) * 16
        kept = self.gpu.memory.array(words, np.uint8)
        self.gpu.copy(array, kept[:array.nbytes])
        cupy.cuda.runtime.memsetAsync(array.data.ptr, 0xFF, array.nbytes, self.gpu.stream.ptr)  # NaN
        self.pending.append((kept, array))

    def flush(self) -> None:
        """Let all of them arrive, the last one late."""
        for i, (kept, array) in enumerate(self.pending):
            whole = array.nbytes // 16
            if array.nbytes % 16:  # the rest is not late
                self.gpu.copy(kept[whole * 16:array.nbytes], array.reshape(-1).view(np.uint8)[whole * 16:])
            self.module.get_function("late")((1,), (1024,), (kept, array, np.int32(whole), np.int64(
                self.cycles if i == len(self.pending) - 1 else 0)), stream=self.gpu.stream)
            self.count += 1
        self.pending.clear()


@pytest.fixture(scope="module")
def ops():
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps()
    if not backend.gpu.has_pdl:
        pytest.skip("this GPU starts no kernel early")
    yield backend
    backend.close()


@pytest.fixture
def late(ops, monkeypatch):
    with ops.gpu:
        found = Late(ops.gpu, monkeypatch)
        yield found
        assert found.count


def test_a_kernel_that_does_not_wait_is_too_early(ops, late):
    from fp4rt.ops.cuda.launch import Kernel

    gpu = ops.gpu
    data = gpu.upload(np.ones((1, 64), np.float16))
    found = gpu.zeros(1, np.uint32)
    hasty = Kernel(gpu, late.module.get_function("hasty").kernel, "hasty")
    hasty(1, 1, data, found, pdl=True)  # loads it
    late.cycles = 100 * CYCLES  # for a host that other work keeps from launching at once
    late.delay(data)
    hasty(1, 1, data, found, pdl=True)
    assert gpu.fetch(found).result()[0] == 0xFFFFFFFF


def twice(test: Callable[..., None], *args: Any, **options: Any) -> None:
    """Again once its kernels have been launched: the first launch loads one, and so comes late, too."""
    test(*args, **options)
    test(*args, **options)


@pytest.mark.parametrize("case", test_cuda_ops.CASES, ids=str)
def test_linear(ops, late, case):
    twice(test_cuda_ops.test_linear, ops, case)


@pytest.mark.parametrize("case", ROUTE, ids=str)
def test_route(ops, late, case):
    twice(test_cuda_experts.test_route, ops, case)


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts(ops, late, case):
    twice(test_cuda_experts.test_experts, ops, case)


@pytest.mark.parametrize("case", [*ATTENTION, *test_cuda_attention.MORE], ids=str)
def test_attention(ops, late, case):
    twice(test_cuda_attention.test_attention, ops.gpu, case, deterministic=False)


@pytest.mark.parametrize("case", MAMBA, ids=str)
def test_mamba(ops, late, case):
    twice(test_cuda_mamba.test_mamba, ops.gpu, case)
