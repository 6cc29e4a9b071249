"""deterministic=True: a token's logits have the same bits in any company, in any pieces, on any page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.engine import Sequence
from fp4rt.engine.recorded import make_batch

ROOT = Path(__file__).parent / "checkpoints"
MODELS = ("llama-modelopt-nvfp4", "gemma4-e2b-modelopt-nvfp4", "gemma4-moe-modelopt-nvfp4-experts",
          "gpt-oss-modelopt-nvfp4", "mistral-compressed-nvfp4", "mixtral-modelopt-nvfp4",
          "nemotron-h-moe-modelopt-nvfp4", "qwen3-moe-compressed-nvfp4")


def load(name: str, backend: str, max_model_len: int = 1024) -> fp4rt.LLM:
    return fp4rt.load(ROOT / name, max_model_len=max_model_len, deterministic=True, **BACKENDS[backend][0])


def logits(llm: fp4rt.LLM, prompts: list[list[int]], rng: np.random.Generator | None) -> list[np.ndarray]:
    """Every position's logits of prompts that go through steps together, each with pieces of random sizes.

    Without rng: all of them whole, in one step.
    """
    cache, vocabulary = llm.engine.cache, llm.engine.model.config.vocab_size
    sequences = [Sequence(list(prompt), None, 0, frozenset(), len(prompt)) for prompt in prompts]
    found = [np.empty((len(prompt), vocabulary), np.float32) for prompt in prompts]
    for sequence in sequences:
        cache.take_slot(sequence.held)
    while left := [s for s in sequences if s.remembered < len(s.ids)]:
        step = []
        for sequence in left:
            rest = len(sequence.ids) - sequence.remembered
            count = rest if rng is None else min(rest, int(rng.choice([0, 1, 1, 2, 5, 9, 33, 64, 100])))
            if count:
                cache.trim(sequence.held, sequence.remembered)
                assert cache.grow(sequence.held, sequence.remembered + count)
                step.append((sequence, count))
        if not step:
            continue
        tokens = sum(count for _, count in step)
        batch = llm.ops.batch(make_batch(step, list(range(tokens))))
        part = llm.ops.fetch(llm.engine.model(batch, cache.layers)).result()
        for sequence, count in step:
            found[sequences.index(sequence)][sequence.remembered:sequence.remembered + count] = part[:count]
            part = part[count:]
            sequence.remembered += count
    for sequence in sequences:
        cache.give_back(sequence.held)
    return found


@each_backend
@pytest.mark.parametrize("name", MODELS)
def test_company_and_pieces_change_no_bit(name: str, backend: str):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 300, n).tolist() for n in (1, 90, 13, 140, 30, 66, 8, 9, 10, 11)]
    with load(name, backend) as llm:
        alone = [logits(llm, [prompt], None)[0] for prompt in prompts]
        for _ in range(4):
            order = rng.permutation(len(prompts))
            for i, got in zip(order, logits(llm, [prompts[i] for i in order], rng)):
                np.testing.assert_array_equal(got, alone[i])


@each_backend
@pytest.mark.parametrize("name", ["llama-modelopt-nvfp4", "nemotron-h-moe-modelopt-nvfp4"])
def test_drawn_tokens_are_the_same_alone_in_company_and_after_preemption(name: str, backend: str):
    """At a temperature at which the last bit of a logit decides now and then."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 300, n).tolist() for n in (70, 1, 100, 64, 65, 120)]
    options = dict(temperature=1.5, top_p=0.95, max_tokens=60, ignore_eos=True)
    with load(name, backend, 512) as llm:  # 8 pages: the six of them together take 14
        alone = [llm.generate(prompt, fp4rt.Sampling(seed=40 + i, **options))[0].ids
                 for i, prompt in enumerate(prompts)]
        assert [output.ids for output in llm.generate(prompts, fp4rt.Sampling(seed=40, **options))] == alone
