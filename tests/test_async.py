"""Truths about requests that come and go while others run: nobody's tokens change, and nothing is left behind."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from fp4rt.batch import PAGE_TOKENS
from fp4rt.cache import Cache, Plan, Remembered

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama-modelopt-nvfp4"


def greedy(count: int, **options) -> fp4rt.Sampling:
    return fp4rt.Sampling(temperature=0, max_tokens=count, ignore_eos=True, **options)


def prompts(count: int, longest: int, seed: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, rng.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


async def collect(request) -> tuple[str, list[int], str]:
    text, ids, reason = "", [], None
    async for delta in request:
        text, ids, reason = text + delta.text, ids + delta.ids, delta.finish_reason
    return text, ids, reason


async def idle(llm: fp4rt.AsyncLLM) -> None:
    """Wait until the engine has nothing to do, and see that nobody holds a page."""
    while llm.llm.engine.busy:
        await asyncio.sleep(0.01)
    assert llm.llm.engine.cache.empty and llm.stats().kv_pages_in_use == 0


def test_requests_in_company_give_what_they_give_alone(device: str):
    """Thirty requests of all lengths over a cache that holds a few: chunks, preemption and arrivals change no token."""
    cases = [(ids, 1 + i % 15) for i, ids in enumerate(prompts(15, 120) + prompts(15, 20, 6))]
    with fp4rt.load(CHECKPOINT, device=device, max_model_len=192, deterministic=True, prefix_caching=False) as llm:
        alone = [llm.generate(ids, greedy(count))[0] for ids, count in cases]

    async def together() -> list[tuple[str, list[int], str]]:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=192, max_num_seqs=7,
                                 max_num_batched_tokens=48, kv_tokens=256, deterministic=True) as llm:
            async def one(i: int) -> tuple[str, list[int], str]:
                await asyncio.sleep(random.Random(i).random() * 0.3)
                ids, count = cases[i]
                return await collect(llm.submit(ids, greedy(count)))

            results = await asyncio.gather(*(one(i) for i in range(len(cases))))
            await idle(llm)
            assert llm.stats().finished == {"length": len(cases)}
            return results

    for output, (text, ids, reason) in zip(alone, asyncio.run(together())):
        assert (ids, text, reason) == (output.ids, output.text, "length")


def test_cancelled_requests_leave_nothing_behind(device: str):
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=512, max_num_seqs=6) as llm:
            rng = random.Random(3)
            expected = [await collect(llm.submit(ids, greedy(12))) for ids in prompts(5, 60)]

            async def cut(ids: list[int]) -> None:
                request, enough = llm.submit(ids, greedy(400)), rng.randrange(1, 12)
                if rng.random() < 0.3:
                    await asyncio.sleep(rng.random() * 0.05)
                    request.cancel()
                seen = 0
                async for delta in request:
                    seen += len(delta.ids)
                    if seen >= enough:
                        break

            async def whole(ids: list[int]) -> tuple[str, list[int], str]:
                await asyncio.sleep(rng.random() * 0.1)
                return await collect(llm.submit(ids, greedy(12)))

            results = await asyncio.gather(*(cut(ids) for ids in prompts(25, 100, 9)),
                                           *(whole(ids) for ids in prompts(5, 60)))
            assert results[25:] == expected
            await idle(llm)

    asyncio.run(main())


def test_requests_that_are_dropped_end(device: str):
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=512, max_num_seqs=2) as llm:
            for ids in prompts(6, 30):
                llm.submit(ids, greedy(400))
            kept = await collect(llm.submit([5, 6, 7], greedy(3)))
            assert kept[2] == "length"
            await idle(llm)
            stats = llm.stats()
            assert stats.finished == {"cancelled": 6, "length": 1} and stats.generated_tokens < 400

    asyncio.run(main())


def test_whoever_iterates_again_gets_what_is_left():
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device="cpu", max_model_len=512) as llm:
            over = llm.submit([5, 6, 7], greedy(3))
            assert (await collect(over))[2] == "length"
            left = llm.submit([5, 6, 7], greedy(400))
            async for _ in left:
                break
            assert (await collect(left))[2] == "cancelled"
            failed = llm.submit([5, 6, 7], greedy(3), grammar=object())
            with pytest.raises(fp4rt.Fp4rtError, match="grammar"):
                await collect(failed)
            for request in (over, left, failed):
                assert [delta async for delta in request] == []

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_reader_that_is_behind_gets_several_tokens_at_once(device: str):
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=512) as llm:
            prompt = prompts(1, 30)[0]
            expected = await collect(llm.submit(prompt, greedy(40)))
            request = llm.submit(prompt, greedy(40), logprobs=1)
            while llm.llm.engine.busy or not request.finished:
                await asyncio.sleep(0.01)
            delta, = [delta async for delta in request]
            assert (delta.text, delta.ids, delta.finish_reason) == expected
            assert [one.id for one in delta.logprobs] == delta.ids and delta.generated_tokens == 40

    asyncio.run(main())


def test_a_short_prompt_does_not_wait_for_a_long_one(device: str):
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=1024, kv_tokens=2048,
                                 max_num_batched_tokens=32) as llm:
            long, short = llm.submit([3] * 900, greedy(2)), llm.submit([4] * 10, greedy(2))
            await asyncio.gather(collect(long), collect(short))
            assert short.first_token < short.finished < long.first_token  # as the engine saw it

    asyncio.run(main())


def test_prefix_cache_changes_no_token_and_keeps_salts_apart(device: str):
    shared = prompts(1, 300, 1)[0] * 3
    shared = shared[:5 * PAGE_TOKENS + 7]
    cases = [shared + tail for tail in prompts(6, 40, 2)] + [shared[:PAGE_TOKENS]] * 2
    with fp4rt.load(CHECKPOINT, device=device, max_model_len=1024, deterministic=True, prefix_caching=False) as llm:
        expected = [output.ids for output in llm.generate(cases, greedy(70))]

    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=1024, deterministic=True) as llm:
            found = []
            for ids in cases:
                last = [delta async for delta in llm.submit(ids, greedy(70), cache_salt="a")][-1]
                found.append(last.cached_tokens)
                await idle(llm)
            assert found == [0] + [5 * PAGE_TOKENS] * 5 + [0, 0]  # one token of a prompt is always computed
            results = await asyncio.gather(*(collect(llm.submit(ids, greedy(70), cache_salt="a")) for ids in cases))
            assert [ids for _, ids, _ in results] == expected
            other = [delta async for delta in llm.submit(cases[0], greedy(1), cache_salt="b")][-1]
            assert other.cached_tokens == 0
            assert llm.stats().prefix_tokens_found >= sum(found)
            await idle(llm)

    asyncio.run(main())


def test_who_waits_is_not_admitted_while_a_scored_prompt_holds_the_last_slot():
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device="reference", max_model_len=512, max_num_seqs=1) as llm:
            scored = llm.submit([3] * 300, greedy(2), prompt_logprobs=True)
            plain = llm.submit([4] * 9, greedy(2))
            results = await asyncio.wait_for(asyncio.gather(collect(scored), collect(plain)), 60)
            assert [len(ids) for _, ids, _ in results] == [2, 2]

    asyncio.run(main())


def test_what_breaks_ends_its_own_request_only():
    class Broken:
        def push(self, token: int, text: str) -> list:
            raise ValueError("no such text")

    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device="reference", max_model_len=64) as llm:
            other, broken = llm.submit([1, 2], greedy(9)), llm.submit([1, 2], greedy(9), splitter=Broken())
            with pytest.raises(fp4rt.Fp4rtError, match="ValueError: no such text") as caught:
                await collect(broken)
            assert caught.value.kind == "internal"  # nothing that its client did
            assert (await collect(other))[2] == "length"
            await idle(llm)

    asyncio.run(main())


def test_what_cannot_be_served_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A tokenizer that cannot be read shows once the weights are loaded; their memory is given back."""
    closed = []
    monkeypatch.setattr(fp4rt.LLM, "close", lambda llm: closed.append(llm))
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(fp4rt.Fp4rtError, match="tokenizer"):
        fp4rt.AsyncLLM.load(tmp_path / "model", device="cpu", max_model_len=64)
    assert len(closed) == 1


def test_refusals(device: str):
    async def main() -> None:
        llm = fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=64, max_num_seqs=1, max_queue=2)
        with llm:
            with pytest.raises(fp4rt.Fp4rtError, match="64"):
                llm.submit([1] * 64)
            for logprobs in (21, -1, "1", 1.0, True):
                with pytest.raises(fp4rt.Fp4rtError, match="logprobs") as caught:
                    llm.submit([1], logprobs=logprobs)
                assert caught.value.param == "logprobs"
            held = [llm.submit([1, 2], greedy(60)) for _ in range(2)]
            with pytest.raises(fp4rt.Fp4rtError, match="waiting") as caught:
                for _ in range(3):
                    held.append(llm.submit([1, 2], greedy(60)))
            assert caught.value.kind == "overload"
            assert not await llm.drain(0.0)
            with pytest.raises(fp4rt.Fp4rtError, match="shutting down"):
                llm.submit([1])
            for request in held:
                assert (await collect(request))[2] == "length"
            assert await llm.drain(5.0)

    asyncio.run(main())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_logprobs_are_those_of_the_logits(device: str):
    prompt = prompts(1, 150, 3)[0]

    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=256) as llm:
            sampling = fp4rt.Sampling(temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.3)
            request = llm.submit(prompt, sampling, logprobs=3, prompt_logprobs=True)
            others = [llm.submit(prompt, greedy(30)) for _ in range(2)]
            deltas = [delta async for delta in request]
            assert (await collect(others[0]))[1] == (await collect(others[1]))[1]
            told = deltas[0].prompt_logprobs + [one for delta in deltas for one in delta.logprobs]
            ids = prompt + [i for delta in deltas for i in delta.ids]
            assert [one.id for one in told] == ids[1:]
            await idle(llm)
            expected = log_softmax(llm.llm.logits(ids)[:-1])
            tolerance = 0.05 if device == "cuda" else 1e-3
            for one, row in zip(told, expected):
                assert abs(one.logprob - row[one.id]) < tolerance
                assert len(one.top) == 3
                for (token, logprob), best in zip(one.top, np.sort(row)[::-1]):
                    assert abs(logprob - best) < tolerance and abs(logprob - row[token]) < tolerance

    asyncio.run(main())


class Counting:
    """Allows 5, then 6, then 7, and is done; or nothing any more once it comes to `dead_end`."""

    def __init__(self, dead_end: int = 0):
        self.next, self.dead_end = 5, dead_end

    @property
    def finished(self) -> bool:
        return self.next == 8

    def mask(self, words: np.ndarray) -> None:
        if self.next != self.dead_end:
            words[0] |= np.uint32(1 << self.next)

    def accept(self, token: int) -> None:
        assert token == self.next
        self.next += 1


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_grammar_is_obeyed_and_touches_nobody_else(device: str, ahead: int):
    async def main() -> None:
        with fp4rt.AsyncLLM.load(CHECKPOINT, device=device, max_model_len=256) as llm:
            llm.llm.ops.lookahead = max(ahead, llm.llm.ops.lookahead)
            alone = await collect(llm.submit([3, 4], greedy(20)))
            free = llm.submit([3, 4], greedy(20))
            bound = llm.submit([3, 4], fp4rt.Sampling(max_tokens=9), grammar=Counting())
            broken = [llm.submit([3, 4], greedy(9), grammar=Counting(dead_end)) for dead_end in (5, 7)]
            assert await collect(free) == alone
            assert (await collect(bound))[1:] == ([5, 6, 7], "stop")
            for request in broken:
                with pytest.raises(fp4rt.Fp4rtError, match="allows no token"):
                    await collect(request)
            await idle(llm)

    asyncio.run(main())


class FakeOps:
    """Room of one byte per page; nothing is stored."""

    def kv_page_bytes(self, shape) -> int:
        return 1

    def kv_pages(self, shape, num_pages: int, group: int) -> None:
        return None


def test_cached_pages_go_when_room_is_needed_and_windows_need_their_last_pages_only():
    from fp4rt.ops import AttentionShape

    plan = Plan(FakeOps(), [AttentionShape(1, 1, 16, 1.0), AttentionShape(1, 1, 16, 1.0, window=PAGE_TOKENS)])
    cache = Cache(plan, [6, 6], 2)
    ids = list(range(4 * PAGE_TOKENS + 1))
    first = Remembered()
    assert cache.attach(first, ids) == 0 and cache.grow(first, len(ids))
    cache.publish(first, ids, 4 * PAGE_TOKENS)
    cache.trim(first, 4 * PAGE_TOKENS)
    cache.give_back(first)
    assert cache.empty

    second = Remembered()
    assert cache.attach(second, ids) == 4 * PAGE_TOKENS
    assert [page != 0 for page in second.pages[1]] == [False] * 3 + [True]
    assert cache.pages_in_use == 5
    third = Remembered()
    assert cache.attach(third, ids) == 4 * PAGE_TOKENS and third.pages == second.pages  # shared
    cache.give_back(third)
    assert cache.pages_in_use == 5
    cache.give_back(second)

    large = Remembered()
    assert cache.grow(large, 5 * PAGE_TOKENS)  # takes all but the beginning of what is cached
    cache.give_back(large)
    assert cache.attach(Remembered(), ids) in (0, PAGE_TOKENS)
    assert cache.attach(Remembered(), ids[:PAGE_TOKENS] + [7] + ids[PAGE_TOKENS + 1:]) <= PAGE_TOKENS
