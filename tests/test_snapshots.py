"""Prompts of models with recurrent state begin where a snapshot of it was taken, and answers stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.batch import PAGE_TOKENS
from fp4rt.cache import Cache, Plan, Remembered
from fp4rt.inspect import inspect
from fp4rt.ops import AttentionShape, MambaShape
from fp4rt.room import fitting_snapshots

ROOT = Path(__file__).parent / "checkpoints"
MODELS = ("nemotron-h-modelopt-nvfp4", "nemotron-h-moe-modelopt-nvfp4")
RNG = np.random.default_rng(9)
SHARED = RNG.integers(3, 300, 10 * PAGE_TOKENS + 7).tolist()  # ten whole pages and a bit


def greedy(count: int) -> fp4rt.Sampling:
    return fp4rt.Sampling(temperature=0, max_tokens=count, ignore_eos=True)


def load(name: str, backend: str = "reference", **options) -> fp4rt.LLM:
    return fp4rt.load(ROOT / name, **{"max_model_len": 1024, **BACKENDS[backend][0], **options})


def ask(llm: fp4rt.LLM, ids: list[int], count: int = 4, salt: str = "") -> tuple[list[int], int]:
    """The generated ids, and how many of the prompt's were found."""
    sequence = llm.sequence(list(ids), greedy(count))
    sequence.cache_salt = salt
    for _ in llm._run([sequence]):
        pass
    return sequence.generated, sequence.cached_tokens


def assert_same(llm: fp4rt.LLM, prompt: list[int], ids: list[int], expected: list[int], tolerance: float) -> None:
    """Equal, up to where two tokens are too close for the arithmetic of another number of rows to tell."""
    for i, (token, other) in enumerate(zip(ids, expected, strict=True)):
        if token != other:
            row = llm.logits(prompt + expected[:i])[-1]
            assert row[other] - row[token] <= 2 * tolerance * np.abs(row).max()
            return


def questions(count: int, length: int = 60) -> list[list[int]]:
    return [SHARED + RNG.integers(3, 300, length).tolist() for _ in range(count)]


@each_backend
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_hit_changes_no_token(name: str, deterministic: bool, backend: str):
    """The first prompt keeps what its last page leaves, the second where it left the first; the third begins there."""
    asked = questions(4)
    asked.append(asked[0])
    tolerance = 0.0 if deterministic else BACKENDS[backend][1]
    with load(name, backend, deterministic=deterministic, prefix_caching=False) as llm:
        expected = [ask(llm, ids)[0] for ids in asked]
    with load(name, backend, deterministic=deterministic, kv_tokens=4096) as llm:  # no page makes room for another
        answers = [ask(llm, ids) for ids in asked]
        assert [found for _, found in answers] == [0, 0, 640, 640, 704]
        together = [output.ids for output in llm.generate(asked, greedy(4))]
        for prompt, alone, (ids, _), in_company in zip(asked, expected, answers, together):
            assert_same(llm, prompt, ids, alone, tolerance)
            assert_same(llm, prompt, in_company, alone, tolerance)
        assert llm.engine.cache.empty


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_logits_after_a_hit_have_the_same_bits(backend: str):
    """Also where what follows the snapshot is computed in pieces."""
    drawn = []
    for caching in (False, True):
        with load(MODELS[1], backend, deterministic=True, prefix_caching=caching, max_num_batched_tokens=24) as llm:
            seen, draw = [], llm.ops.sample
            llm.ops.sample = lambda logits, sampler: (seen.append(np.array(logits)), draw(logits, sampler))[1]
            if caching:
                llm.engine.cache.snapshot_tokens = PAGE_TOKENS
                ask(llm, SHARED, 1)
                seen.clear()
            _, found = ask(llm, SHARED + [5, 6, 7] * 20, 6)
            assert found == (10 * PAGE_TOKENS if caching else 0)
            drawn.append(seen)
    assert len(drawn[0]) == len(drawn[1]) == 6
    for one, other in zip(*drawn):
        np.testing.assert_array_equal(one, other)


def test_prompts_that_are_computed_at_once_show_where_they_part():
    """None of them is there before the others; those that come later begin where they part."""
    asked = questions(5)
    with load(MODELS[0], deterministic=True, prefix_caching=False) as llm:
        expected = ask(llm, asked[4])[0]
    with load(MODELS[0], deterministic=True, max_num_batched_tokens=100, kv_tokens=8192) as llm:
        first = [llm.sequence(list(ids), greedy(3)) for ids in asked[:4]]
        for _ in llm._run(first):
            pass
        assert [sequence.cached_tokens for sequence in first] == [0] * 4
        assert ask(llm, asked[4]) == (expected, 640)


def test_few_are_taken():
    """One for a prompt that is long enough, none for short ones or a little more of what is there."""
    with load(MODELS[0]) as llm:
        kept = llm.engine.cache._snapshots.found
        ask(llm, SHARED[:512])  # its last whole page, but for one token, ends at 448
        assert len(kept) == 0
        ask(llm, SHARED[:600])
        assert len(kept) == 1  # where it went beyond the first one, not at its own end, which is near
        assert ask(llm, SHARED + [5] * 200)[1] == 512 and len(kept) == 1
        assert ask(llm, SHARED[:600])[1] == 512 and len(kept) == 1


def test_the_one_used_longest_ago_makes_room():
    prompts = [RNG.integers(3, 300, 200).tolist() for _ in range(3)]
    with load(MODELS[0], snapshots=2, deterministic=True) as llm:
        assert llm.engine.cache.num_snapshots == 2
        llm.engine.cache.snapshot_tokens = PAGE_TOKENS
        expected = [ask(llm, prompt)[0] for prompt in prompts[:2]]
        assert ask(llm, prompts[0]) == (expected[0], 192)
        ask(llm, prompts[2])  # in the place of the second
        assert ask(llm, prompts[0]) == (expected[0], 192)
        assert ask(llm, prompts[1]) == (expected[1], 0)
        assert ask(llm, prompts[1]) == (expected[1], 192)


def test_a_snapshot_is_of_no_use_without_its_pages():
    with load(MODELS[0], deterministic=True) as llm:  # 16 pages
        expected = ask(llm, SHARED)[0]
        ask(llm, RNG.integers(3, 300, 1000).tolist())  # takes all of them
        assert ask(llm, SHARED) == (expected, 0)
        assert ask(llm, SHARED) == (expected, 640)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_those_that_had_to_go_begin_at_a_snapshot(backend: str):
    prompts = [RNG.integers(3, 300, 200).tolist() for _ in range(5)]
    with load(MODELS[0], backend, deterministic=True, prefix_caching=False) as llm:
        expected = [ask(llm, prompt, 250)[0] for prompt in prompts]
    with load(MODELS[0], backend, deterministic=True) as llm:
        cache, found = llm.engine.cache, []
        cache.snapshot_tokens = PAGE_TOKENS
        attach = cache.attach
        cache.attach = lambda held, ids, salt: (found.append((len(ids), attach(held, ids, salt))), found[-1][1])[1]
        assert [output.ids for output in llm.generate(prompts, greedy(250))] == expected
        assert llm.engine.scheduler.preemptions > 0
        assert any(length > 200 and tokens > 0 for length, tokens in found)  # one that came again
        assert cache.empty


def test_those_that_end_early_leave_nothing_taken():
    """Before, at, and after the step in which a snapshot is taken."""
    with load(MODELS[0], deterministic=True, max_num_batched_tokens=64, max_num_seqs=3) as llm:
        engine, cache = llm.engine, llm.engine.cache
        cache.snapshot_tokens = PAGE_TOKENS
        expected = ask(llm, SHARED[:300], 4, "alone")[0]
        for steps in range(1, 8):
            cut = [llm.sequence(SHARED[:300], greedy(20)) for _ in range(2)]
            for sequence in cut:
                engine.scheduler.add(sequence)
            for i in range(steps):
                step = engine.scheduler.plan()
                for _ in engine._mixed(step, False):
                    pass
                for sequence, _ in step:
                    engine.scheduler.publish(sequence)
            for sequence in cut:
                sequence.finish_reason = "cancelled"
            engine.scheduler.retire()
            engine.forget(cut)
            assert cache.empty and sorted(cache._free_slots) == [1, 2, 3]
        assert ask(llm, SHARED[:300]) == (expected, 256)
        assert sorted(cache._free_slots) == [1, 2, 3]


def test_salts_are_kept_apart():
    with load(MODELS[0]) as llm:
        for salt in ("a", "b", ""):
            assert ask(llm, SHARED, salt=salt)[1] == 0
            assert ask(llm, SHARED, salt=salt)[1] == 640


def test_a_conversation_begins_where_its_last_turn_was_asked():
    with load(MODELS[0]) as llm:
        turn = SHARED
        for expected in (0, 640, 640):
            answer, found = ask(llm, turn, 30)
            assert found == expected
            turn = turn + answer + [7] * 20


@each_backend
def test_a_copied_slot_is_the_other_one(backend: str):
    with load(MODELS[0], backend) as llm:
        ops, shape = llm.ops, next(s for s in llm.engine.cache.plan.memory if isinstance(s, MambaShape))
        state = ops.mamba_state(shape, 4)
        parts = [getattr(state, name) for name in state.__dataclass_fields__]
        cast = (lambda part: ops.fetch(part).result()) if ops.name == "cuda" else np.copy
        values = [RNG.standard_normal(part.shape).astype(part.dtype) for part in parts]
        for part, value in zip(parts, values):
            if ops.name == "cuda":
                with ops.gpu:
                    ops.gpu.upload(value, part)
            else:
                part[...] = value
        ops.copy_mamba_state(state, 1, 3)
        for part, value in zip(parts, values):
            value[3] = value[1]
            np.testing.assert_array_equal(cast(part), value)


@pytest.mark.gpu
def test_no_memory_is_taken_after_loading():
    with load(MODELS[0], "cuda-native", max_num_seqs=6, snapshots=2) as llm:
        llm.engine.cache.snapshot_tokens = PAGE_TOKENS
        budget = llm.ops.gpu.budget
        taken = budget.used
        for ids in (*questions(4), SHARED, SHARED):
            ask(llm, ids, 40)
        llm.generate(questions(8, 100), greedy(30))
        assert budget.used == budget.peak == taken and llm.engine.scheduler.prompt_tokens_found > 0


class SlotsOnly:
    """The sizes of two layers, one of which keeps a state of 100 MB; nothing is stored."""

    memory = [AttentionShape(1, 1, 16, 1.0), MambaShape(1, 16, 1, 16, 4)]

    def kv_page_bytes(self, shape) -> int:
        return 1 << 20

    def mamba_state_bytes(self, shape) -> int:
        return 100 << 20

    def kv_pages(self, shape, num_pages: int, group: int) -> None:
        return None

    def mamba_state(self, shape, num_slots: int) -> int:
        self.slots = num_slots
        return num_slots


def test_what_they_take_is_counted_and_gives_way_to_the_context():
    plan = Plan(SlotsOnly(), SlotsOnly.memory)
    assert plan.snapshots == plan.sequences == 10
    assert fitting_snapshots(plan, 1000 << 20, None) == 10
    assert fitting_snapshots(plan, 1000 << 20, 1250 << 20) == 2
    assert fitting_snapshots(plan, 1000 << 20, 900 << 20) == 0
    assert fitting_snapshots(Plan(SlotsOnly(), SlotsOnly.memory[:1]), 0, None) == 0
    cache = Cache(plan, [9], 2, snapshots=3)
    assert cache.nbytes == (10 << 20) + 6 * (100 << 20) and plan.ops.slots == 6
    assert cache.prefix_caching and not Cache(plan, [9], 2).prefix_caching


def test_what_is_planned_and_reported():
    with load(MODELS[0]) as many, load(MODELS[0], snapshots=3) as few, load(MODELS[0], snapshots=0) as none:
        slot = many.engine.cache.plan.slot_bytes
        assert slot > 0 and f"64 slots and 16 snapshots of {slot / 1e6:.1f} MB" in "\n".join(many.report)
        assert many.engine.cache.nbytes - few.engine.cache.nbytes == 13 * slot
        assert few.engine.cache.nbytes - none.engine.cache.nbytes == 3 * slot
        assert [ask(none, SHARED)[1] for _ in range(2)] == [0, 0]
        planned = inspect(ROOT / MODELS[0], device="reference", max_model_len=1024)
        assert (planned.slot_bytes, planned.slots, planned.snapshots) == (slot, 64, 16)
        assert planned.kv_bytes == many.engine.cache.nbytes
        planned = inspect(ROOT / MODELS[0], device="reference", max_model_len=1024, prefix_caching=False)
        assert planned.snapshots == 0 and planned.kv_bytes == none.engine.cache.nbytes


@pytest.mark.parametrize("name, options, message", [
    ("llama-modelopt-nvfp4", dict(snapshots=2), "snapshots is 2, but this model remembers no recurrent state"),
    (MODELS[0], dict(snapshots=2, prefix_caching=False), "snapshots is 2, but prefix caching is off"),
    (MODELS[0], dict(snapshots=-1), "snapshots is -1"), (MODELS[0], dict(snapshots="many"), "snapshots is 'many'")])
def test_what_makes_no_sense_is_said(name: str, options: dict, message: str):
    with pytest.raises(fp4rt.Fp4rtError, match=message) as caught:
        load(name, **options)
    assert caught.value.kind == "request" and caught.value.param == "snapshots"


@pytest.fixture
def cache():
    """Of 40 pages, two slots and two snapshots in slots 3 and 4; `copies` are (source, target) of what was copied."""
    plan = Plan(SlotsOnly(), SlotsOnly.memory)
    cache = Cache(plan, [40], 2, snapshots=2)
    cache.snapshot_tokens, cache.copies = PAGE_TOKENS, []
    plan.ops.copy_mamba_state = lambda state, source, target: cache.copies.append((source, target))
    return cache


def begin(cache: Cache, ids: list[int]) -> Remembered:
    held = Remembered()
    assert cache.attach(held, ids) == 0
    cache.take_slot(held)
    assert cache.grow(held, len(ids))
    return held


def test_a_state_is_copied_after_exactly_the_tokens_it_is_known_for(cache: Cache):
    ids = list(range(3 * PAGE_TOKENS))
    passed = begin(cache, ids)
    assert passed.snapshots == [2 * PAGE_TOKENS]  # one token is left to compute
    cache.publish(passed, ids, PAGE_TOKENS)
    cache.publish(passed, ids, 2 * PAGE_TOKENS + 5)
    cache.give_back(passed)
    assert cache.copies == [] and passed == Remembered(digests=passed.digests)
    kept = begin(cache, ids)
    for tokens in (PAGE_TOKENS, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS + 5, 3 * PAGE_TOKENS):
        cache.publish(kept, ids, tokens)
    (source, snapshot), = cache.copies
    assert source == kept.slot and snapshot in (3, 4)
    other = Remembered()
    assert cache.attach(other, ids) == 2 * PAGE_TOKENS and other.snapshots == []
    cache.take_slot(other)
    assert cache.copies[1:] == [(snapshot, other.slot)] and {kept.slot, other.slot} == {1, 2}


def test_two_that_compute_the_same_keep_it_once(cache: Cache):
    """And it counts as used then: another one makes room."""
    same, different, third = ([first] * 100 for first in (5, 6, 7))
    one, other = begin(cache, same), begin(cache, same)
    cache.publish(one, same, PAGE_TOKENS)
    cache.give_back(one)
    one = begin(cache, different)
    cache.publish(one, different, PAGE_TOKENS)
    cache.publish(other, same, PAGE_TOKENS)
    assert len(cache.copies) == 2
    cache.give_back(other)
    other = begin(cache, third)
    cache.publish(other, third, PAGE_TOKENS)
    assert cache.copies[2][1] == cache.copies[1][1]  # of `different`
    cache.give_back(other)
    assert cache.attach(Remembered(), same) == PAGE_TOKENS and cache.attach(Remembered(), different) == 0
