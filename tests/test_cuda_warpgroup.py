"""Every variant of the warpgroup linears on sm_90a, whichever a shape would choose, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from cases import EXPERTS, AttentionCase, LinearCase, make_weight
from test_cuda_experts import check
from test_cuda_ops import activation, expected, residual_stream, run, values

pytestmark = pytest.mark.gpu

# Rows that end within a block, columns that end within a tile, tokens that end within 8, and two tiles of tokens.
CASES = [*[LinearCase(t, ((kind, 300), (kind, 100)), 1136, bias=True) for kind in ("NVFP4", "MXFP4", "FP8", "BF16")
           for t in (9, 300) if kind != "MXFP4"],
         *[LinearCase(133, ((kind, 200), (kind, 200)), k, gated=True, norm=True)
           for kind in ("NVFP4", "MXFP4", "FP8", "BF16") for k in (1120, 1152)],
         LinearCase(70, (("NVFP4", 323), ), 1040, residual=True), LinearCase(70, (("BF16", 323), ), 1039)]


@pytest.fixture(scope="module")
def ops():
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps()
    if backend.gpu.arch != "sm_90a":
        backend.close()
        pytest.skip("warpgroup products need sm_90a")
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def deterministic(ops):
    from fp4rt.ops.cuda import CudaOps

    backend = CudaOps(deterministic=True)
    yield backend
    backend.close()


@pytest.mark.parametrize("number", range(20))
def test_every_variant(ops, monkeypatch, number: int):
    from fp4rt.ops.cuda import warpgroup

    assert len(warpgroup.VARIANTS) == 20
    variant = warpgroup.VARIANTS[number]
    monkeypatch.setattr(warpgroup, "choose", lambda *_: variant)
    for case in CASES:
        y, allowed, _ = expected(case)
        result, _ = run(ops, case)
        if hasattr(result, "exponent"):
            allowed = allowed + 2.0 ** (result.exponent - 24)
        np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed + 1e-30, err_msg=f"{case}: {variant}")


@pytest.mark.parametrize("number", range(7))
def test_every_variant_that_follows_the_few_token_kernel_has_its_bits(deterministic, monkeypatch, number: int):
    from fp4rt.ops.cuda import warpgroup

    assert len(warpgroup.REPRODUCING) == 7
    variant = warpgroup.REPRODUCING[number]
    monkeypatch.setattr(warpgroup, "choose", lambda *_: variant)
    k = 14336 if variant.sums == 3 else 2704  # of the longer rows, the columns are divided into parts
    for case in (LinearCase(300, (("NVFP4", 300), ), k, residual=True), LinearCase(140, (("BF16", 200), ), k),
                 LinearCase(140, (("FP8", 96), ("FP8", 96)), k, norm=True, gated=True)):
        together, weight = run(deterministic, case)
        for start in range(0, case.tokens, 8):
            few, _ = run(deterministic, case, slice(start, start + 8), weight)
            np.testing.assert_array_equal(values(deterministic, together)[start:start + 8], values(deterministic, few),
                                          err_msg=f"{case}: {variant}")


@pytest.mark.parametrize("tokens", [16, 17, 64, 100, 128, 129, 300, 1024])
def test_the_chosen_variant(ops, tokens: int):
    case = LinearCase(tokens, (("NVFP4", 1040), ), 2048, residual=True)
    y, allowed, _ = expected(case)
    result, _ = run(ops, case)
    np.testing.assert_array_less(np.abs(values(ops, result) - y), allowed + 1e-30)


@pytest.mark.parametrize("kinds", [("NVFP4", "NVFP4"), ("NVFP4", "BF16"), ("FP8", "NVFP4"), ("BF16", "FP8")])
@pytest.mark.parametrize("name", ["relu2", "silu", "gelu_tanh", "swiglu_oai"])
def test_what_goes_to_one_linear_is_the_same_in_its_order(ops, kinds: tuple[str, str], name: str):
    rng, gated = np.random.default_rng(6), name != "relu2"
    up = ops.linear_weight([make_weight(rng, kinds[0], 384, 256) for _ in range(1 + gated)], gated=gated)
    down = ops.linear_weight([make_weight(rng, kinds[1], 200, 384)])
    x = activation(ops, rng.standard_normal((45, 256)))
    h = rng.standard_normal((45, 200))
    ordered = ops.linear(x, up, activation=name, then=down)
    assert ordered.data is None and ordered.shape == (45, 384)
    plain = ops.linear(x, up, activation=name)
    got, want = (values(ops, ops.linear(y, down, residual=residual_stream(ops, h))) for y in (ordered, plain))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("number", range(5))
def test_every_variant_hands_on_the_same_in_order(ops, monkeypatch, number: int):
    from fp4rt.ops.cuda import warpgroup

    variant = [variant for variant in warpgroup.VARIANTS if variant.split == 1][number]
    monkeypatch.setattr(warpgroup, "choose", lambda *_: variant)
    rng = np.random.default_rng(9)
    up = ops.linear_weight([make_weight(rng, "NVFP4", 384, 1120, bias=rng.standard_normal(384).astype(np.float32))
                            for _ in range(2)], gated=True)
    down = ops.linear_weight([make_weight(rng, "NVFP4", 200, 384)])
    x, h = activation(ops, rng.standard_normal((300, 1120))), rng.standard_normal((300, 200))
    got, want = (values(ops, ops.linear(ops.linear(x, up, activation="silu", then=then), down,
                                        residual=residual_stream(ops, h))) for then in (down, None))
    np.testing.assert_array_equal(got, want)


def test_only_a_warpgroup_linear_gets_its_own_order(ops):
    rng = np.random.default_rng(7)
    up = ops.linear_weight([make_weight(rng, "NVFP4", 256, 128) for _ in range(2)], gated=True)
    for down, tokens in (("F32", 20), ("NVFP4", 8)):
        weight = ops.linear_weight([make_weight(rng, down, 64, 256)])
        y = ops.linear(activation(ops, rng.standard_normal((tokens, 128))), up, activation="silu", then=weight)
        assert y.ordered is None and ops.linear(y, weight).shape == (tokens, 64)


# One chunk, a cluster's chunks, chunks that meet in global memory, and 2 heads of 64: a whole tile of columns.
@pytest.mark.parametrize("kind", ["NVFP4", "BF16"])
@pytest.mark.parametrize("case", [AttentionCase(tuple((91 * i % most, 1) for i in range(19)), 2 * group, 2, head_dim)
                                  for most in (50, 1900) for group, head_dim in ((1, 64), (12, 128), (4, 512))], ids=str)
def test_attention_in_the_order_of_its_linear(ops, case: AttentionCase, kind: str):
    _, batch, num_pages = case.batches()
    rng, width = np.random.default_rng(8), case.heads * case.head_dim
    pages = ops.kv_pages(case.shape, num_pages)
    for remembered in (pages.keys, pages.values):
        ops.gpu.upload(rng.standard_normal(remembered.shape).astype(np.float16), remembered)
    qkv = activation(ops, rng.standard_normal((19, case.shape.input_width)))
    o_proj, h = ops.linear_weight([make_weight(rng, kind, 200, width)]), rng.standard_normal((19, 200))
    rope = ops.rope_table(10000.0 ** -np.linspace(0, 1, case.head_dim // 2), 1.0, 2000)
    plain, ordered = (ops.attention(qkv, ops.batch(batch), pages, case.shape, rope=rope, then=then)
                      for then in (None, o_proj))
    assert plain.ordered is None and ordered.data is None and ordered.shape == (19, width)
    got, want = (values(ops, ops.linear(y, o_proj, residual=residual_stream(ops, h))) for y in (ordered, plain))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("number", range(5))
def test_every_variant_for_grouped_experts(ops, monkeypatch, number: int):
    from fp4rt.ops.cuda import experts, warpgroup

    whole = [variant for variant in warpgroup.VARIANTS if variant.split == 1]
    assert len(whole) == 5
    monkeypatch.setattr(experts, "_FEW_PAIRS", 0)
    monkeypatch.setattr(warpgroup, "choose_grouped", lambda *_: (whole[number], whole[number]))
    for case in EXPERTS:
        if case.tokens > 8:
            check(ops, case)
