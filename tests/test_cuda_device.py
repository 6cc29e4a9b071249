"""Uploads run ahead of the stream and keep its order; kernels are compiled side by side and once."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.gpu
pytest.importorskip("cupy")


@pytest.fixture
def device():
    from fp4rt.ops.cuda.device import Device

    device = Device()
    with device:
        yield device
    device.close()


@pytest.mark.parametrize("nbytes", [1, 16, (4 << 20) - 1, (4 << 20) + 3, 150 << 20])
def test_an_upload_arrives_whole(device, nbytes: int):
    """The largest takes twice the pinned memory there is."""
    host = np.frombuffer(np.random.default_rng(0).bytes(nbytes), np.uint8)
    np.testing.assert_array_equal(device.fetch(device.upload(host)).result(), host)


def test_arrays_are_uploaded_behind_each_other(device):
    """Pieces that lie behind each other in pinned memory as well are one copy; others, and those over its edges, are not."""
    rng = np.random.default_rng(0)
    hosts = [np.frombuffer(rng.bytes(n), np.uint8) for n in (1, 512, 256, 5 << 20, 255, 4096, 0, 768, 1 << 22, 3)] * 3
    hosts[4] = rng.standard_normal((8, 16)).astype(np.float32)[:, ::2]
    got = device.fetch(device.upload_all(hosts)).result()
    np.testing.assert_array_equal(got, np.concatenate([np.ascontiguousarray(h).reshape(-1).view(np.uint8) for h in hosts]))
    assert not device.upload_all([np.zeros(0, np.uint8)]).nbytes


def test_launches_take_their_turn_behind_uploads(device):
    """Each of many uploads to one place is copied away by a launch before the next one overwrites it."""
    rng = np.random.default_rng(0)
    hosts = [rng.standard_normal((3, 1 + 70000 * (i % 7)), np.float32) for i in range(60)]
    rows = device.upload(np.array([2, 0, 1], np.int32))
    place, copies = device.memory.array(3 * 420001, np.float32), []
    for host in hosts:
        x = place[:host.size].reshape(host.shape)
        device.upload(host, x)
        copies.append(device.memory.array(host.shape, np.float32))
        device.kernel("embedding", "gather_rows")(3, 256, rows, x, copies[-1], host.shape[1], pdl=True)
    for host, copy in zip(hosts, copies):
        np.testing.assert_array_equal(device.fetch(copy).result(), host[[2, 0, 1]])
    assert not device.uploading


def test_memory_is_not_handed_on_before_its_copy(device):
    """An array that nobody holds any more keeps its memory until what was uploaded to it is on the stream."""
    kept = device.upload(np.full(1 << 20, 7, np.uint8))
    for value in range(100):
        device.upload(np.full(1 << 20, value, np.uint8), device.scratch(1 << 20, np.uint8))
    last = device.scratch(1 << 20, np.uint8)
    device.upload(np.full(1 << 20, 9, np.uint8), last)
    assert (device.fetch(last).result() == 9).all() and (device.fetch(kept).result() == 7).all()


def test_closing_with_uploads_under_way():
    from fp4rt.ops.cuda.device import Device

    device = Device()
    with device:
        for _ in range(30):
            device.upload(np.zeros(1 << 22, np.uint8))
    device.close()
    assert device.budget.used == 0


def test_a_rehearsal_compiles_and_loads_what_it_meets(device, tmp_path, monkeypatch):
    from fp4rt.ops.cuda import device as module

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled, compile_kernel = [], module.compile_kernel

    def counted(stem, arch, defines):
        compiled.append((stem, *defines.items()))
        return compile_kernel(stem, arch, defines)

    monkeypatch.setattr(module, "compile_kernel", counted)
    x, rows = device.upload(np.arange(12, dtype=np.float32).reshape(3, 4)), device.upload(np.array([1], np.int32))
    out = device.zeros((1, 4), np.float32)

    def step():
        device.kernel("embedding", "gather_rows")(1, 256, rows, x, out, 4, pdl=True)
        device.kernel("embedding", "softcap")((1, 1), 256, out, 4, 1e9, pdl=True)
        device.kernel("batch", "advance")

    device.prepare("embedding", {})
    device.rehearse(step)
    device.rehearse(step)
    assert not device.fetch(out).result().any()  # nothing ran
    step()
    np.testing.assert_allclose(device.fetch(out).result(), [[4, 5, 6, 7]], rtol=1e-5)
    assert sorted(compiled) == [("batch",), ("embedding",)]
