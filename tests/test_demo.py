"""The demo checkpoint answers what it has never seen: held-out sums, lists, copies, facts and questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fp4rt

ITEMS = [json.loads(line) for line in (Path(__file__).parent / "demo_heldout.jsonl").read_text().splitlines()]
KINDS = sorted({item["kind"] for item in ITEMS})


def answers(llm: fp4rt.LLM, items: list[dict]) -> list[str]:
    """What the model says to each item, its first line."""
    prompts = [llm.text.encode_chat(item["messages"]) if "messages" in item else llm.encode(item["prompt"])
               for item in items]
    outputs = llm.generate(prompts, fp4rt.Sampling(temperature=0, max_tokens=48))
    return [output.text.strip().split("\n")[0].strip() for output in outputs]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_held_out_accuracy(device: str):
    """At least 95 of 100, over all kinds, and 90 in each: NVFP4 is within two points of BF16's 99."""
    with fp4rt.load("demo", device=device) as llm:
        right = [found == item["answer"] for found, item in zip(answers(llm, ITEMS), ITEMS, strict=True)]
    by_kind = {kind: [ok for ok, item in zip(right, ITEMS) if item["kind"] == kind] for kind in KINDS}
    rates = {kind: sum(found) / len(found) for kind, found in by_kind.items()}
    assert len(ITEMS) >= 300 and sum(right) / len(right) >= 0.97, rates
    assert min(rates.values()) >= 0.9, rates


def test_stories_make_sense():
    """The end of a story comes by itself, and its text is made of the words it learned."""
    with fp4rt.load("demo", device="cpu") as llm:
        output = llm.generate("Once upon a time", fp4rt.Sampling(temperature=0, max_tokens=300))[0]
    assert output.finish_reason == "stop"
    assert output.text.count(".") >= 4 and output.text.isascii()
