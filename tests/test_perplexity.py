"""Perplexity and divergence against their definitions, and what the command says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fp4rt
from fp4rt.cli import main
from fp4rt.errors import Fp4rtError
from fp4rt.perplexity import KEPT, Distributions, Estimate, measure, windows
from tiny import make_checkpoint

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 300, 50)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {linear: make_checkpoint(root / linear, linear=linear) for linear in ("NVFP4", "BF16")}


def log_probabilities(llm: fp4rt.LLM, window: int, stride: int) -> np.ndarray:
    """float64 [len(IDS) - 1, V], one token at a time: its context is what the window that first reaches it holds."""
    rows = []
    for target in range(1, len(IDS)):
        begin = max(0, -(-(target + 1 - window) // stride)) * stride
        logits = llm.logits(IDS[begin:target])[-1].astype(np.float64)
        rows.append(logits - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.array(rows)


@pytest.mark.parametrize("tokens, window, stride", [(90, 32, 16), (90, 32, 31), (7, 32, 16), (33, 32, 1), (2, 2, 1)])
def test_every_token_but_the_first_is_predicted_once(tokens, window, stride):
    predicted = []
    for begin, end, first in windows(tokens, window, stride):
        assert 0 <= begin < first < end <= tokens and end - begin <= window
        predicted += range(first, end)
    assert predicted == list(range(1, tokens))


@pytest.mark.parametrize("window, stride", [(24, 12), (40, 7)])
def test_definitions(checkpoints, window, stride):
    with fp4rt.load(checkpoints["BF16"], device="reference", max_model_len=128) as one, \
            fp4rt.load(checkpoints["NVFP4"], device="reference", max_model_len=128) as two:
        p, q = log_probabilities(one, window, stride), log_probabilities(two, window, stride)
        result, kept = measure(one, IDS, window=window, stride=stride, keep=True)
        compared, _ = measure(two, IDS, window=window, stride=stride, reference=kept)
    nll = -p[np.arange(len(p)), IDS[1:]]
    assert result.tokens == len(IDS) - 1
    assert result.perplexity.mean == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert result.perplexity.error == pytest.approx(np.exp(nll.mean()) * nll.std(ddof=1) / np.sqrt(len(nll)), rel=1e-4)
    top = np.argsort(-p, axis=1, kind="stable")[:, :KEPT]  # the vocabulary of 320 in two parts: the likeliest, the rest
    p_top, q_top = (np.take_along_axis(x, top, 1) for x in (p, q))
    p_rest, q_rest = (1 - np.exp(x).sum(axis=1) for x in (p_top, q_top))
    kl = (np.exp(p_top) * (p_top - q_top)).sum(axis=1) + p_rest * np.log(p_rest / q_rest)
    assert compared.comparison.divergence.mean == pytest.approx(kl.mean(), rel=1e-3)
    full = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert 0.9 * full < compared.comparison.divergence.mean <= full
    assert compared.comparison.top_agreement.mean == np.mean(p.argmax(1) == q.argmax(1))
    difference = -q[np.arange(len(q)), IDS[1:]] - nll
    assert compared.comparison.nll_difference.mean == pytest.approx(difference.mean(), abs=1e-5)


def test_a_run_does_not_differ_from_itself(checkpoints, tmp_path):
    with fp4rt.load(checkpoints["NVFP4"], device="reference", max_model_len=128) as llm:
        first, kept = measure(llm, IDS, keep=True)
        kept.save(tmp_path / "run.npz")
        again, _ = measure(llm, IDS, reference=Distributions.load(tmp_path / "run.npz", 320))
    assert again.nll == first.nll and again.comparison.top_agreement == Estimate(1.0, 0.0)
    assert again.comparison.nll_difference == Estimate(0.0, 0.0) and abs(again.comparison.divergence.mean) < 1e-6


def test_requests(checkpoints, tmp_path):
    with fp4rt.load(checkpoints["NVFP4"], device="reference", max_model_len=64) as llm:
        _, kept = measure(llm, IDS, keep=True)
        for ids, arguments, message in (
                ([1], {}, "at least 2"), (IDS, dict(window=65), "--window"), (IDS, dict(window=1), "--window"),
                (IDS, dict(window=32, stride=32), "--stride"), (IDS, dict(stride=0), "--stride"),
                (IDS[::-1], dict(reference=kept), "another text"),
                (IDS, dict(reference=kept, window=48), "another text")):
            with pytest.raises(Fp4rtError, match=message):
                measure(llm, ids, **arguments)
    path = tmp_path / "run.npz"
    kept.save(path)
    with pytest.raises(Fp4rtError, match="another model"):
        Distributions.load(path, 100)
    np.savez(tmp_path / "other.npz", **{**kept.__dict__, "version": 1, "rest": kept.rest[1:]})
    path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "text.npz").write_text("no numbers")
    for name in ("run.npz", "text.npz", "other.npz", "missing.npz"):
        with pytest.raises(Fp4rtError, match=name):
            Distributions.load(tmp_path / name, 320)


def test_command(checkpoints, tmp_path):
    text, run = tmp_path / "text.txt", tmp_path / "run.npz"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    common = ["--file", str(text), "--device", "reference", "--window", "64", "-q"]
    saved = CliRunner().invoke(main, ["perplexity", str(checkpoints["BF16"]), *common, "--save-logits", str(run)])
    assert saved.exit_code == 0 and saved.stdout.startswith("perplexity ") and saved.stderr == ""
    found = CliRunner().invoke(main, ["perplexity", str(checkpoints["NVFP4"]), *common, "--reference", str(run), "--json"])
    figures = json.loads(found.stdout)
    assert figures["tokens"] == len(text.read_text()) - 1 and 0 < figures["divergence"]["mean"] < 2
    assert figures["perplexity"]["mean"] == pytest.approx(np.exp(figures["nll"]["mean"]))
    text.write_text("ab")
    single = CliRunner().invoke(main, ["perplexity", str(checkpoints["BF16"]), *common, "--max-tokens", "2", "--json"])
    figures = json.loads(single.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert figures["tokens"] == 1 and figures["nll"]["error"] is None
    for path in (tmp_path, tmp_path / "none" / "run.npz"):
        kept = CliRunner().invoke(main, ["perplexity", str(tmp_path / "no model"), *common, "--save-logits", str(path)])
        assert kept.exit_code == 1 and f"{path}: cannot be written" in kept.stderr
    missing = CliRunner().invoke(main, ["perplexity", str(checkpoints["BF16"]), "--file", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "none: cannot be read" in missing.stderr
