"""The bench command: its figures are consistent, and what cannot be measured is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import fp4rt
from fp4rt.cli import main
from fp4rt.ops.cpu.bandwidth import read_bandwidth
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


def test_text(checkpoint: Path):
    run = CliRunner().invoke(main, ["bench", str(checkpoint), "--device", "reference", "--prompt-tokens", "9",
                                    "--max-tokens", "3", "--repeat", "1"])
    assert run.exit_code == 0 and "prefill" in run.stdout and "decode" in run.stdout and "NVFP4 linears" in run.stderr


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
