"""deterministic=True under everything at once: arrivals, cuts, chunks, preemption, shared prefixes, guesses."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.engine import Engine, Sequence

ROOT = Path(__file__).parent / "checkpoints"
CONTEXT = 256


class Multiples:
    """Allows multiples of 2 to 5, of which one follows from what was drawn before; after `most` tokens the end."""

    def __init__(self, most: int):
        self.most, self.step, self.count = most, 2, 0

    @property
    def finished(self) -> bool:
        return self.count == self.most

    def mask(self, words: np.ndarray) -> None:
        bits = np.arange(32 * len(words)) % self.step == 0
        words[...] = np.packbits(bits, bitorder="little").view("<u4")

    def accept(self, token: int) -> None:
        assert token % self.step == 0
        self.step, self.count = 2 + token // self.step % 4, self.count + 1


@dataclass
class Request:
    """told, scored: with log-probabilities, of the prompt's tokens, too."""

    prompt: list[int]
    sampling: fp4rt.Sampling
    told: int | None
    scored: bool
    salt: str
    bound: int | None
    stop_ids: list[int]

    def sequence(self, llm: fp4rt.LLM) -> Sequence:
        sequence = llm.sequence(list(self.prompt), self.sampling)
        sequence.top_logprobs, sequence.cache_salt = self.told, self.salt
        sequence.grammar = self.bound and Multiples(self.bound)
        if not self.sampling.ignore_eos:
            sequence.stop_ids |= frozenset(self.stop_ids)
        return sequence

    def submit(self, engine: Engine, sequence: Sequence) -> None:
        if self.scored:
            engine.score(sequence, self.told)
        else:
            engine.submit(sequence)


def requests(rng: random.Random, count: int) -> list[Request]:
    """Prompts of which many begin alike or repeat themselves, and every way to draw."""
    ids = np.random.default_rng(rng.randrange(1 << 30)).integers(3, 300, 400).tolist()
    found = []
    for _ in range(count):
        start, length = rng.choice([0, 0, 0, 200]), rng.choice([1, 5, 20, 63, 63, 64, 65, 65, 100, CONTEXT - 1])
        prompt = ids[start:start + length] + ids[rng.randrange(300):][:rng.randrange(20)]
        if rng.random() < 0.3:
            prompt = (prompt[:rng.randrange(2, 9)] * 30)[:length + 1]
        told = rng.choice([None, None, 0, 3])
        found.append(Request(prompt[:CONTEXT - 1], fp4rt.Sampling(
            max_tokens=rng.choice([1, 7, 64, 140, 140, None]), ignore_eos=rng.random() < 0.8,
            seed=rng.randrange(1 << 64), temperature=rng.choice([0, 0, 0.1, 1.0, 2.0]), top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 20]), min_p=rng.choice([0, 0, 0.1]), presence_penalty=rng.choice([0, 0, 0.7]),
            frequency_penalty=rng.choice([0, 0, 0.5]), repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            logit_bias=rng.choice([(), {i: 20.0 for i in range(40, 48)}])), told,
            told is not None and rng.random() < 0.4, rng.choice(["", "", "else"]),
            rng.choice([None, None, None, 3, 99]), rng.sample(range(300), 9)))
    return found


@each_backend
@pytest.mark.parametrize("name, speculate, ahead", [
    ("llama-modelopt-nvfp4", 0, 0), ("llama-modelopt-nvfp4", 0, 3), ("llama-modelopt-nvfp4", 4, 0),
    ("gpt-oss-modelopt-nvfp4", 3, 0), ("gpt-oss-modelopt-nvfp4", 0, 3), ("gemma4-moe-bf16", 0, 0),
    ("nemotron-h-modelopt-nvfp4", 0, 0), ("nemotron-h-modelopt-nvfp4", 0, 3)])
def test_answers_are_those_of_a_quiet_run(name: str, speculate: int, ahead: int, backend: str):
    """ahead: steps that are queued before the first one's tokens are read, on the host's backends, too."""
    rng = random.Random(5)
    asked = requests(rng, 20)
    options = dict(max_model_len=CONTEXT, deterministic=True, **BACKENDS[backend][0])
    with fp4rt.load(ROOT / name, prefix_caching=False, **options) as llm:
        quiet = [one.sequence(llm) for one in asked]
        for one, sequence in zip(asked, quiet):
            one.submit(llm.engine, sequence)
            assert all(token >= 0 for _, token in llm.engine.events())
    with fp4rt.load(ROOT / name, kv_tokens=384, max_num_seqs=5, max_num_batched_tokens=72 if ahead else 40,
                    speculate=speculate, snapshots=3 if name.startswith("nemotron-h") else None, **options) as llm:
        engine = llm.engine
        llm.ops.lookahead = max(ahead, llm.ops.lookahead)
        engine.cache.snapshot_tokens = 64
        sequences = [one.sequence(llm) for one in asked]
        cuts = {i: rng.randrange(20) for i in range(len(asked)) if rng.random() < 0.3}  # after so many tokens
        waiting = list(zip(asked, sequences))

        def submit_next() -> None:
            one, sequence = waiting.pop(0)
            one.submit(engine, sequence)

        while waiting:
            submit_next()
            for sequence, token in engine.events():
                assert token >= 0
                for _ in range(rng.choice([0, 0, 0, 1, 3])):
                    if waiting:
                        submit_next()
                for i, most in cuts.items():
                    if len(sequences[i].generated) >= most and sequences[i].finish_reason is None:
                        sequences[i].finish_reason = "cancelled"
        for i, (sequence, alone) in enumerate(zip(sequences, quiet)):
            if i not in cuts:
                assert (sequence.generated, sequence.finish_reason) == (alone.generated, alone.finish_reason), i
                assert sequence.prompt_logprobs == alone.prompt_logprobs, i
            assert sequence.generated == alone.generated[:len(sequence.generated)], i
            assert sequence.logprobs == alone.logprobs[:len(sequence.logprobs)], i
        assert engine.cache.empty and not engine.busy
        scheduler = engine.scheduler
        assert scheduler.preemptions > 0 and (scheduler.accepted > 0) == (speculate > 0)
        assert scheduler.prompt_tokens_found > 0
