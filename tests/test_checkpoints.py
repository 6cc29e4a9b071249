"""Checkpoints as the real tools export them: logits and greedy tokens against Hugging Face transformers in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend

ROOT = Path(__file__).parent / "checkpoints"
NAMES = sorted(path.parent.name for path in ROOT.glob("*/config.json"))


# Where float32 itself all but ties: from this row of the prompt on, a router's two best experts are so close (here
# 0.0002 standard deviations) that 16-bit activations may rightly choose the other one, and the text goes its own way.
NEAR_TIES = {"gemma4-moe-modelopt-nvfp4": 16}


def greedy(count: int) -> fp4rt.Sampling:
    return fp4rt.Sampling(temperature=0, max_tokens=count, ignore_eos=True)


def assert_greedy(found: list[int], expected: np.ndarray, logits: np.ndarray, error: float) -> None:
    """Equal tokens, up to the first step whose top two logits are closer than twice the allowed error."""
    for step, (a, b) in enumerate(zip(found, expected.tolist(), strict=True)):
        if a != b:
            second, first = np.sort(logits[step])[-2:]
            assert first - second <= 2 * error, f"token {step} is {a}, expected {b} by a margin of {first - second}"
            return


def test_there_are_checkpoints_of_every_architecture():
    assert len(NAMES) >= 10


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens(name: str, backend: str):
    arguments, tolerance = BACKENDS[backend]
    reference = np.load(ROOT / name / "reference" / "reference.npz")
    ids, expected = reference["input_ids"].tolist(), reference["prompt_logits"]
    allowed = tolerance * np.abs(expected).max()
    with fp4rt.load(ROOT / name, max_model_len=128, **arguments) as llm:
        rows = NEAR_TIES.get(name) if llm.ops.name == "cuda" else None
        assert np.abs(llm.logits(ids) - expected)[:rows].max() <= allowed
        if rows is not None:
            return
        output = llm.generate(ids, greedy(len(reference["greedy_ids"])))[0]
        assert output.finish_reason == "length"
        assert_greedy(output.ids, reference["greedy_ids"], reference["greedy_logits"], allowed)


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_prefill(name: str, backend: str):
    """The logits that chose each token, computed token by token, are those of one pass over the whole text."""
    arguments, tolerance = BACKENDS[backend]
    reference = np.load(ROOT / name / "reference" / "reference.npz")
    ids = reference["input_ids"].tolist()
    with fp4rt.load(ROOT / name, max_model_len=128, **arguments) as llm:
        generated = llm.generate(ids, greedy(12))[0].ids
        logits = llm.logits(ids + generated)[len(ids) - 1:-1]
        assert_greedy(generated, logits.argmax(axis=1), logits, 2 * tolerance * np.abs(logits).max())
