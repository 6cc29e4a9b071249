"""Work beside the stream: it overlaps with what is launched after it, and nothing behind `join` comes too early."""

from __future__ import annotations

import cupy
import numpy as np
import pytest
from cases import make_weight

from fp4rt.ops import Routing

pytestmark = pytest.mark.gpu

SOURCE = r"""
extern "C" __global__ void slow(float* to) {
    const long long start = clock64();
    while (clock64() - start < 3000000);
    to[0] = 1;
}
extern "C" __global__ void read(const volatile float* from, float* to) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    to[0] = from[0];
}
"""


@pytest.fixture(scope="module")
def ops():
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps()
    with backend.gpu:
        yield backend
    backend.close()


@pytest.mark.parametrize("recorded", (False, True), ids=("launched", "recorded"))
@pytest.mark.parametrize("joins", (False, True), ids=("beside", "joined"))
def test_what_follows_waits_once_it_joins(ops, joins, recorded):
    from fp4rt.ops.cuda.launch import Kernel

    gpu, module = ops.gpu, cupy.RawModule(code=SOURCE)
    slow, read = (Kernel(gpu, module.get_function(name).kernel, name) for name in ("slow", "read"))
    written, found = gpu.zeros(1, np.float32), gpu.zeros(1, np.float32)
    for kernel, arguments in (slow, (written,)), (read, (written, found)):
        kernel(1, 1, *arguments)  # loads it
    gpu.copy(gpu.zeros(1, np.float32), written)

    def step():
        with gpu.beside():
            slow(1, 1, written)
        if joins:
            gpu.join()
        read(1, 1, written, found, pdl=True)

    (ops.record(step) if recorded else step)()
    assert gpu.fetch(found).result()[0] == joins
    assert gpu.fetch(written).result()[0] == 1  # the host's view joins, too


def test_memory_given_back_meanwhile_is_not_handed_out(ops):
    gpu = ops.gpu
    with gpu.beside():
        address = gpu.scratch(1000, np.float32).data.ptr
        assert gpu.scratch(1000, np.float32).data.ptr != address
    assert gpu.scratch(1000, np.float32).data.ptr != address
    gpu.join()
    assert gpu.scratch(1000, np.float32).data.ptr == address


@pytest.mark.parametrize("tokens", (1, 8, 40, 300))
def test_a_router_beside_a_linear_changes_nothing(ops, monkeypatch, tokens):
    part, parted = ops.gpu.beside, []
    monkeypatch.setattr(ops.gpu, "beside", lambda: parted.append(tokens) or part())
    rng = np.random.default_rng(tokens)
    hidden, inner, count = 512, 256, 16

    def weight(rows: int, columns: int, kind: str = "NVFP4"):
        return make_weight(rng, kind, rows, columns)

    router, norm = ops.linear_weight([weight(count, hidden, "BF16")]), ops.norm_weight(np.ones(hidden), 1e-6)
    dense = ops.linear_weight([weight(hidden, hidden)])
    up = ops.expert_weight([[weight(inner, hidden), weight(inner, hidden)] for _ in range(count)], gated=True)
    down = ops.expert_weight([[weight(hidden, inner)] for _ in range(count)])
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    h, stream = ops.gpu.memory.array(x.shape, np.float32), ops.gpu.memory.array(x.shape, np.float32)

    def step(beside: bool):
        choice = ops.route(h, router, Routing(count, 4), norm=norm, beside=beside)
        y = ops.linear(ops.linear(h, dense, norm=norm), dense)
        routed = ops.experts(h, choice, up, down, activation="silu", norm=norm)
        return ops.merge(stream, [(y, norm), (routed, norm)])

    results = []
    for beside in (False, True):
        replay = ops.record(lambda: step(beside))
        for run in (lambda: step(beside), replay, replay):
            ops.gpu.upload(x, h)
            ops.gpu.upload(np.zeros_like(x), stream)
            results.append(ops.gpu.fetch(run()).result())
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert bool(parted) == (tokens <= 256)  # more fill the chip by themselves
