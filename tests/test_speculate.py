"""Truths about guessed tokens: they change no answer, are taken when right, and leave nothing behind when wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.engine.lookup import LONGEST, SHORTEST, Lookup

ROOT = Path(__file__).parent / "checkpoints"


def load(name: str, backend: str, **options) -> fp4rt.LLM:
    return fp4rt.load(ROOT / name, **{"max_model_len": 512, "deterministic": True, **BACKENDS[backend][0], **options})


def test_lookup_finds_what_followed_the_longest_and_newest_match():
    rng = np.random.default_rng(1)
    ids, lookup = [], Lookup()
    for token in rng.integers(0, 4, 200).tolist():
        ids.append(token)
        most = int(rng.integers(0, 7))
        expected = []
        for length in range(LONGEST, SHORTEST - 1, -1):
            ends = [end for end in range(length, len(ids)) if ids[end - length:end] == ids[-length:]]
            if ends and not expected:
                period = ids[ends[-1]:]
                expected = (period * most)[:most]
        assert lookup.guess(ids, most) == expected


@each_backend
@pytest.mark.parametrize("name", ["llama-modelopt-nvfp4", "gemma4-e2b-modelopt-nvfp4", "mistral-compressed-nvfp4",
                                  "gpt-oss-modelopt-nvfp4"])
def test_answers_are_those_without_speculation(name: str, backend: str):
    """Prompts that repeat themselves, greedy and drawn, in company, with more to remember than there is room for."""
    rng = np.random.default_rng(3)
    prompts = [(rng.integers(3, 300, n).tolist() * 20)[:length] for n, length in
               ((5, 60), (9, 40), (30, 100), (2, 10), (1, 130), (7, 64))]
    ways = [fp4rt.Sampling(temperature=0, max_tokens=40, ignore_eos=True, repetition_penalty=1.0),
            fp4rt.Sampling(temperature=0.05, top_p=0.9, seed=4, max_tokens=24, ignore_eos=True),
            fp4rt.Sampling(temperature=0, max_tokens=24, ignore_eos=True, frequency_penalty=0.02)]
    with load(name, backend) as llm:
        expected = [llm.generate(prompts, way) for way in ways]
    with load(name, backend, speculate=5) as llm:
        for way, outputs in zip(ways, expected):
            assert [one.ids for one in llm.generate(prompts, way)] == [one.ids for one in outputs]
            assert llm.generate(prompts[2], way)[0].ids == llm.generate(prompts[2], way)[0].ids
            assert llm.engine.cache.empty
        scheduler = llm.engine.scheduler
        assert 0 < scheduler.accepted < scheduler.drafted


@pytest.mark.parametrize("most", [3, 7])
def test_steps_with_guesses_are_recorded(most: int):
    """As on a GPU: one sequence, whose guesses fill a step or leave some of it, and several, with log-probabilities."""
    few = {i: 100.0 for i in range(70, 73)}
    sampling = fp4rt.Sampling(temperature=0, max_tokens=50, ignore_eos=True, logit_bias=few)
    prompts = [[5, 6, 7], [70, 71] * 40, [9] * 130, [70, 72, 71] * 5, [3, 70]]
    with load("llama-modelopt-nvfp4", "reference") as llm:
        expected = [llm.generate(prompt, sampling)[0].ids for prompt in prompts]
    with load("llama-modelopt-nvfp4", "reference", speculate=most) as llm:
        llm.ops.lookahead = 3
        for count in (1, 1, 3, 5, 4):
            sequences = [llm.sequence(list(prompt), sampling) for prompt in prompts[:count]]
            sequences[-1].top_logprobs = 2 if count == 3 else None
            for _ in llm.engine.run(sequences):
                pass
            assert [one.generated for one in sequences] == expected[:count]
        recorded = {sizes for sizes, step in llm.engine._recorded.items() if step is not None and sizes.guessed}
        assert {sizes.sequences for sizes in recorded} >= {1 if most == 7 else 2, 4} and llm.engine.cache.empty
        assert any(sizes.told for sizes in recorded)


@pytest.mark.parametrize("most", [1, 32])
def test_right_guesses_save_steps_and_the_end_is_kept(most: int):
    """A text of few tokens, which repeats itself: the answer ends where it must, in fewer steps than it has tokens."""
    prompt, few = [5, 6, 7], {i: 100.0 for i in range(70, 73)}
    sampling = fp4rt.Sampling(temperature=0, max_tokens=50, ignore_eos=True, logit_bias=few)
    with load("llama-modelopt-nvfp4", "reference") as llm:
        plain = llm.generate(prompt, sampling)[0]
        stopping = replace(sampling, stop=(plain.text[-3:],))
        stopped = llm.generate(prompt, stopping)[0]
    with load("llama-modelopt-nvfp4", "reference", speculate=most) as llm:
        steps, model = 0, llm.engine.model

        def counted(batch, pages):
            nonlocal steps
            steps += 1
            return model(batch, pages)

        counted.config = model.config
        llm.engine.model = counted
        assert llm.generate(prompt, sampling)[0] == plain
        assert steps == 50 - llm.engine.scheduler.accepted < 40
        assert llm.generate(prompt, stopping)[0] == stopped and len(stopped.ids) < 50


@each_backend
def test_log_probabilities_are_those_without_speculation(backend: str):
    prompt = [5, 6, 7, 8] * 12
    sampling = fp4rt.Sampling(temperature=0, max_tokens=40, ignore_eos=True)
    told = []
    for speculate in (0, 4):
        with load("llama-modelopt-nvfp4", backend, speculate=speculate) as llm:
            sequence = llm.sequence(list(prompt), sampling)
            sequence.top_logprobs = 2
            for _ in llm._run([sequence]):
                pass
            told.append(sequence.logprobs)
    assert told[0] == told[1] and [one.id for one in told[0]] == sequence.generated


def test_a_recurrent_state_takes_nothing_back():
    with pytest.raises(fp4rt.Fp4rtError, match="speculate.*recurrent") as caught:
        load("nemotron-h-modelopt-nvfp4", "reference", speculate=3)
    assert caught.value.kind == "request"
    with pytest.raises(fp4rt.Fp4rtError, match="speculate is 99"):
        load("llama-modelopt-nvfp4", "reference", speculate=99)
