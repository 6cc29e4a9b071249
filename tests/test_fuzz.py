"""deterministic=True under everything at once: arrivals, cuts, chunks, preemption, shared prefixes, guesses."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend

ROOT = Path(__file__).parent / "checkpoints"


def requests(rng: random.Random, count: int) -> list[tuple[list[int], fp4rt.Sampling]]:
    """Prompts of which many begin alike or repeat themselves, and every way to draw."""
    ids = np.random.default_rng(rng.randrange(1 << 30)).integers(3, 300, 400).tolist()
    found = []
    for _ in range(count):
        start, length = rng.choice([0, 0, 0, 200]), rng.choice([1, 5, 20, 63, 64, 65, 100])
        prompt = ids[start:start + length] + ids[rng.randrange(300):][:rng.randrange(20)]
        if rng.random() < 0.3:
            prompt = (prompt[:rng.randrange(2, 9)] * 30)[:length + 1]
        found.append((prompt, fp4rt.Sampling(
            max_tokens=rng.choice([1, 7, 70, 140]), ignore_eos=True, seed=rng.randrange(1 << 64),
            temperature=rng.choice([0, 0, 0.1, 1.0, 2.0]), top_p=rng.choice([1.0, 0.8]), top_k=rng.choice([0, 20]),
            frequency_penalty=rng.choice([0, 0, 0.5]), repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logit_bias=rng.choice([(), {i: 20.0 for i in range(40, 48)}]))))
    return found


@each_backend
@pytest.mark.parametrize("name, speculate, ahead", [
    ("llama-modelopt-nvfp4", 0, 0), ("llama-modelopt-nvfp4", 0, 3), ("llama-modelopt-nvfp4", 4, 0),
    ("gpt-oss-modelopt-nvfp4", 3, 0), ("gpt-oss-modelopt-nvfp4", 0, 3), ("gemma4-moe-bf16", 0, 0),
    ("nemotron-h-modelopt-nvfp4", 0, 0), ("nemotron-h-modelopt-nvfp4", 0, 3)])
def test_answers_are_those_of_a_quiet_run(name: str, speculate: int, ahead: int, backend: str):
    """ahead: steps that are queued before the first one's tokens are read, on the host's backends, too."""
    rng = random.Random(4)
    asked = requests(rng, 20)
    options = dict(max_model_len=256, deterministic=True, **BACKENDS[backend][0])
    with fp4rt.load(ROOT / name, prefix_caching=False, **options) as llm:
        quiet = [llm.generate(prompt, sampling)[0].ids for prompt, sampling in asked]
    with fp4rt.load(ROOT / name, kv_tokens=384, max_num_seqs=5, max_num_batched_tokens=72 if ahead else 40,
                    speculate=speculate, snapshots=3 if name.startswith("nemotron-h") else None, **options) as llm:
        engine = llm.engine
        llm.ops.lookahead = max(ahead, llm.ops.lookahead)
        engine.cache.snapshot_tokens = 64
        sequences = [llm.sequence(list(prompt), sampling) for prompt, sampling in asked]
        cuts = {i: rng.randrange(20) for i in range(len(asked)) if rng.random() < 0.3}  # after so many tokens
        waiting = list(enumerate(sequences))
        while waiting:
            engine.submit(waiting.pop(0)[1])
            for sequence, token in engine.events():
                assert token >= 0
                for _ in range(rng.choice([0, 0, 0, 1, 3])):
                    if waiting:
                        engine.submit(waiting.pop(0)[1])
                for i, most in cuts.items():
                    if len(sequences[i].generated) >= most and sequences[i].finish_reason is None:
                        sequences[i].finish_reason = "cancelled"
        for i, (sequence, ids) in enumerate(zip(sequences, quiet)):
            if i not in cuts:
                assert (sequence.generated, sequence.finish_reason) == (ids, "length"), i
            assert sequence.generated == ids[:len(sequence.generated)], i
        assert engine.cache.empty and not engine.busy
        scheduler = engine.scheduler
        assert scheduler.preemptions > 0 and (scheduler.accepted > 0) == (speculate > 0)
        assert scheduler.prompt_tokens_found > 0
