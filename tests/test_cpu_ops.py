"""Every CPU operation against its meaning in float64, on each instruction set, alone and in company."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import ATTENTION, KINDS, LINEAR, AttentionCase, LinearCase, make_batch, make_weight
from numba.core import caching

from fp4rt.errors import Fp4rtError
from fp4rt.formats.fp8 import E4M3
from fp4rt.ops.cpu import CpuOps, emit, kernels, runtime
from fp4rt.ops.reference import Pages, ReferenceOps, rms_norm, silu

EPS = 2.0**-24  # half a unit in the last place of float32

# What Numba is told to compile for, to run another processor's code here.
TIERS = {
    "avx2": ("haswell", "avx avx2 bmi bmi2 cmov cx16 f16c fma fxsr lzcnt movbe popcnt sse sse2 sse3 sse4.1 sse4.2 "
             "ssse3"),
    "portable": ("x86-64", "cmov cx16 fxsr sse sse2"),
}


@pytest.fixture(scope="module")
def ops():
    return CpuOps()


@pytest.fixture(scope="module")
def deterministic():
    return CpuOps(deterministic=True)


# -- Linears ------------------------------------------------------------------------------------------------------


def run_linear(ops: CpuOps, case: LinearCase, rows: slice = slice(None), parts=None) -> np.ndarray:
    built, x, norm, residual = case.build()
    return ops.linear(x[rows], ops.linear_weight(parts or built, gated=case.gated),
                      norm=ops.norm_weight(*norm) if norm else None, activation="silu" if case.gated else None,
                      residual=None if residual is None else residual[rows].copy())


def expected_linear(case: LinearCase) -> tuple[np.ndarray, np.ndarray]:
    """(y, allowed error) in float64, [T, N].

    A product is a sum of K terms in at least 8 lanes, each rounded once for each addition: K/8 roundings of the
    magnitudes' sum. Norm, scales, bias and residual add at most 16 more.
    """
    parts, x, norm, residual = case.build()
    x = x.astype(np.float64)
    if norm:
        x = rms_norm(x, norm[0].astype(np.float64), norm[1])
    results, errors = [], []
    for part in parts:
        scaled = x if part.pre_quant_scale is None else x * part.pre_quant_scale
        weight = part.dequantize().astype(np.float64)
        bias = np.zeros(len(weight)) if part.bias is None else part.bias
        results.append(scaled @ weight.T + bias)
        errors.append((case.k / 8 + 16) * EPS * (np.abs(scaled) @ np.abs(weight).T + np.abs(bias)))
    if case.gated:
        (gate, up), (gate_error, up_error) = results, errors
        y = silu(gate) * up
        # silu is at most its argument in magnitude and rises by at most 1.1; its exponential is good to 4 roundings.
        return y, 1.1 * gate_error * (np.abs(up) + up_error) + np.abs(gate) * up_error + 8 * EPS * np.abs(y)
    y, error = np.concatenate(results, axis=1), np.concatenate(errors, axis=1)
    return (y, error) if residual is None else (residual + y, error + EPS * np.abs(residual + y))


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("family", ["ops", "deterministic"])
def test_linear(case: LinearCase, family: str, request):
    y = run_linear(request.getfixturevalue(family), case)
    expected, allowed = expected_linear(case)
    assert y.dtype == np.float32 and y.shape == expected.shape
    assert np.all(np.abs(y - expected) <= allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_in_any_company_of_up_to_eight(ops, kind):
    case = LinearCase(8, ((kind, 100), (kind, 37)), 432, norm=True)
    together = run_linear(ops, case)
    for count in range(1, 8):
        for first in (0, 8 - count):
            rows = slice(first, first + count)
            assert np.array_equal(run_linear(ops, case, rows), together[rows]), f"{count} rows from {first}"


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_rows_are_the_same_in_any_company(deterministic, kind):
    case = LinearCase(70, ((kind, 100), (kind, 100)), 2480, gated=True, norm=True)
    together = run_linear(deterministic, case)
    for rows in (slice(0, 1), slice(3, 8), slice(5, 33)):
        assert np.array_equal(run_linear(deterministic, case, rows), together[rows])


@pytest.mark.skipif(runtime.available_threads() < 2, reason="one processor")
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_linears_do_not_depend_on_the_number_of_threads(ops, tokens):
    case = LinearCase(tokens, (("NVFP4", 64), ("FP8/32x48", 50), ("BF16", 7)), 432, norm=True)
    assert np.array_equal(run_linear(ops, case), run_linear(CpuOps(threads=1), case))


def with_arrays(weight, move):
    """The weight with each of its 2-D arrays replaced by move(array)."""
    arrays = {field.name: move(value) for field in dataclasses.fields(weight)
              if isinstance(value := getattr(weight, field.name), np.ndarray) and value.ndim == 2}
    return dataclasses.replace(weight, **arrays)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 20])
def test_weights_are_read_where_they_lie_unaligned_and_no_further(ops, kind, tokens):
    """Arrays as a mapped file has them: read-only, at odd addresses, ending where the mapping ends."""
    if not hasattr(os, "sysconf") or sys.platform == "win32":
        pytest.skip("needs mprotect")
    page = mmap.PAGESIZE
    maps = []

    def to_the_edge(array: np.ndarray) -> np.ndarray:
        if array.dtype == np.float32 and kind.startswith("FP8"):
            return array  # scales become float32 tables of the backend's own
        size = -(-array.nbytes // page) * page
        area = mmap.mmap(-1, size + page)
        maps.append(area)
        base = np.frombuffer(area, np.uint8)
        start = size - array.nbytes
        base[start:size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert libc.mprotect(base.ctypes.data + size, page, 0) == 0
        placed = base[start:size].view(array.dtype).reshape(array.shape)
        placed.setflags(write=False)
        return placed

    case = LinearCase(tokens, ((kind, 37), ), 432)
    part = with_arrays(case.build()[0][0], to_the_edge)
    linear = ops.linear_weight([part])
    codes = next(value for value in vars(part).values() if isinstance(value, np.ndarray) and value.ndim == 2)
    assert np.shares_memory(linear.held[0], codes)
    assert np.array_equal(run_linear(ops, case, parts=[part]), run_linear(ops, case))


def test_fewer_rows_than_a_tile_and_fewer_columns_than_a_chunk(ops):
    rng = np.random.default_rng(0)
    for n, k in ((1, 64), (2, 32), (3, 48), (5, 16)):
        part = make_weight(rng, "NVFP4", n, k)
        x = rng.standard_normal((2, k)).astype(np.float32)
        assert np.allclose(ops.linear(x, ops.linear_weight([part])), x @ part.dequantize().T, rtol=1e-5, atol=1e-6)


def test_a_residual_is_added_in_place(ops):
    case = LinearCase(2, (("BF16", 96), ), 208, residual=True)
    parts, x, _, residual = case.build()
    assert ops.linear(x, ops.linear_weight(parts), residual=residual) is residual


def test_not_a_number_and_infinity_come_through(ops):
    for tokens in (1, 20):
        case = LinearCase(tokens, (("NVFP4", 64), ("NVFP4", 64)), 96, gated=True)
        parts, x, _, _ = case.build()
        linear = ops.linear_weight(parts, gated=True)
        for bad in (np.nan, np.inf):
            x[0, 5] = bad
            y = ops.linear(x, linear, activation="silu")
            assert not ops.is_finite(y[:1]) and ops.is_finite(y[1:])


def test_a_gated_weight_and_its_activation_belong_together(ops):
    parts = LinearCase(1, (("BF16", 8), ("BF16", 8)), 16).build()[0]
    for gated, activation in ((True, None), (False, "silu"), (True, "gelu")):
        with pytest.raises(Fp4rtError):
            ops.linear(np.zeros((1, 16), np.float32), ops.linear_weight(parts, gated=gated), activation=activation)


# -- Attention ----------------------------------------------------------------------------------------------------


def attention_inputs(case: AttentionCase, batch) -> np.ndarray:
    rng = np.random.default_rng(len(batch.tokens))
    return rng.standard_normal((len(batch.tokens), case.shape.input_width)).astype(np.float32)


def run_attention(ops, case: AttentionCase, pages=None) -> np.ndarray:
    fill, batch, num_pages = case.batches()
    rng = np.random.default_rng(2)
    rope = None
    if case.rope:
        inv_freq = 10000.0 ** -(np.arange(0, case.head_dim, 2) / case.head_dim)
        rope = ops.rope_table(inv_freq.astype(np.float32), 1.1, 6000)
    norms = [ops.norm_weight(rng.uniform(0.5, 1.5, case.head_dim).astype(np.float32), 1e-6) if case.norm else None
             for _ in range(2)]
    pages = pages or ops.kv_pages(case.shape, num_pages)
    for each in (fill, batch):
        if each is not None:
            x = attention_inputs(case, each)
            if isinstance(ops, ReferenceOps) and not isinstance(ops, CpuOps):
                x = x.astype(np.float64)
            y = ops.attention(x, ops.batch(each), pages, case.shape, rope=rope, q_norm=norms[0], k_norm=norms[1])
    return y


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention(ops, case: AttentionCase):
    reference = ReferenceOps()
    pages = reference.kv_pages(case.shape, case.batches()[2])
    if not case.fp8_scales:
        pages = Pages(pages.keys.astype(np.float64), pages.values.astype(np.float64), 0)
    expected = run_attention(reference, case, pages)
    y = run_attention(ops, case)
    # A score is a sum of head_dim products; its error, of random sign, multiplies the weights and so the values.
    score = 8 * np.sqrt(case.head_dim)  # no score here is larger in magnitude
    assert np.abs(y - expected).max() <= EPS * (4 * np.sqrt(case.head_dim) * score + 64) * np.abs(expected).max()


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e5])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fp8_pages_hold_the_nearest_codes(ops, backend: str, magnitude: float):
    """Codes of k / k_scale and v / v_scale where the batch's page table says, NaN and infinity saturated."""
    case = AttentionCase(((0, 130), (0, 1)), 4, 2, 48, rope=False, fp8_scales=(0.03, 0.7))
    ops = ops if backend == "cpu" else ReferenceOps()
    _, batch, num_pages = case.batches()
    pages, x = ops.kv_pages(case.shape, num_pages), attention_inputs(case, batch) * np.float32(magnitude)
    x[3, -5:] = np.nan, -np.nan, np.inf, -np.inf, -0.0
    ops.attention(x.copy(), ops.batch(batch), pages, case.shape, rope=None)
    k, v = x.reshape(len(x), -1, 48)[:, 4:6], x.reshape(len(x), -1, 48)[:, 6:]
    finite = E4M3[:0x7F].astype(np.float64)
    for s in range(2):
        for row in range(batch.starts[s], batch.starts[s + 1]):
            page, slot = batch.pages[0, s, batch.positions[row] // 64], batch.positions[row] % 64
            keys = pages.keys[page, :, :, slot] if backend == "cpu" else pages.keys[page, :, slot]
            for codes, values, scale in ((keys, k[row], 0.03), (pages.values[page, :, slot, :48], v[row], 0.7)):
                size = np.fmin(np.abs(values / np.float32(scale)).astype(np.float64), 448)
                nearest = np.abs(size[..., None] - finite).min(axis=-1)
                assert (np.abs(size - finite[codes & 0x7F]) == nearest).all()
                assert (np.signbit(values) == (codes >= 0x80)).all()


def test_a_sequence_attends_alike_alone_and_in_company(ops):
    case = AttentionCase(((100, 40), (0, 7), (511, 1), (256, 65)), 8, 2, 128, window=90, norm=True)
    together = run_attention(ops, case)
    fill, batch, num_pages = case.batches()
    for s, (old, new) in enumerate(case.sequences):
        pages = ops.kv_pages(case.shape, num_pages)
        run_attention(ops, case, pages)
        rows = slice(int(batch.starts[s]), int(batch.starts[s + 1]))
        alone = make_batch([(s, old, new)], case.batches()[1].pages[0])
        rng = np.random.default_rng(2)
        norms = [ops.norm_weight(rng.uniform(0.5, 1.5, case.head_dim).astype(np.float32), 1e-6) for _ in range(2)]
        rope = ops.rope_table((10000.0 ** -(np.arange(0, 128, 2) / 128)).astype(np.float32), 1.1, 6000)
        y = ops.attention(attention_inputs(case, batch)[rows].copy(), ops.batch(alone), pages, case.shape, rope=rope,
                          q_norm=norms[0], k_norm=norms[1])
        assert np.array_equal(y, together[rows])


@pytest.mark.skipif(runtime.available_threads() < 2, reason="one processor")
def test_attention_does_not_depend_on_the_number_of_threads(ops):
    case = AttentionCase(((100, 40), (0, 70), (511, 1)), 4, 2, 32, window=8)
    assert np.array_equal(run_attention(ops, case), run_attention(CpuOps(threads=1), case))


def test_stale_pages_do_not_leak_into_attention(ops):
    """What an earlier sequence left on a page, even NaN, is never seen."""
    case = AttentionCase(((63, 1), (10, 5)), 4, 2, 48)
    pages = ops.kv_pages(case.shape, case.batches()[2])
    pages.keys[...] = pages.values[...] = np.nan
    assert np.array_equal(run_attention(ops, case, pages), run_attention(ops, case))


# -- The rest -----------------------------------------------------------------------------------------------------


def test_embedding_rows(ops):
    rng = np.random.default_rng(0)
    batch = ops.batch(make_batch([(0, 0, 9)], np.ones((1, 1), np.int32)))
    for kind in ("BF16", "F16", "F32", "FP8"):
        weight = make_weight(rng, kind, 101, 48)
        rows = ops.embed(batch, ops.embedding_weight(weight))
        assert rows.dtype == np.float32 and np.array_equal(rows, weight.dequantize()[batch.tokens])


def test_threads_are_what_the_process_may_use():
    assert CpuOps().threads == runtime.available_threads() <= (os.cpu_count() or 1)
    for threads in (0, runtime.available_threads() + 1):
        with pytest.raises(Fp4rtError):
            CpuOps(threads=threads)


def test_the_environment_is_left_alone():
    code = ("import os; before = dict(os.environ); import numba; told = numba.get_num_threads(); "
            "from fp4rt.ops.cpu import CpuOps, runtime\n"
            "with runtime.Threads(1): inside = numba.get_num_threads()\n"
            "print(dict(os.environ) == before, inside, numba.get_num_threads() == told)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "1", "True"]


def test_free_memory_is_known_and_less_than_all(ops):
    free = ops.free_memory()
    assert free is None or 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_code_runs_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """On a disk that is full, and where a file has the name of the cache's directory."""
    monkeypatch.setattr(runtime, "_CACHE", tmp_path / "numba")
    tried = []

    def full(*_: object) -> None:
        tried.append(True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)

    def successor(number):
        return number + 1

    assert runtime.compiled()(successor)(1) == 2 and tried
    (tmp_path / "file").touch()
    runtime._write(tmp_path / "file" / "numba" / "emit.o", b"code")


@pytest.mark.skipif(runtime.TIER == "portable" or "NUMBA_CPU_NAME" in os.environ, reason="runs from a wider processor")
@pytest.mark.parametrize("tier", TIERS)
def test_other_instruction_sets(tier):
    """The same tests in a process that compiles for another processor (a wrong tier would end the process)."""
    name, features = TIERS[tier]
    environment = os.environ | {"NUMBA_CPU_NAME": name,
                                "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features.split())}
    check = f"from fp4rt.ops.cpu import runtime; assert runtime.TIER == {tier!r}, runtime.TIER"
    subprocess.run([sys.executable, "-c", check], env=environment, check=True)
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
                            env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


def test_prepared_inputs_are_padded_to_whole_chunks():
    for layout in emit.LAYOUTS.values():
        assert kernels.PADDING % layout.elements == 0 == kernels.PANEL_COLUMNS % layout.elements
