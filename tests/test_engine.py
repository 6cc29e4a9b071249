"""Truths about sequences in company: chunks, batches, preemption and reuse change no token."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS
from fp4rt.batch import PAGE_TOKENS
from fp4rt.engine.recorded import decode_sizes, room_for
from fp4rt.loading import different_layers
from fp4rt.room import reserve_workspace

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


def test_what_is_asked_of_a_closed_model_ends_with_an_error():
    """Calls, a stream that was open, and a call that another thread was in."""
    loaded = fp4rt.load(CHECKPOINT, device="cpu", max_model_len=1024)
    ended = []

    def generate() -> None:
        with pytest.raises(fp4rt.Fp4rtError, match="closed") as caught:
            loaded.generate([[5, 6, 7]] * 4, greedy(1000))
        ended.append(caught.value)

    thread = threading.Thread(target=generate)
    thread.start()
    while thread.is_alive() and not loaded.timing.generated_tokens:
        time.sleep(0.001)
    loaded.close()
    thread.join(30)
    assert ended
    for ask in (lambda: loaded.generate([1, 2]), lambda: next(loaded.stream([1, 2])), lambda: loaded.encode("one"),
                lambda: loaded.encode([1]), lambda: loaded.logits([1]), lambda: loaded.sequence([1], None),
                lambda: loaded.chat([{"role": "user", "content": "one"}]), lambda: next(loaded.session().send("one"))):
        with pytest.raises(fp4rt.Fp4rtError, match="this LLM is closed"):
            ask()
    with fp4rt.load(CHECKPOINT, device="cpu", max_model_len=64) as loaded:
        stream = loaded.stream([5, 6, 7], greedy(50))
        next(stream)
    with pytest.raises(fp4rt.Fp4rtError, match="this LLM is closed"):
        next(stream)
    loaded.close()


@pytest.mark.parametrize("prompt", [None, 5, 1.5, b"one", [1.5], ["one", 5], [None], [True], np.ones(2)])
def test_what_is_no_prompt_is_refused(llm: fp4rt.LLM, prompt):
    with pytest.raises(fp4rt.Fp4rtError, match="token ids") as caught:
        llm.generate(prompt, greedy(1))
    assert caught.value.kind == "request" and caught.value.param == "prompt"


@pytest.mark.parametrize("length", [True, 0, -1, "64", 64.0, 1 << 40])
def test_what_is_no_context_is_refused(length):
    with pytest.raises(fp4rt.Fp4rtError, match="max_model_len is"):
        fp4rt.load(CHECKPOINT, device="cpu", max_model_len=length)


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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
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
        assert broken.engine.cache.empty

    async def score() -> None:
        with fp4rt.AsyncLLM.load(str(target), device="reference", max_model_len=64) as served:
            async for _ in served.submit([1, 2, 3], greedy(3), prompt_logprobs=True):
                pass

    with pytest.raises(fp4rt.Fp4rtError, match=r"model\.layers\.1"):
        asyncio.run(asyncio.wait_for(score(), 20))


def test_logits_that_are_not_finite_end_one_sequence_though_its_pages_are_shared():
    """Five pages, of which it has two together with one that goes on: what is left is too few to run it again."""
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=256, kv_tokens=320) as llm:
        engine, model, bad = llm.engine, llm.engine.model, 999

        class Broken:
            config, residuals = model.config, model.residuals

            def __call__(self, batch, pages):
                logits = model(batch, pages)
                logits[np.isin(batch.tokens[batch.rows], bad)] = np.nan
                return logits

        engine.model = Broken()
        ids = np.random.default_rng(6).integers(3, 900, 140).tolist()
        expected = llm.generate(ids, greedy(20))[0].ids
        good, broken = llm.sequence(list(ids), greedy(20)), llm.sequence([*ids[:130], bad], greedy(20))
        engine.submit(good)
        for sequence, _ in engine.events():
            if len(good.generated) == 3 and broken.error is None:
                assert sequence is good
                engine.submit(broken)
        assert broken.cached_tokens == 128 and "position 130 hold NaN" in str(broken.error)
        assert good.generated == expected and engine.cache.empty


@pytest.mark.parametrize("name, ahead", [("llama-modelopt-nvfp4", 0), ("llama-modelopt-nvfp4", 3),
                                         ("gemma4-e2b-modelopt-nvfp4", 3), ("nemotron-h-modelopt-nvfp4", 0)])
def test_a_scored_prompt_and_sequences_that_grow_share_what_room_there_is(name: str, ahead: int):
    """Together they need more pages than there are."""
    rng = np.random.default_rng(9)
    with fp4rt.load(CHECKPOINT.parent / name, device="cpu", max_model_len=512, kv_tokens=512, max_num_seqs=3,
                    deterministic=True, prefix_caching=False) as llm:
        ids = [rng.integers(3, 300, n).tolist() for n in (100, 40, 480, 70, 400, 20, 30)]
        scored = (2, 4)
        asked = [(prompt, greedy(9 if i in scored else 380 - 40 * i)) for i, prompt in enumerate(ids)]
        alone = [llm.generate(prompt, sampling)[0].ids for prompt, sampling in asked]
        llm.ops.lookahead = ahead
        sequences = [llm.sequence(list(prompt), sampling) for prompt, sampling in asked]
        engine, waiting = llm.engine, list(enumerate(sequences))
        engine.submit(waiting.pop(0)[1])
        for count, (_, token) in enumerate(engine.events()):
            assert token >= 0
            if waiting and count % 60 == 59:
                i, one = waiting.pop(0)
                if i in scored:
                    one.top_logprobs = 0
                    engine.score(one, 0)
                else:
                    engine.submit(one)
        assert [sequence.generated for sequence in sequences] == alone
        assert [len(sequences[i].prompt_logprobs) for i in scored] == [479, 399]
        assert engine.cache.empty and engine.scheduler.preemptions > 0 and engine.scheduler.scored is None


def test_a_scored_prompt_gets_the_next_slot_however_many_wait():
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=64, max_num_seqs=1) as llm:
        engine, ended = llm.engine, []
        plain, scored = [llm.sequence([3, 4], greedy(2)) for _ in range(5)], llm.sequence([3, 4, 5], greedy(1))
        for sequence in plain[:2]:
            engine.submit(sequence)
        for count, (sequence, _) in enumerate(engine.events()):
            if count == 0:
                engine.score(scored, 0)
            if sequence.finish_reason:
                ended.append(sequence)
            if sequence.finish_reason and len(ended) < 4:
                engine.submit(plain[len(ended) + 1])
        assert ended.index(scored) < 5 and len(ended) == 6


class Watched:
    """What is on its way from a step; reading it is noted with how many steps had been launched since."""

    def __init__(self, engine, pending, step: int):
        self.engine, self.pending, self.step = engine, pending, step

    def result(self) -> np.ndarray:
        able = [s for s in self.engine.scheduler.running if s.finish_reason is None and s.remaining > 0]
        self.engine.reads.append((self.engine.steps - self.step, len(able)))
        return self.pending.result()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch):
    """An engine that runs three steps ahead; `reads`: of each read step, how many followed it, and who could go on."""
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=256, kv_tokens=2048, max_num_seqs=6,
                    max_num_batched_tokens=80) as llm:
        engine, ops, model = llm.engine, llm.ops, llm.engine.model
        engine.steps, engine.reads = 0, []

        class Counted:
            config = model.config

            def __call__(self, batch, pages):
                engine.steps += 1
                return model(batch, pages)

        fetch = type(ops).fetch
        engine.model, ops.lookahead = Counted(), 3
        ops.fetch = lambda array: Watched(engine, fetch(ops, array), engine.steps)
        engine.prepare([0])
        assert engine.steps == 0
        yield llm


def test_no_step_is_awaited_while_another_could_be_launched(watched: fp4rt.LLM):
    """Sequences join and leave, draw in every way, and fill pages; the host always reads behind the device."""
    ways = [dict(), dict(temperature=0.9, top_p=0.9, seed=3), dict(repetition_penalty=1.2), dict(frequency_penalty=0.3),
            dict(logit_bias={5: 3.0})]
    sequences = [watched.sequence(ids, fp4rt.Sampling(**{"temperature": 0, "max_tokens": 20 + 7 * i, "ignore_eos": True,
                                                         **ways[i % len(ways)]})) for i, ids in enumerate(prompts(15))]
    sequences[3].top_logprobs = 2
    engine = watched.engine
    waiting = list(sequences)
    engine.submit(waiting.pop(0))
    for count, _ in enumerate(engine.events()):
        if waiting and count % 9 == 0:
            engine.submit(waiting.pop(0))
    assert not waiting and all(s.finish_reason == "length" for s in sequences)
    assert any(recorded and sizes.tokens > sizes.sequences for sizes, recorded in engine._recorded.items())
    assert engine.steps > 100 and all(since > 0 for since, able in engine.reads if able)
    for sequence in sequences:
        watched.ops.lookahead = 0
        alone = watched.sequence(sequence.ids[:sequence.prompt_length], sequence.sampling)
        for _ in engine.run([alone]):
            pass
        assert alone.ids == sequence.ids and len(sequence.logprobs) == (20 + 7 * 3 if sequence is sequences[3] else 0)


def test_a_step_that_fills_its_sizes_is_recorded_without_anyone_besides(watched: fp4rt.LLM):
    """A prompt of 64 tokens, the first size of a step that does not only decode, for the third time."""
    ids = np.random.default_rng(4).integers(0, watched.engine.model.config.vocab_size, (3, 64)).tolist()
    found = [watched.generate(one, greedy(5))[0].ids for one in ids]
    assert {sizes.sequences for sizes, step in watched.engine._recorded.items() if step and sizes.tokens == 64} == {1}
    watched.ops.lookahead = 0
    assert found == [watched.generate(one, greedy(5))[0].ids for one in ids]


def test_a_recorded_step_has_room_for_little_more_than_decode():
    rooms = [room_for(count) for count in range(1, 1025)]
    assert rooms[:17] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20] and rooms == sorted(rooms)
    assert all(count <= room < 1.25 * count for count, room in enumerate(rooms, 1))
    assert len(set(rooms)) == 8 + 4 * 7 and [room_for(room) for room in rooms] == rooms
    assert decode_sizes(1) == [1] and decode_sizes(21) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 21]


def test_sequences_decode_in_steps_of_the_next_size():
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=128, kv_tokens=4096, max_num_seqs=13) as llm:
        llm.ops.lookahead, asked = 3, prompts(13, 20)
        found = {}
        for count in (5, 9, 13):
            llm.engine._recorded.clear()
            found[count] = [output.ids for output in llm.generate(asked[:count], greedy(30))]
            sizes = {sizes for sizes in llm.engine._recorded if sizes.tokens == sizes.sequences}
            assert max(size.sequences for size in sizes) == {5: 5, 9: 10, 13: 13}[count]
        assert found[13][:9] == found[9] and found[9][:5] == found[5]


@pytest.mark.parametrize("context", [2, 16])
def test_a_context_may_be_shorter_than_the_padding_of_a_recorded_step(context: int):
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=context, kv_tokens=256) as llm:
        asked = [[5] * (context - 1), [6], [7, 8][:context - 1]]
        expected = [llm.generate(one, greedy(20))[0].ids for one in asked]
        llm.ops.lookahead = 3
        for _ in range(3):
            assert [output.ids for output in llm.generate(asked, greedy(20))] == expected
        assert any(recorded and sizes.tokens == 64 for sizes, recorded in llm.engine._recorded.items())


class Odd:
    """Allows odd ids only."""

    finished = False

    def mask(self, words: np.ndarray) -> None:
        words[...] = 0xAAAAAAAA

    def accept(self, token: int) -> None:
        assert token % 2


def test_a_grammar_does_not_hold_up_the_others(watched: fp4rt.LLM):
    sequences = [watched.sequence(ids, greedy(40)) for ids in prompts(5, 8)]
    sequences[2].grammar = Odd()
    for _ in watched.engine.run(sequences):
        pass
    assert all(since > 0 for since, able in watched.engine.reads if able > 1)
    assert all(token % 2 for token in sequences[2].generated) and len(sequences[2].generated) == 40
    watched.ops.lookahead = 0
    assert watched.generate(prompts(5, 8)[0], greedy(40))[0].ids == sequences[0].generated


class Outside:
    """Allows an id only that the tokenizer has and the model has not: 323 of 323, in the mask's last word."""

    finished = False

    def mask(self, words: np.ndarray) -> None:
        words[-1] = np.uint32(1 << 323 % 32)

    def accept(self, token: int) -> None:
        raise AssertionError(token)


def test_a_grammar_that_allows_no_token_of_the_model_ends_its_own_sequence_only():
    with fp4rt.load(CHECKPOINT.parent / "llama-modelopt-nvfp4-lm-head", device="reference", max_model_len=64) as llm:
        assert llm.engine.model.config.vocab_size == 323
        bound, free = (llm.sequence([3, 4], greedy(5)) for _ in range(2))
        bound.grammar = Outside()
        for _ in llm.engine.run([bound, free]):
            pass
        assert "allows no token" in str(bound.error) and len(free.generated) == 5


@pytest.mark.parametrize("name, kinds", [("llama-modelopt-nvfp4", 1), ("gpt-oss-mxfp4", 2),
                                         ("gemma4-e2b-modelopt-nvfp4", 4), ("nemotron-h-moe-modelopt-nvfp4", 3)])
def test_steps_of_all_sizes_are_rehearsed_with_a_layer_of_each_kind(name: str, kinds: int):
    with fp4rt.load(CHECKPOINT.parent / name, device="reference", max_model_len=256, max_num_seqs=5,
                    max_num_batched_tokens=50) as llm:
        ops, engine, run = llm.ops, llm.engine, []
        ops.lookahead, ops.rehearse = 3, lambda step: step()
        attention = type(ops).attention
        ops.attention = lambda qkv, batch, *rest, **options: run.append((*batch.pages.shape[1:], len(
            batch.tokens))) or attention(ops, qkv, batch, *rest, **options)
        layers = different_layers(llm.linears, engine.cache.plan.memory)
        engine.prepare(layers)
        assert len(layers) == kinds
        assert {(sequences, tokens) for sequences, _, tokens in run} == {
            *((2, tokens) for tokens in (16, 32, 48, 64)), *((count, count) for count in range(1, 6))}
        assert {width for sequences, width, tokens in run if sequences == tokens} == {1, 2, 4}
        assert engine.cache.empty


def test_a_cpu_has_compiled_what_it_needs_before_anybody_waits():
    with fp4rt.load(CHECKPOINT, device="cpu", max_model_len=256) as llm:
        expected = llm.generate(prompts(2)[1], greedy(9))
        ran, attention = [], type(llm.ops).attention
        llm.ops.attention = lambda qkv, *rest, **options: ran.append(len(qkv)) or attention(
            llm.ops, qkv, *rest, **options)
        llm.engine.prepare(different_layers(llm.linears, llm.engine.cache.plan.memory))
        assert ran == [1, 16]
        assert llm.generate(prompts(2)[1], greedy(9)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-modelopt-nvfp4", "mixtral-modelopt-nvfp4", "gpt-oss-mxfp4",
                                  "gemma4-moe-modelopt-nvfp4", "nemotron-h-moe-modelopt-nvfp4"])
def test_no_kernel_is_loaded_after_preparing(name: str):
    """Prompts of all lengths, any number at once, beside long contexts."""
    with fp4rt.load(CHECKPOINT.parent / name, device="cuda", max_model_len=1024, kv_tokens=8192) as llm:
        llm.engine.prepare(different_layers(llm.linears, llm.engine.cache.plan.memory))
        loaded = set(llm.ops.gpu.modules)
        rng = np.random.default_rng(8)
        for count in (1, 2, 3, 5, 9, 20, 40):
            lengths = [900, 400, *rng.integers(1, 150, 40)][:count] if count % 2 else rng.integers(1, 60, count)
            asked = [rng.integers(0, 300, length).tolist() for length in lengths]
            for sequence in (sequences := [llm.sequence(ids, greedy(6)) for ids in asked])[::3]:
                sequence.top_logprobs = 5
            for _ in llm.engine.run(sequences):
                pass
        assert set(llm.ops.gpu.modules) == loaded


def test_steps_of_one_token_and_of_many_are_rehearsed_before_the_cache_takes_memory():
    """What kernels for few tokens keep is taken at their first call."""
    rehearsed = []
    ops = SimpleNamespace(batch=lambda batch: batch, reserve=lambda step: step() or 0)
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=256, max_num_seqs=5) as llm:
        reserve_workspace(ops, lambda batch, pages: rehearsed.append((len(batch.tokens), len(batch.lengths))),
                          llm.engine.cache.plan, 256, 80)
    assert {(1, 1), (80, 1), (5, 5), (80, 6)} == set(rehearsed)


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [0, 4])
def test_no_memory_is_taken_after_loading(speculate: int):
    """However many there are, and however they draw: penalties, as many biases as may be, masks, log-probabilities."""
    with fp4rt.load(CHECKPOINT, device="cuda", max_model_len=512, kv_tokens=4096, max_num_seqs=12,
                    speculate=speculate) as llm:
        budget = llm.ops.gpu.budget
        taken = budget.used
        biases = {i: 0.5 for i in range(1000)}
        ways = [dict(repetition_penalty=1.2, logit_bias=biases), dict(frequency_penalty=0.3, temperature=0.8, seed=1),
                dict(logit_bias=biases), dict()]
        for count in (12, 5, 30):
            sequences = [llm.sequence(ids, fp4rt.Sampling(**{"temperature": 0, "max_tokens": 60, "ignore_eos": True,
                                                             **ways[i % 4]})) for i, ids in enumerate(prompts(count))]
            for sequence in sequences[::3]:
                sequence.top_logprobs = 20
            sequences[1].grammar = Odd()
            for _ in llm.engine.run(sequences):
                pass
            assert all(len(sequence.generated) == 60 for sequence in sequences)
            assert budget.used == budget.peak == taken
