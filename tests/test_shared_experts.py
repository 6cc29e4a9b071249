"""Shared experts taken as several routed ones that every token takes: the same sums, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import HOST
from cases import make_weight
from fp4rt.formats import Weight, count_parts, split
from fp4rt.inspect import inspect
from fp4rt.loading import Loaded
from fp4rt.ops import Routing
from fp4rt.ops.planning import PlanningOps
from fp4rt.ops.reference import ReferenceOps, activate, choose

CHECKPOINTS = Path(__file__).parent / "checkpoints"
KINDS = ("NVFP4", "MXFP4", "FP8", "FP8/channel", "FP8/32x32", "BF16", "F16", "F32")
FOLDED = "nemotron-h-moe-modelopt-nvfp4"


def mlp(seed: int, kind: str, hidden: int, inner: int, **extra) -> tuple[list[Weight], Weight]:
    rng = np.random.default_rng(seed)
    return [make_weight(rng, kind, inner, hidden, **extra)], make_weight(rng, kind, hidden, inner)


def output(up: Weight, down: Weight, x: np.ndarray) -> np.ndarray:
    """down(relu2(up(x))) in float64."""
    return activate(x @ up.dequantize().T.astype(np.float64), "relu2") @ down.dequantize().T.astype(np.float64)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_values_of_the_whole(kind: str, axis: int):
    whole = make_weight(np.random.default_rng(0), kind, 192, 192)
    for count in (1, 2, 3):
        parts = split(whole, count, axis)
        assert [part.shape[axis] for part in parts] == [192 // count] * count
        np.testing.assert_array_equal(np.concatenate([part.dequantize() for part in parts], axis), whole.dequantize())


@pytest.mark.parametrize("kind, shape, count, axis", [
    ("NVFP4", (32, 96), 4, 1), ("MXFP4", (32, 96), 2, 1), ("FP8/32x32", (96, 96), 2, 0), ("FP8/32x32", (96, 96), 2, 1),
    ("FP8/64x64", (96, 96), 2, 1), ("BF16", (33, 32), 2, 0)])
def test_blocks_are_not_cut(kind: str, shape: tuple[int, int], count: int, axis: int):
    assert split(make_weight(np.random.default_rng(0), kind, *shape), count, axis) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_expert_is_the_sum_of_its_parts(kind: str):
    up, down = mlp(1, kind, 64, 192)
    assert count_parts(up, down, *mlp(2, kind, 64, 64)) == 3
    x = np.random.default_rng(3).standard_normal((5, 64))
    parts = zip(split(up[0], 3, 0), split(down, 3, 1))
    whole = output(up[0], down, x)
    np.testing.assert_allclose(sum(output(*part, x) for part in parts), whole, rtol=0, atol=1e-12 * np.abs(whole).max())


@pytest.mark.parametrize("shared, expert", [
    (("BF16", 64, 128), ("NVFP4", 64, 64)), (("F16", 64, 128), ("BF16", 64, 64)),    # other formats
    (("FP8", 64, 128), ("FP8/channel", 64, 64)), (("FP8/32x32", 64, 128), ("FP8", 64, 64)),  # and granularities
    (("NVFP4", 64, 96), ("NVFP4", 64, 64)), (("NVFP4", 64, 64), ("NVFP4", 64, 128)),  # no multiple
    (("NVFP4", 64, 48), ("NVFP4", 64, 24)), (("FP8/64x64", 64, 192), ("FP8/64x64", 64, 96)),  # scales that would be cut
    (("NVFP4", 64, 128), ("NVFP4", 32, 64)),                                          # another input (a latent space)
], ids=str)
def test_what_is_no_sum_of_experts_stays_whole(shared: tuple, expert: tuple):
    kind, hidden, inner = expert
    like = ([make_weight(np.random.default_rng(0), kind, inner, hidden)],
            make_weight(np.random.default_rng(0), kind, hidden, max(inner, 32)))
    like = like[0], replace(like[1], codes=like[1].codes[:, :inner // 2]) if inner < 32 else like[1]
    assert count_parts(*mlp(1, *shared), *like) == 0


@pytest.mark.parametrize("name, size", [("bias", 128), ("pre_quant_scale", 64)])
def test_a_bias_or_an_input_scale_stays_whole(name: str, size: int):
    shared = mlp(1, "NVFP4", 64, 128, **{name: np.ones(size, np.float32)})
    assert count_parts(*shared, *mlp(2, "NVFP4", 64, 64)) == 0


def test_experts_that_every_token_takes_stand_behind_the_chosen():
    logits = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    routing, scale = Routing(8, 3, "sigmoid", scaling=2.5), np.full(8, 2, np.float32)
    ids, weights = choose(logits, routing, None, scale)
    all_ids, all_weights = choose(logits, replace(routing, always=2), None, scale)
    assert all_ids.dtype == np.int32 and all_weights.dtype == np.float32
    np.testing.assert_array_equal(all_ids, np.hstack([ids, [[8, 9]] * 4]))
    np.testing.assert_array_equal(all_weights, np.hstack([weights, np.ones((4, 2), np.float32)]))


def test_a_step_reads_what_all_tokens_take():
    loaded = Loaded((), (), (0, 0), (), None, experts=130, chosen=6, always=2)
    assert loaded.read() == pytest.approx(8 / 130)
    assert loaded.read(8) == pytest.approx((2 + 128 * (1 - (122 / 128) ** 8)) / 130)
    assert loaded.read(10000) == pytest.approx(1)


@pytest.mark.parametrize("backend", HOST)
@pytest.mark.parametrize("name", [FOLDED, "nemotron-h-moe-bf16-stacked"])
def test_a_model_is_the_same_either_way(name: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    def load() -> fp4rt.LLM:
        return fp4rt.load(CHECKPOINTS / name, max_model_len=64, **HOST[backend][0])

    ids = np.load(CHECKPOINTS / name / "reference" / "reference.npz")["input_ids"].tolist()
    with load() as llm:
        apart, held, step = llm.logits(ids), llm.weight_bytes, llm.step_bytes()
        report = [line.split(", ")[0] for line in llm.report]
        assert any("shared_experts" in one.names[0] for one in llm.linears)
    monkeypatch.setattr(ReferenceOps, "shared_as_experts", True)
    with load() as llm:
        assert not any("shared_experts" in one.names[0] for one in llm.linears)
        experts = [one for one in llm.linears if one.experts]
        assert experts and all(one.always == 2 and "shared_experts" in one.names[-1] for one in experts)
        np.testing.assert_allclose(llm.logits(ids), apart, rtol=0, atol=1e-5 * np.abs(apart).max())
        assert [line.split(", ")[0] for line in llm.report] == report
        # A part has a table entry, a scale for each of its rows and a global scale of its own.
        assert held <= llm.weight_bytes < 1.01 * held and step <= llm.step_bytes() < 1.01 * step


def test_a_plan_counts_what_is_in_the_file(monkeypatch: pytest.MonkeyPatch):
    plans = []
    for as_experts in (False, True):
        make = PlanningOps.__init__
        monkeypatch.setattr(PlanningOps, "__init__", lambda ops, *args, **options: make(
            ops, *args, **options | {"shared_as_experts": as_experts}))
        plans.append(inspect(CHECKPOINTS / FOLDED, device="reference"))
        monkeypatch.undo()
    apart, together = plans
    assert [(kind.format, kind.linears, kind.parameters, kind.bytes) for kind in together.kinds] == [
        (kind.format, kind.linears, kind.parameters, kind.bytes) for kind in apart.kinds]
    assert 0 < together.weight_bytes - apart.weight_bytes < 0.01 * apart.weight_bytes


def test_experts_in_a_latent_space_leave_the_shared_one_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ReferenceOps, "shared_as_experts", True)
    path = CHECKPOINTS / "nemotron-h-latent-modelopt-mixed"
    with fp4rt.load(path, device="reference", max_model_len=64) as llm:
        assert any("shared_experts" in one.names[0] for one in llm.linears)
        assert not any(one.always for one in llm.linears)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_shared_expert_is_quantized_as_a_whole(kind: str, monkeypatch: pytest.MonkeyPatch):
    """So that its values are the same whichever way it is taken."""
    logits = []
    for as_experts in (False, True):
        monkeypatch.setattr(ReferenceOps, "shared_as_experts", as_experts)
        with fp4rt.load(CHECKPOINTS / "nemotron-h-moe-bf16-stacked", device="reference", max_model_len=64,
                        requantize=f"bf16-layers={kind}") as llm:
            logits.append(llm.logits(list(range(3, 30))))
            assert as_experts == any(one.always for one in llm.linears)
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5 * np.abs(logits[0]).max())
