"""Truths about sequences in company: chunks, batches, preemption and reuse change no token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS
from fp4rt.batch import PAGE_TOKENS

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama-modelopt-nvfp4"


def greedy(count: int, **options) -> fp4rt.Sampling:
    return fp4rt.Sampling(temperature=0, max_tokens=count, ignore_eos=True, **options)


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 1000, rng.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda-native", marks=pytest.mark.gpu),
                        pytest.param("cuda-sm_75", marks=pytest.mark.gpu)], scope="module")
def llm(request: pytest.FixtureRequest):
    with fp4rt.load(CHECKPOINT, max_model_len=1024, **BACKENDS[request.param][0]) as loaded:
        yield loaded


def test_batch_of_eight_equals_each_alone(llm: fp4rt.LLM):
    alone = [llm.generate(prompt, greedy(20))[0].ids for prompt in prompts(8)]
    together = [output.ids for output in llm.generate(prompts(8), greedy(20))]
    assert together == alone


def test_sampled_tokens_do_not_depend_on_company(llm: fp4rt.LLM):
    options = dict(temperature=0.8, top_p=0.9, max_tokens=12, ignore_eos=True)
    one = llm.generate(prompts(1)[0], fp4rt.Sampling(seed=7, **options))[0].ids
    many = llm.generate(prompts(3), fp4rt.Sampling(seed=7, **options))
    assert many[0].ids == one
    assert llm.generate(prompts(1)[0], fp4rt.Sampling(seed=8, **options))[0].ids != one


def test_chunked_prompt_equals_whole(llm: fp4rt.LLM):
    ids = np.random.default_rng(2).integers(0, 1000, 200).tolist()
    whole = llm.logits(ids)
    scheduler = llm.engine.scheduler
    before, scheduler.step_tokens = scheduler.step_tokens, 23
    try:
        chunked = llm.logits(ids)
    finally:
        scheduler.step_tokens = before
    tolerance = 1e-2 if llm.ops.name == "cuda" else 1e-4
    assert np.abs(chunked - whole).max() <= tolerance * np.abs(whole).max()
    tokens = llm.generate(ids, greedy(8))[0].ids
    before, scheduler.step_tokens = scheduler.step_tokens, 23
    try:
        assert llm.generate(ids, greedy(8))[0].ids == tokens
    finally:
        scheduler.step_tokens = before


def test_preempted_sequences_give_the_same_tokens(llm: fp4rt.LLM):
    """Five sequences that together need more pages than there are."""
    batch = [np.random.default_rng(i).integers(0, 1000, 100).tolist() for i in range(5)]
    expected = [llm.generate(prompt, greedy(200))[0].ids for prompt in batch]
    assert [output.ids for output in llm.generate(batch, greedy(200))] == expected
    assert llm.engine.cache.empty


def test_pages_are_free_after_an_abandoned_stream(llm: fp4rt.LLM):
    stream = llm.stream([5, 6, 7], greedy(50))
    next(stream)
    with pytest.raises(fp4rt.Fp4rtError, match="still open"):
        llm.generate([1, 2])
    stream.close()
    assert llm.engine.cache.empty
    assert llm.generate([5, 6, 7], greedy(3))[0].finish_reason == "length"


def test_a_conversation_keeps_what_it_remembers(llm: fp4rt.LLM):
    session = llm.session(greedy(6))
    opening = "one scale " * 60
    first = "".join(session.send(opening))
    assert session.reused_tokens == 0
    second = "".join(session.send("and the next"))
    assert session.reused_tokens >= PAGE_TOKENS and session.reused_tokens % PAGE_TOKENS == 0
    messages = [{"role": "user", "content": opening}, {"role": "assistant", "content": first},
                {"role": "user", "content": "and the next"}]
    assert llm.chat(messages, greedy(6)).text == second
    assert llm.engine.cache.empty


@pytest.mark.parametrize("prompt, message", [
    ([], "no tokens|no prompt"), ([5, -1], "-1"), ([5, 10**9], "1000000000"), ([5] * 1024, "1024 tokens"),
    ([True, 3], "True"), ([[]], "no tokens"),
])
def test_bad_prompts(llm: fp4rt.LLM, prompt: list, message: str):
    with pytest.raises(fp4rt.Fp4rtError, match=message):
        llm.generate(prompt)


@pytest.mark.parametrize("scale", ["block", "global"])
def test_logits_that_are_not_finite_name_the_layer(tmp_path: Path, scale: str):
    """A NaN weight ends in an error that names the layer it came from, not in text."""
    import shutil

    target = tmp_path / "nan"
    shutil.copytree(CHECKPOINT, target)
    path = target / "model.safetensors"
    path.chmod(0o644)
    from fp4rt.checkpoint import read_header

    entry = read_header(path)["model.layers.1.post_attention_layernorm.weight"]
    raw = bytearray(path.read_bytes())
    value = b"\x7f\x7f" if scale == "block" else b"\x7f\xff"  # the largest BF16 numbers: finite, but not for long
    raw[entry.begin:entry.end] = value * ((entry.end - entry.begin) // 2)
    path.write_bytes(raw)
    with fp4rt.load(target, device="reference", max_model_len=64) as broken, np.errstate(all="ignore"):
        with pytest.raises(fp4rt.Fp4rtError, match=r"model\.layers\.1"):
            broken.generate([1, 2, 3], greedy(3))
        with pytest.raises(fp4rt.Fp4rtError, match=r"model\.layers\.1"):
            broken.logits([1, 2, 3])
