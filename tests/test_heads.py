"""Heads and token tables: tied or not, stored once or twice, quantized or not, under either name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.checkpoint import Checkpoint
from fp4rt.formats import read_weight
from fp4rt.inspect import inspect
from tiny import Arrays, make_config, make_tensors, weight, write_tensors

TABLE, HEAD = "model.embed_tokens", "lm_head"
VALUES = np.random.default_rng(6).standard_normal((320, 64)).astype(np.float32)
KINDS = ("BF16", "FP8", "FP8/channel", "NVFP4", "NVFP4/packed")


def write(path: Path, change: Arrays, *, tied: bool, without: str = "nothing") -> Path:
    """A Llama in BF16, tied or not as config.json says, whose linear in `change` is that one."""
    path.mkdir()
    tensors = make_tensors(make_config(), "BF16", None if tied else "BF16", seed=3)
    replaced = {f"{name.rpartition('.')[0]}.weight" for name in change} | {f"{without}.weight"}
    write_tensors(path, {name: tensors[name] for name in tensors if name not in replaced} | change)
    (path / "config.json").write_text(json.dumps(make_config(head=None if tied else "BF16")))
    return path


def logits(path: Path, backend: str) -> np.ndarray:
    with fp4rt.load(path, max_model_len=64, **BACKENDS[backend][0]) as llm:
        assert abs(inspect(path, max_model_len=64, **BACKENDS[backend][0]).weight_bytes - llm.weight_bytes) < 20_000
        return llm.logits([5, 9, 300, 2, 77])


def assert_close(found: np.ndarray, expected: np.ndarray, backend: str) -> None:
    assert np.abs(found - expected).max() <= BACKENDS[backend][1] * np.abs(expected).max()


@each_backend
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_is_used_whatever_the_config_says(tmp_path: Path, kind: str, backend: str):
    head = weight(HEAD, VALUES, kind)
    tied, untied = (write(tmp_path / str(tied), head, tied=tied) for tied in (True, False))
    assert_close(logits(tied, backend), logits(untied, backend), backend)
    found = inspect(tied, device="reference")
    assert not found.architecture["tie_word_embeddings"]
    assert found.parameters == inspect(untied, device="reference").parameters


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_a_copy_of_the_table_shares_its_memory(tmp_path: Path, device: str):
    once = write(tmp_path / "once", {}, tied=True)
    table = make_tensors(make_config(), "BF16", None, seed=3)[f"{TABLE}.weight"]
    twice = write(tmp_path / "twice", {f"{HEAD}.weight": table}, tied=True)
    with fp4rt.load(once, device=device) as one, fp4rt.load(twice, device=device) as two:
        assert one.weight_bytes == two.weight_bytes == inspect(twice, device=device).weight_bytes
        assert "tied" in two.checkpoint.skipped[f"{HEAD}.weight"]
        assert inspect(twice, device=device).architecture["tie_word_embeddings"]
        assert (one.logits([1, 2, 3]) == two.logits([1, 2, 3])).all()


def test_a_tied_table_may_lie_under_either_name(tmp_path: Path):
    table = make_tensors(make_config(), "BF16", None, seed=3)[f"{TABLE}.weight"]
    other = write(tmp_path / "head", {f"{HEAD}.weight": table}, tied=True, without=TABLE)
    assert (logits(other, "reference") == logits(write(tmp_path / "table", {}, tied=True), "reference")).all()


@each_backend
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_token_table(tmp_path: Path, kind: str, tied: bool, backend: str):
    path = write(tmp_path / "quantized", weight(TABLE, VALUES, kind), tied=tied)
    exact = read_weight(Checkpoint(path).at(TABLE), 320, 64).dequantize()
    plain = write(tmp_path / "plain", {f"{TABLE}.weight": ("F32", exact)}, tied=tied)
    assert_close(logits(path, backend), logits(plain, backend), backend)
