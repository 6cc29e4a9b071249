"""The bench command: its figures are consistent, and what cannot be measured is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.breakdown import OPERATIONS, breakdown
from fp4rt.cli import main
from fp4rt.ops import Ops
from fp4rt.ops.cpu.bandwidth import read_bandwidth
from fp4rt.ops.reference import ReferenceOps
from tiny import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bench") / "m", tokenizer=False)


@pytest.mark.parametrize("device", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_figures(checkpoint: Path, device: str):
    run = CliRunner().invoke(main, ["bench", str(checkpoint), "--device", device, "--prompt-tokens", "20", "--max-tokens",
                                    "10", "--batch", "3", "--repeat", "2", "--json", "-q"])
    assert run.exit_code == 0, run.stderr
    found = json.loads(run.stdout)
    for name in ("prefill", "decode", "first_token"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    with fp4rt.load(checkpoint, device=device) as llm:
        assert found["weight_bytes"] == llm.weight_bytes > llm.step_bytes()
        kv = llm.engine.cache.plan.page_bytes[0] / 64
        assert found["step_bytes"] == round(llm.step_bytes(3) + 3 * 25 * kv)
    if device == "reference":
        assert found["decode_share"] is None
    else:
        share = found["decode"]["median"] / 3 * found["step_bytes"] / found["read_bandwidth"]
        assert found["decode_share"] == pytest.approx(share)
    if device == "cuda":
        share = found["prefill"]["median"] * llm.token_flops(head=False) / found["matrix_rate"]
        assert found["matrix_shares"]["prefill"] == pytest.approx(share) and 1e12 < found["matrix_rate"] < 1e16
    else:
        assert found["matrix_rate"] is found["matrix_shares"] is None


def test_token_flops(checkpoint: Path):
    with fp4rt.load(checkpoint, device="reference") as llm:
        config = llm.engine.model.config
        head = 2 * config.vocab_size * config.hidden_size
        assert llm.token_flops(head=True) - llm.token_flops(head=False) == head
        weights = sum(rows * columns for rows, columns in (one.shape for one in llm.linears))
        assert llm.token_flops(head=True) == 2 * weights
    moe = Path(__file__).parent / "checkpoints" / "qwen3-moe-modelopt-nvfp4-uneven"
    with fp4rt.load(moe, device="reference") as llm:
        experts = [one for one in llm.linears if one.experts]
        others = sum(one.shape[0] * one.shape[1] for one in llm.linears if not one.experts)
        of_token = sum(one.shape[0] // one.experts * (one.chosen + one.always) * one.shape[1] for one in experts)
        assert experts and llm.token_flops(head=True) == pytest.approx(2 * (others + of_token))


def test_text(checkpoint: Path):
    run = CliRunner().invoke(main, ["bench", str(checkpoint), "--device", "reference", "--prompt-tokens", "9",
                                    "--max-tokens", "3", "--repeat", "1"])
    assert run.exit_code == 0 and "prefill" in run.stdout and "decode" in run.stdout and "NVFP4 linears" in run.stderr
    assert "where a step goes" not in run.stdout  # too few steps
    run = CliRunner().invoke(main, ["bench", str(checkpoint), "--device", "reference", "--prompt-tokens", "9",
                                    "--max-tokens", "12", "--repeat", "1", "-q"])
    assert run.exit_code == 0 and "linear gate_proj+up_proj" in run.stdout and "the host, beyond that" in run.stdout


OUTSIDE_STEPS = {"linear_weight", "expert_weight", "vector", "norm_weight", "embedding_weight",
                 "host_embedding_weight", "rope_table", "mamba_weight", "mamba_state", "mamba_state_bytes",
                 "copy_mamba_state", "rehearse", "kv_pages", "kv_page_bytes", "batch", "batch_bytes", "feed",
                 "sampler", "sampler_bytes", "history", "fetch", "record", "is_finite", "free_memory", "expect",
                 "reserve", "synchronize", "close"}


def test_every_operation_of_a_step_is_known():
    named = {name for name, member in vars(Ops).items() if callable(member) and not name.startswith("_")}
    assert named - OUTSIDE_STEPS == set(OPERATIONS)


@each_backend
def test_breakdown(checkpoint: Path, backend: str):
    """All calls of a step are found, with the bytes they read; the model is as before."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 300, (3, 20)).tolist()
    greedy = fp4rt.Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    with fp4rt.load(checkpoint, **BACKENDS[backend][0]) as llm:
        before = [output.ids for output in llm.generate(prompts[:2], greedy)]
        found = breakdown(llm, prompts, 16, 2)
        assert {(kind.operation, kind.label): kind.calls for kind in found.kinds} == {
            ("embed", ""): 1, ("linear", "q_proj+k_proj+v_proj"): 2, ("attention", ""): 2, ("linear", "o_proj"): 2,
            ("linear", "gate_proj+up_proj"): 2, ("linear", "down_proj"): 2, ("logits", "lm_head"): 1, ("sample", ""): 1,
            ("advance", ""): 1}
        weights = sum(kind.bytes for kind in found.kinds if kind.operation in ("linear", "logits"))
        assert weights == sum(one.linear.nbytes for one in llm.linears)
        attention = next(kind for kind in found.kinds if kind.operation == "attention")
        assert attention.bytes == 2 * round(llm.ops.kv_page_bytes(llm.engine.cache.plan.memory[0]) / 64 * 3 * 23)
        assert found.experts_read is None
        assert all(0 < kind.seconds.min <= kind.seconds.median <= kind.seconds.max for kind in found.kinds)
        assert 0 < found.step.min <= found.step.median <= found.step.max
        assert [output.ids for output in llm.generate(prompts[:2], greedy)] == before


@each_backend
@pytest.mark.parametrize("name", ["qwen3-moe-modelopt-nvfp4-kvfp8", "nemotron-h-moe-modelopt-nvfp4"])
def test_experts_that_are_read(name: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    """What a step's tokens took, counted once each; of a shared expert all."""
    monkeypatch.setattr(ReferenceOps, "shared_as_experts", True)
    with fp4rt.load(Path(__file__).parent / "checkpoints" / name, max_model_len=256, **BACKENDS[backend][0]) as llm:
        routing = llm.engine.model.config.routing
        always = 2 * name.startswith("nemotron")  # a shared expert of twice the others' width
        least = (routing.top_k + always) / (routing.num_experts + always)
        alone = breakdown(llm, [[5, 9, 2]], 12, 1)
        assert alone.experts_read == pytest.approx(least)
        together = breakdown(llm, [[5, 9, 2], [100, 3], [7, 7, 7, 8], [42]], 12, 1)
        assert least < together.experts_read <= 1
        for found in (alone, together):
            counted = sum(kind.bytes for kind in found.kinds if kind.operation == "experts")
            held = sum(one.linear.nbytes for one in llm.linears if one.experts)
            assert counted == pytest.approx(found.experts_read * held, rel=1e-6, abs=0.5)  # whole bytes
        assert llm.step_bytes(1) == llm.step_bytes(4, least) < llm.step_bytes(4) < llm.step_bytes(4, 1.0)


def test_what_does_not_fit(checkpoint: Path):
    run = CliRunner().invoke(main, ["bench", str(checkpoint), "--device", "reference", "--prompt-tokens", "600"])
    assert run.exit_code == 1 and "--prompt-tokens and --max-tokens are 728" in run.stderr


def test_timing_of_several_sequences(checkpoint: Path):
    with fp4rt.load(checkpoint, device="reference") as llm:
        llm.generate([[1, 2, 3], [4, 5], [6]], fp4rt.Sampling(temperature=0, max_tokens=4, ignore_eos=True))
        timing = llm.timing
        assert (timing.prompt_tokens, timing.generated_tokens, timing.decoded_tokens) == (6, 12, 9)
        assert timing.started < timing.first_token <= timing.prefilled < timing.finished
        llm.generate([1], fp4rt.Sampling(temperature=0, max_tokens=1))
        assert llm.timing.decode_rate == 0 and llm.timing.prefill_rate > 0


def test_read_bandwidth():
    assert 1e8 < read_bandwidth(nbytes=1 << 26, repeats=3) < 1e13
