"""Every CUDA operation against its meaning in float64, on the card's own architecture and as older ones."""

from __future__ import annotations

import numpy as np
import pytest
from cases import LINEAR, LinearCase

from fp4rt.errors import Fp4rtError

# No exporter writes FP8 blocks that are not a multiple of 128 columns; the kernel has no path for them.
ODD_BLOCKS = [case for case in LINEAR if "32x48" in str(case)]
CASES = [case for case in LINEAR if case not in ODD_BLOCKS]

pytestmark = pytest.mark.gpu

ARCHITECTURES = (None, "sm_75", "sm_80", "sm_86", "sm_89")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: arch or "native")
def ops(request):
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps(arch=request.param)
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def deterministic(ops):
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps(arch=ops.gpu.arch if ops.gpu.arch != "sm_90a" else None, deterministic=True)
    yield backend
    backend.close()


def residual_stream(ops, values: np.ndarray):
    """float32 [T, d] on the device."""
    return ops.gpu.upload(values.astype(np.float32), ops.gpu.scratch(values.shape, np.float32))


def activation(ops, values: np.ndarray):
    """What an operation would hand on: fp16 with exponent 0."""
    from fp4rt.ops.cuda.activation import Activation

    data = ops.gpu.upload(values.astype(np.float16), ops.gpu.scratch(values.shape, np.float16))
    return Activation(data, 0, float(np.abs(values).max()))


def values(ops, array) -> np.ndarray:
    """An activation or a residual as float64."""
    data = getattr(array, "data", array) if hasattr(array, "exponent") else array
    return np.ldexp(ops.fetch(data).result().astype(np.float64), getattr(array, "exponent", 0))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expected(case: LinearCase) -> tuple[np.ndarray, np.ndarray, float]:
    """(y, allowed error, largest magnitude) in float64, [T, N].

    The kernels' products are exact. A tensor core adds 8 (sm_75) or 16 of them at a time and truncates: 2^-23 of the
    magnitudes' sum each time; the sums over warps and the epilogue add a few roundings. fp16 enters with the normalised
    or scaled input (2^-11, errors of independent sign: 2^-11 / sqrt(K) of the magnitudes' sum, six deviations) and with
    the output (2^-11 of it).
    """
    parts, x, norm, residual = case.build()
    x = x.astype(np.float64)
    rounds = norm is not None
    if norm is not None:
        weight, eps = norm
        x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * weight
    else:
        x = x.astype(np.float16).astype(np.float64)
    columns, magnitudes = [], []
    for part in parts:
        scaled, w = x, part.dequantize().astype(np.float64)
        if part.pre_quant_scale is not None:
            scaled, rounds = x * part.pre_quant_scale, True
        bias = 0 if part.bias is None else part.bias
        columns.append(scaled @ w.T + bias)
        magnitudes.append((np.abs(scaled) @ np.abs(w).T + np.abs(bias)))
    relative = 2.0**-23 * (case.k / 8 + 16) + (6 * 2.0**-11 / np.sqrt(case.k) if rounds else 0)
    if case.gated:
        gate, up = columns
        y = silu(gate) * up
        allowed = 1.2 * relative * (magnitudes[0] * np.abs(up) + magnitudes[1] * np.abs(silu(gate)))
        if len({part.format for part in parts}) > 1:  # gate and up pass through fp16 on their way
            allowed += 2.0**-10 * (np.abs(gate * up) + np.abs(y))
    else:
        y = np.concatenate(columns, axis=1)
        allowed = relative * np.concatenate(magnitudes, axis=1)
    if residual is not None:
        return y + residual, allowed + 2.0**-23 * np.abs(y + residual), 0.0
    return y, allowed + 2.0**-11 * np.abs(y), float(np.abs(y).max())


def run(ops, case: LinearCase, rows: slice = slice(None), weight=None):
    parts, x, norm, residual = case.build()
    weight = weight or ops.linear_weight(parts, gated=case.gated)
    x = x[rows]
    return ops.linear(residual_stream(ops, x) if norm else activation(ops, x), weight,
                      norm=ops.norm_weight(*norm) if norm else None, activation="silu" if case.gated else None,
                      residual=None if residual is None else residual_stream(ops, residual[rows])), weight


def test_fp8_blocks_of_other_widths_are_refused_by_name(ops):
    with pytest.raises(Fp4rtError, match="32x48.*multiple of 128"):
        run(ops, ODD_BLOCKS[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(ops, case: LinearCase):
    y, allowed, largest = expected(case)
    result, _ = run(ops, case)
    if hasattr(result, "bound"):
        assert largest <= result.bound
        allowed = allowed + 2.0 ** (result.exponent - 24)
    np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed + 1e-30)


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens in (8, 9, 33, 70)], ids=str)
def test_deterministic_linear_does_not_depend_on_company(deterministic, case: LinearCase):
    together, weight = run(deterministic, case)
    together = values(deterministic, together)
    for row in range(0, case.tokens, 5):
        alone, _ = run(deterministic, case, slice(row, row + 1), weight)
        np.testing.assert_array_equal(values(deterministic, alone)[0], together[row])


@pytest.mark.parametrize("k", [1136, 14336])
@pytest.mark.parametrize("kind", ["NVFP4", "MXFP4", "FP8", "FP8/128x128", "BF16", "F32"])
def test_a_deterministic_linear_adds_up_in_one_order_for_any_number_of_tokens(deterministic, kind: str, k: int):
    """The kernels for few and for many tokens, as seen in float32. The longer rows divide the few-token kernel's
    columns into parts."""
    case = LinearCase(513, ((kind, 72), ), k, residual=True)
    parts, x, _, _ = case.build()
    x *= np.exp2(np.random.default_rng(1).integers(-5, 5, x.shape)).astype(np.float32)
    weight = deterministic.linear_weight(parts)

    def output(rows: slice) -> np.ndarray:
        residual = residual_stream(deterministic, np.zeros((len(x[rows]), 72)))
        return values(deterministic, deterministic.linear(activation(deterministic, x[rows]), weight, residual=residual))

    together = output(slice(None))
    for start, count in ((0, 1), (512, 1), (3, 7), (77, 8), (100, 9), (400, 33), (300, 64), (130, 200)):
        rows = slice(start, start + count)
        np.testing.assert_array_equal(output(rows), together[rows], err_msg=f"{count} rows")


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens == 8], ids=str)
def test_a_row_in_any_company_up_to_eight_gives_the_same_bits(ops, case: LinearCase):
    together, weight = run(ops, case)
    together = values(ops, together)
    for count in range(1, 8):
        part, _ = run(ops, case, slice(8 - count, 8), weight)
        np.testing.assert_array_equal(values(ops, part), together[8 - count:])


@pytest.mark.parametrize("tokens", (1, 2))
def test_rows_normed_by_the_linear_have_the_bits_of_rows_normed_before_it(ops, monkeypatch, tokens: int):
    from fp4rt.ops.cuda import linear

    case, found = LinearCase(tokens, (("NVFP4", 208), ("NVFP4", 208)), 4000, gated=True, norm=True), []
    for most in (0, 2):
        monkeypatch.setattr(linear, "FUSED_NORM_TOKENS", most)
        found.append(values(ops, run(ops, case)[0]))
    np.testing.assert_array_equal(*found)


def test_blocks_that_share_rows_leave_nothing_behind(ops):
    case = LinearCase(8, (("NVFP4", 1700),), 14336)
    parts, x, *_ = case.build()
    weight, given = ops.linear_weight(parts), activation(ops, x)
    replay = ops.record(lambda: [ops.linear(given, weight) for _ in range(20)])
    first, *others = replay()
    first = values(ops, first)
    for other in others:
        np.testing.assert_array_equal(values(ops, other), first)
    for buffer in ops.gpu._handed_over.values():
        assert not ops.fetch(buffer).result().any()


@pytest.mark.parametrize("tokens", (1, 3, 8))
def test_bits_do_not_depend_on_how_many_row_tiles_a_block_takes(ops, monkeypatch, tokens):
    """On a chip of six multiprocessors a block takes so many that its warps add up several, each after the last one."""
    case = LinearCase(tokens, (("NVFP4", 1700),), 14336)
    parts, x, *_ = case.build()
    weight, given = ops.linear_weight(parts), activation(ops, x)
    expected = values(ops, ops.linear(given, weight))
    monkeypatch.setattr(ops.gpu, "sm_count", 6)
    for _ in range(3):
        np.testing.assert_array_equal(values(ops, ops.linear(given, weight)), expected)
    for buffer in ops.gpu._handed_over.values():
        assert not ops.fetch(buffer).result().any()


@pytest.mark.parametrize("kind", ["NVFP4", "FP8", "BF16"])
def test_nothing_overflows_however_large_the_weights(ops, kind: str):
    from cases import make_weight

    rng = np.random.default_rng(3)
    parts = [make_weight(rng, kind, 64, 256) for _ in range(2)]
    parts = [type(p)(**{**p.__dict__, **({"global_scale": 300.0} if kind == "NVFP4" else
                                         {"scales": p.scales * 1e5} if kind == "FP8" else
                                         {"data": p.data + np.uint16(12 << 7)})}) for p in parts]
    x = np.full((3, 256), 8.0, np.float32)
    y = ops.linear(activation(ops, x), ops.linear_weight(parts, gated=True), activation="silu")
    gate, up = (x.astype(np.float64) @ p.dequantize().T for p in parts)
    with np.errstate(over="ignore"):
        want = silu(gate) * up
    assert np.abs(want).max() > 65504 and y.exponent > 0
    np.testing.assert_allclose(values(ops, y), want, rtol=2e-3, atol=2.0 ** (y.exponent - 10))


def test_a_recorded_step_repeats_on_the_same_buffers(ops):
    case = LinearCase(2, (("NVFP4", 64),), 128)
    parts, x, _, _ = case.build()
    weight, given = ops.linear_weight(parts), activation(ops, x)
    replay = ops.record(lambda: ops.linear(given, weight))
    first = values(ops, replay())
    ops.gpu.upload((2 * x).astype(np.float16), given.data)
    np.testing.assert_array_equal(values(ops, replay()), 2 * first)


def test_reserve_is_what_the_step_takes(ops):
    case = LinearCase(40, (("NVFP4", 512),), 256, norm=True)
    parts, x, norm, _ = case.build()
    weight, norm_weight = ops.linear_weight(parts), ops.norm_weight(*norm)
    h = ops.gpu.memory.array(x.shape, np.float32)
    needed = ops.reserve(lambda: ops.linear(h, weight, norm=norm_weight))
    assert needed >= 40 * 256 * 2 + 40 * 512 * 2
    before = ops.gpu.budget.used
    ops.gpu.upload(x, h)
    ops.linear(h, weight, norm=norm_weight)
    assert ops.gpu.budget.used == before


def test_close_gives_all_memory_back():
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps()
    backend.linear_weight(LinearCase(1, (("NVFP4", 4096),), 4096).build()[0])
    assert backend.gpu.budget.used > 8 << 20
    backend.close()
    assert backend.gpu.budget.used == 0


def test_too_little_memory_is_said_in_one_line():
    from fp4rt.errors import Fp4rtError
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps(gpu_memory=4 << 20)
    with pytest.raises(Fp4rtError, match="gpu_memory") as error:
        backend.linear_weight(LinearCase(1, (("BF16", 4096),), 4096).build()[0])
    assert error.value.kind == "memory"
    backend.close()
