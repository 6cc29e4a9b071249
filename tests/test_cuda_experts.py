"""Routers, experts and the activations behind linears on the GPU, on every generation's code path, against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import ACTIVATED, EXPERTS, ROUTE, SPREAD_EXPERTS, ExpertsCase, LinearCase, RouteCase, make_weight, mxfp4
from test_cuda_ops import activation, deterministic, ops, residual_stream, values  # noqa: F401

from fp4rt.errors import Fp4rtError
from fp4rt.ops import Routing
from fp4rt.ops.reference import activate, choose

pytestmark = pytest.mark.gpu

HALF = 2.0**-11  # rounding to fp16, relative


def normed(x: np.ndarray, norm) -> np.ndarray:
    """float64, as it enters a product: normalised, or rounded to fp16."""
    if norm is None:
        return x.astype(np.float16).astype(np.float64)
    weight, eps = norm
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * weight


def product(part, x: np.ndarray, error: np.ndarray, rounds: bool) -> tuple[np.ndarray, np.ndarray]:
    """x W^T + bias and how far it may be off, from how far x may be, in float64; see test_cuda_ops.expected."""
    if part.pre_quant_scale is not None:
        x, error, rounds = x * part.pre_quant_scale, error * np.abs(part.pre_quant_scale), True
    w, bias = part.dequantize().astype(np.float64), 0 if part.bias is None else part.bias
    k = x.shape[1]
    relative = 2.0**-23 * (k / 8 + 16) + (6 * HALF / np.sqrt(k) if rounds else 0)
    return x @ w.T + bias, relative * (np.abs(x) @ np.abs(w).T + np.abs(bias)) + error @ np.abs(w).T


def activated(columns: list[np.ndarray], errors: list[np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The activation and its error: what stands at the gate rises by at most 1.2."""
    y = activate(np.concatenate(columns, axis=1), name)
    if name == "relu2":
        return y, 2 * np.sqrt(y) * errors[0] + errors[0]**2
    (gate, up), (gate_error, up_error) = columns, errors
    if name == "swiglu_oai":
        up = np.clip(up, -7, 7) + 1
    slope = np.abs(gate) if name != "swiglu_oai" else np.minimum(np.abs(gate), 7)
    return y, 1.2 * gate_error * (np.abs(up) + up_error) + slope * up_error + 1e-6 * np.abs(y)


@pytest.mark.parametrize("name, case", ACTIVATED, ids=str)
def test_activations_behind_linears(ops, name: str, case: LinearCase):  # noqa: F811
    parts, x, norm, _ = case.build()
    given = residual_stream(ops, x) if norm else activation(ops, x)
    result = ops.linear(given, ops.linear_weight(parts, gated=case.gated), norm=norm and ops.norm_weight(*norm),
                        activation=name)
    inputs = normed(x, norm)
    columns, errors = zip(*(product(part, inputs, np.zeros_like(inputs), norm is not None) for part in parts))
    if len({part.format for part in parts}) > 1:  # gate and up pass through fp16 on their way
        errors = [error + HALF * np.abs(column) + 1e-4 for column, error in zip(columns, errors)]
    y, allowed = activated(list(columns), list(errors), name)
    assert np.abs(y).max() <= result.bound
    np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed + HALF * np.abs(y) + 2.0**(result.exponent - 24))


@pytest.mark.parametrize("name, gated", [("silu", False), ("relu2", True), (None, True), ("gelu", True)])
def test_an_activation_that_does_not_fit_is_refused(ops, name: str | None, gated: bool):  # noqa: F811
    parts, x, _, _ = LinearCase(1, (("BF16", 16), ("BF16", 16)), 64).build()
    with pytest.raises(Fp4rtError, match="activation"):
        ops.linear(activation(ops, x), ops.linear_weight(parts, gated=gated), activation=name)


def test_mxfp4_takes_the_scales_that_bytes_can_hold(ops):  # noqa: F811
    """Rows of 2^-100 and of 2^30; within a row, 2^-24 of the largest scale is exact and 2^-40 nothing."""
    part = mxfp4(np.random.default_rng(0), 48, 128)
    part.codes[:] = 0x22  # 1.0
    part.block_scales[:16], part.block_scales[16:32], part.block_scales[32:] = 27, 157, 0
    part.block_scales[:32, 1] -= 24
    part.block_scales[16:32, 2] = 117
    for block in range(4):
        x = np.zeros((1, 128), np.float32)
        x[0, 32 * block + 5] = 1.0
        y = ops.linear(activation(ops, x), ops.linear_weight([part]), residual=residual_stream(ops, np.zeros((1, 48))))
        expected = part.dequantize()[:, 32 * block + 5].copy()
        expected[16:32] *= block != 2
        np.testing.assert_array_equal(values(ops, y)[0], expected)


@pytest.mark.parametrize("case", ROUTE, ids=str)
def test_route(ops, case: RouteCase):  # noqa: F811
    weight, x, norm, correction, scale = case.build()
    given = residual_stream(ops, x) if norm else activation(ops, x)
    choice = ops.route(given, ops.linear_weight([weight]), case.routing, norm=norm and ops.norm_weight(*norm),
                       correction=None if correction is None else ops.vector(correction),
                       expert_scale=None if scale is None else ops.vector(scale))
    ids, weights = ops.fetch(choice.ids).result(), ops.fetch(choice.weights).result().astype(np.float64)
    inputs = normed(x, norm)
    logits, error = product(weight, inputs, np.zeros_like(inputs), norm is not None)
    expected_ids, _ = choose(logits, case.routing, correction, scale)
    # The weights of what was chosen; the same experts, unless their scores are as near as the logits' errors.
    routing = case.routing
    np.testing.assert_array_equal(ids[:, routing.top_k:], expected_ids[:, routing.top_k:])
    assert (weights[:, routing.top_k:] == 1).all() and ids.shape[1] == weights.shape[1] == routing.slots
    assert (np.abs(weights).sum(axis=1) <= choice.total).all() and choice.always == routing.always
    ids, weights, expected_ids = (array[:, :routing.top_k] for array in (ids, weights, expected_ids))
    everything = Routing(routing.num_experts, routing.num_experts, routing.scoring, normalize=False)
    order, scores = choose(logits, everything, None, None)
    score = np.empty_like(scores)
    np.put_along_axis(score, order, scores, axis=1)
    chosen = np.take_along_axis(score, ids, axis=1)
    expected = chosen / (chosen.sum(axis=1, keepdims=True) if routing.normalize else 1) * routing.scaling
    if scale is not None:
        expected = expected * scale[ids]
    tolerance = 2 * error.max() + 1e-6
    np.testing.assert_allclose(weights, expected, rtol=2 * tolerance, atol=1e-7)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    ranked = score if correction is None else score + correction
    assert np.abs(np.take_along_axis(ranked, ids, axis=1) - np.take_along_axis(ranked, expected_ids, axis=1)).max() <= tolerance
    if norm is None:
        np.testing.assert_array_equal(ids, expected_ids)


@pytest.mark.parametrize("fused", [False, True])
def test_equal_scores_go_to_the_lowest_index(ops, fused: bool):  # noqa: F811
    weight = make_weight(np.random.default_rng(0), "BF16", 64, 32)
    weight.data[1::2] = weight.data[::2]
    weight.data[40:48] = weight.data[3]
    x = np.random.default_rng(1).standard_normal((8 if fused else 9, 32)).astype(np.float16).astype(np.float32)
    given = residual_stream(ops, x) if fused else activation(ops, x)
    choice = ops.route(given, ops.linear_weight([weight]), Routing(64, 12),
                       norm=ops.norm_weight(np.ones(32, np.float32), 1e-5) if fused else None)
    expected, _ = choose(np.round(x.astype(np.float64) @ weight.dequantize().T, 9), Routing(64, 12), None, None)
    np.testing.assert_array_equal(ops.fetch(choice.ids).result(), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_logits_that_are_nan_choose_distinct_experts(ops, fused: bool, scoring: str):  # noqa: F811
    """A weight that is NaN shows them, in their own row alone."""
    weight = make_weight(np.random.default_rng(0), "BF16", 64, 32)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    x[1, 7] = np.nan
    given = residual_stream(ops, x) if fused else activation(ops, x)
    choice = ops.route(given, ops.linear_weight([weight]), Routing(64, 8, scoring),
                       norm=ops.norm_weight(np.ones(32, np.float32), 1e-5) if fused else None)
    ids, weights = ops.fetch(choice.ids).result(), ops.fetch(choice.weights).result()
    assert all(len(set(row)) == 8 and 0 <= min(row) and max(row) < 64 for row in ids.tolist())
    assert np.isnan(weights[1]).all() and np.isfinite(weights[[0, 2]]).all()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_logit_that_is_nan_shows_in_all_weights_of_a_softmax(ops, fused: bool, normalize: bool):  # noqa: F811
    bias = np.zeros(64, np.float32)
    bias[5] = np.nan
    weight = make_weight(np.random.default_rng(0), "BF16", 64, 32, bias=bias)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    choice = ops.route(residual_stream(ops, x) if fused else activation(ops, x), ops.linear_weight([weight]),
                       Routing(64, 8, normalize=normalize),
                       norm=ops.norm_weight(np.ones(32, np.float32), 1e-5) if fused else None)
    ids, weights = ops.fetch(choice.ids).result(), ops.fetch(choice.weights).result()
    assert all(len(set(row)) == 8 and 0 <= min(row) and max(row) < 64 for row in ids.tolist())
    assert np.isnan(weights).all()


def routed(ops, case: RouteCase, rows: slice):  # noqa: F811
    """(ids, weights, normed rows) that a router gives to these rows alone."""
    weight, x, norm, correction, scale = case.build()
    choice = ops.route(residual_stream(ops, x[rows]), ops.linear_weight([weight]), case.routing,
                       norm=ops.norm_weight(*norm), correction=None if correction is None else ops.vector(correction),
                       expert_scale=None if scale is None else ops.vector(scale))
    ids, weights = (ops.fetch(array).result() for array in (choice.ids, choice.weights))
    return ids, weights, values(ops, choice.normed.computed(ops.gpu))


@pytest.mark.parametrize("case", [case for case in ROUTE if case.norm], ids=str)
def test_a_route_does_not_depend_on_company(deterministic, ops, case: RouteCase):  # noqa: F811
    """Up to eight tokens; any number if deterministic."""
    backend = deterministic if case.tokens > 8 else ops
    together = routed(backend, case, slice(None))
    for start in range(case.tokens - 1, 0, -max(1, case.tokens // 7)):
        for alone, all_rows in zip(routed(backend, case, slice(start, None)), together):
            np.testing.assert_array_equal(alone, all_rows[start:])


@pytest.mark.parametrize("case", [case for case in ROUTE if case.norm], ids=str)
def test_a_route_hands_on_the_normed_rows(ops, case: RouteCase):  # noqa: F811
    _, x, norm, _, _ = case.build()
    y = normed(x, norm)
    np.testing.assert_allclose(routed(ops, case, slice(None))[2], y, rtol=1.01 * HALF, atol=1e-6)


def choice_of(ops, ids: np.ndarray, weights: np.ndarray, always: int = 0):  # noqa: F811
    from fp4rt.ops.cuda.route import Choice

    return Choice(ops.gpu.upload(ids), ops.gpu.upload(weights), float(weights.sum(axis=1).max()) * 1.001, always)


def run(ops, case: ExpertsCase, rows: slice = slice(None), weights=None):  # noqa: F811
    up, down, x, ids, shares, norm, residual = case.build()
    weights = weights or (ops.expert_weight(up, gated=case.activation != "relu2"), ops.expert_weight(down))
    given = residual_stream(ops, x[rows]) if norm else activation(ops, x[rows])
    choice = choice_of(ops, ids[rows], shares[rows], case.always)
    return ops.experts(given, choice, *weights, activation=case.activation, norm=norm and ops.norm_weight(*norm),
                       residual=None if residual is None else residual_stream(ops, residual[rows])), weights


def expected_experts(case: ExpertsCase, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """(y, allowed error); what lies between the linears is fp16, too, and so may be a pair's output."""
    up, down, x, ids, shares, norm, residual = case.build()
    inputs = normed(x, norm)
    y, allowed = np.zeros(x.shape), np.zeros(x.shape)
    for e in range(case.num_experts):
        tokens, slots = np.nonzero(ids == e)
        columns, errors = zip(*(product(part, inputs[tokens], np.zeros_like(inputs[tokens]), norm is not None)
                                for part in up[e]))
        inner, error = activated(list(columns), list(errors), case.activation)
        inner, error = product(down[e][0], inner, error, True)
        share = shares[tokens, slots][:, None].astype(np.float64)
        y[tokens] += share * inner
        allowed[tokens] += share * (error + HALF * np.abs(inner)) + 1e-6 * np.abs(share * inner)
    if residual is not None:
        return y + residual, allowed + 2.0**-23 * np.abs(y + residual)
    return y, allowed + HALF * np.abs(y) + 2.0**(exponent - 24)


def check(ops, case: ExpertsCase) -> None:  # noqa: F811
    result, _ = run(ops, case)
    y, allowed = expected_experts(case, getattr(result, "exponent", 0))
    if hasattr(result, "bound"):
        assert np.abs(y).max() <= result.bound
    np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed)


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts(ops, case: ExpertsCase):  # noqa: F811
    check(ops, case)


@pytest.mark.parametrize("case", [case for case in EXPERTS if case.tokens in (9, 11, 33, 70)], ids=str)
def test_deterministic_experts(deterministic, case: ExpertsCase):  # noqa: F811
    check(deterministic, case)


@pytest.mark.parametrize("case", [case for case in EXPERTS if case.tokens == 8], ids=str)
def test_a_token_in_any_company_up_to_eight_gives_the_same_bits(ops, case: ExpertsCase):  # noqa: F811
    together, weights = run(ops, case)
    together = values(ops, together)
    for count in range(1, 8):
        part, _ = run(ops, case, slice(8 - count, 8), weights)
        np.testing.assert_array_equal(values(ops, part), together[8 - count:])


@pytest.mark.parametrize("case", SPREAD_EXPERTS, ids=str)
def test_more_tokens_that_spread_over_experts_have_the_bits_of_eight(ops, case: ExpertsCase):  # noqa: F811
    together, weights = run(ops, case)
    together = values(ops, together)
    for start in range(0, case.tokens, 8):
        rows = slice(start, min(start + 8, case.tokens))
        np.testing.assert_array_equal(values(ops, run(ops, case, rows, weights)[0]), together[rows])


@pytest.mark.parametrize("case", [case for case in EXPERTS if case.tokens in (9, 33, 70, 600)], ids=str)
def test_deterministic_experts_do_not_depend_on_company(deterministic, case: ExpertsCase):  # noqa: F811
    together, weights = run(deterministic, case)
    together = values(deterministic, together)
    for row in range(0, case.tokens, 7):
        alone, _ = run(deterministic, case, slice(row, row + 1), weights)
        np.testing.assert_array_equal(values(deterministic, alone)[0], together[row])


def test_many_tokens_give_the_same_bits_again(ops):  # noqa: F811
    case = next(case for case in EXPERTS if case.tokens == 600)
    first, weights = run(ops, case)
    first = values(ops, first)
    for _ in range(3):
        np.testing.assert_array_equal(values(ops, run(ops, case, weights=weights)[0]), first)


def test_work_beyond_the_scratch_memory_runs_in_slices(ops, monkeypatch):  # noqa: F811
    from fp4rt.ops.cuda import experts

    monkeypatch.setattr(experts, "_PAIRS", 100)
    check(ops, next(case for case in EXPERTS if case.tokens == 70))


def test_experts_of_different_formats_are_refused_by_name(ops):  # noqa: F811
    rng = np.random.default_rng(0)
    parts = [[make_weight(rng, kind, 32, 64)] for kind in ("NVFP4", "BF16")]
    parts[1][0] = dataclasses.replace(parts[1][0], name="layers.0.experts.1.down_proj")
    with pytest.raises(Fp4rtError, match=r"experts\.1\.down_proj is BF16"):
        ops.expert_weight(parts)


def test_experts_are_recorded_and_reserved_like_any_operation(ops):  # noqa: F811
    case = ExpertsCase(2, 8, 2, 96, 80)
    up, down, x, ids, shares, norm, residual = case.build()
    weights = ops.expert_weight(up, gated=True), ops.expert_weight(down)
    router, norm = ops.linear_weight([make_weight(np.random.default_rng(0), "BF16", 8, 96)]), ops.norm_weight(*norm)
    h, stream = ops.gpu.memory.array(x.shape, np.float32), ops.gpu.memory.array(x.shape, np.float32)

    def step():
        choice = ops.route(h, router, Routing(8, 2), norm=norm)
        return ops.experts(h, choice, *weights, activation="silu", norm=norm, residual=stream)

    assert ops.reserve(step) >= 4 * 80 * 2
    before = ops.gpu.budget.used
    replay = ops.record(step)
    results = []
    for seed in (1, 1, 2):
        ops.gpu.upload(np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32), h)
        ops.gpu.upload(residual, stream)
        results.append(values(ops, replay()))
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[0] != results[2]).any() and ops.gpu.budget.used == before
