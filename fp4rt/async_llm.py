"""Many requests at once, from asyncio: an engine thread of its own, and a stream of text for each request."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fp4rt.engine import Grammar, Sequence, TokenLogprobs
from fp4rt.errors import Fp4rtError
from fp4rt.llm import LLM, load
from fp4rt.loading import different_layers
from fp4rt.sampling import Sampling
from fp4rt.text import Splitter

MAX_LOGPROBS = 20


class Delta(NamedTuple):
    """What became known of an answer since the last one.

    Of an iterator that is behind, one delta is several tokens. text, reasoning: whole characters. ids: the tokens
    drawn. logprobs: theirs, where asked for. prompt_logprobs: of the prompt's tokens from the second on, in the first
    delta, where asked for. finish_reason: of the last delta, "stop", "length" or "cancelled". The counts are of the
    whole request so far.
    """

    text: str
    reasoning: str
    ids: list[int]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int

    def then(self, later: Delta) -> Delta:
        """Both in one."""
        logprobs = None if self.logprobs is None else [*self.logprobs, *(later.logprobs or ())]
        return later._replace(text=self.text + later.text, reasoning=self.reasoning + later.reasoning,
                              ids=self.ids + later.ids, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs)


@dataclass
class Stats:
    """What an engine is doing, and what it has done since it began. Seconds and counts; pages over all groups."""

    running: int = 0
    waiting: int = 0
    kv_pages: int = 0
    kv_pages_in_use: int = 0
    prefix_tokens_asked: int = 0
    prefix_tokens_found: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # requests by finish_reason
    drafted_tokens: int = 0   # guessed, under `speculate`
    accepted_tokens: int = 0  # of them, those that were right


class _Bell:
    """Wakes the requests of one event loop: all that have something new with one call into the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._woken: deque[asyncio.Event] = deque()
        self._rung = False

    def ring(self, event: asyncio.Event) -> None:
        """Set an event of the loop (any thread). Raises RuntimeError where the loop is closed."""
        self._woken.append(event)
        if not self._rung:
            self._rung = True
            try:
                self.loop.call_soon_threadsafe(self._answer)
            except RuntimeError:
                self._rung = False  # so that the next one is told too
                raise

    def _answer(self) -> None:
        self._rung = False  # before, not after: what comes while these are set rings again
        while self._woken:
            self._woken.popleft().set()


class Request:
    """One request on its way: iterate over it for its deltas. Leaving the loop, or dropping it, cancels it.

    Each delta comes once: who iterates again gets what is left, after the last one nothing.
    """

    def __init__(self, owner: AsyncLLM, sequence: Sequence, decoder: Any, request_id: str | None, bell: _Bell):
        self.id, self.sequence = request_id, sequence
        self.submitted, self.first_token, self.finished = time.perf_counter(), 0.0, 0.0
        self._owner, self._decoder, self._bell = owner, decoder, bell
        self._ready: deque[Delta | Fp4rtError] = deque()
        self._wake = asyncio.Event()
        self._told = 0  # tokens whose log-probabilities have been handed on
        self._ended = False  # nothing more is handed over
        self._taken = False  # nor is anything left

    def cancel(self) -> None:
        """End it at the next step (any thread); what it holds is free then. Nothing happens if it has ended."""
        if self.sequence.finish_reason is None:
            self.sequence.finish_reason = "cancelled"
            self._owner._cancelled.append(self)
            self._owner._wake_up()

    def __del__(self) -> None:
        if self.sequence.finish_reason is None:  # the engine takes it out at the next step; nobody waits to be told
            self.sequence.finish_reason = "cancelled"
            self._owner._count("cancelled")

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while not self._taken:
                while self._ready:
                    delta = self._ready.popleft()
                    if isinstance(delta, Fp4rtError):
                        self._taken = True
                        raise delta
                    while self._ready and isinstance(self._ready[0], Delta):
                        delta = delta.then(self._ready.popleft())
                    self._taken = delta.finish_reason is not None
                    yield delta
                    if self._taken:
                        return
                self._wake.clear()
                if not self._ready:
                    await self._wake.wait()
        finally:
            self.cancel()

    # What follows runs in the engine's thread.

    def _push(self, token: int) -> None:
        """A token was drawn, or the sequence failed."""
        sequence = self.sequence
        if sequence.error is not None:
            self._end(sequence.error)
            return
        now = time.perf_counter()
        self.first_token = self.first_token or now
        said = self._said(self._decoder.push(sequence, token))
        if sequence.finish_reason:
            rest = self._said(self._decoder.finish(sequence))
            said = {kind: said[kind] + rest[kind] for kind in said}
            self._end(self._delta(said, [token], sequence.finish_reason))
        else:
            self._hand_over(self._delta(said, [token], None))

    def _end(self, last: Delta | Fp4rtError) -> None:
        if not self._ended:
            self._ended, self.finished = True, time.perf_counter()
            self._hand_over(last)

    @staticmethod
    def _said(pieces: SequenceOf[tuple[str, str]]) -> dict[str, str]:
        said = {"answer": "", "reasoning": ""}
        for kind, text in pieces:
            said[kind] += text
        return said

    def _delta(self, said: dict[str, str], ids: list[int], finish_reason: str | None) -> Delta:
        sequence = self.sequence
        logprobs = None
        if sequence.top_logprobs is not None:
            logprobs = sequence.logprobs[self._told:]
            self._told += len(logprobs)
        generated = len(sequence.ids) - sequence.prompt_length
        first = generated <= 1 and bool(sequence.prompt_logprobs)
        return Delta(said["answer"], said["reasoning"], ids, logprobs, sequence.prompt_logprobs if first else None,
                     finish_reason, sequence.prompt_length, generated, sequence.cached_tokens)

    def _hand_over(self, delta: Delta | Fp4rtError) -> None:
        self._ready.append(delta)
        try:
            self._bell.ring(self._wake)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancel()


class AsyncLLM:
    """An LLM that serves many requests at once. It owns the LLM from now on; `close` gives all memory back.

        llm = fp4rt.AsyncLLM.load("demo")
        request = llm.submit(llm.llm.encode("Once upon a time"), fp4rt.Sampling(max_tokens=20))
        async for delta in request:
            print(delta.text, end="")

    max_queue: requests that may wait to be run; more are refused with Fp4rtError("overload").
    """

    def __init__(self, llm: LLM, *, max_queue: int = 1024):
        self.llm, self.max_queue = llm, max_queue
        self._requests: weakref.WeakValueDictionary[int, Request] = weakref.WeakValueDictionary()
        self._bell: _Bell | None = None  # of the loop that the newest request came from
        self._cancelled: deque[Request] = deque()
        self._finished: dict[str, int] = {}
        self._prompt_tokens = self._generated_tokens = 0
        if llm.has_text:
            llm.text  # read now: the first request should not wait for it
        llm.engine.prepare(different_layers(llm.linears, llm.engine.cache.plan.memory))
        self._work = threading.Condition()
        self._closing = False
        self._failure: Fp4rtError | None = None
        self._thread = threading.Thread(target=self._serve, name="fp4rt-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, model: str, *, max_queue: int = 1024, **options: Any) -> AsyncLLM:
        """As fp4rt.load, which takes the same options."""
        llm = load(model, **options)
        try:
            return cls(llm, max_queue=max_queue)
        except BaseException:
            llm.close()
            raise

    def submit(self, ids: SequenceOf[int], sampling: Sampling | None = None, *, request_id: str | None = None,
               cache_salt: str = "", logprobs: int | None = None, prompt_logprobs: bool = False,
               grammar: Grammar | None = None, splitter: Splitter | None = None, index: int = 0) -> Request:
        """Ask for a prompt of ids to be continued. Called where an event loop runs.

        cache_salt: only requests of the same salt share what they remember. logprobs: tell every token's
        log-probability, and those of so many of the likeliest. prompt_logprobs: the prompt's tokens' too. grammar: what
        the answer must look like. splitter: tells reasoning from the answer. index: of several answers to one prompt.
        Raises Fp4rtError "request" (with .param) or "overload".
        """
        self._check_open()
        if logprobs is not None and not (type(logprobs) is int and 0 <= logprobs <= MAX_LOGPROBS):
            raise Fp4rtError("request", f"logprobs is {logprobs!r}; it must be 0 to {MAX_LOGPROBS}", param="logprobs")
        sequence = self.llm.sequence(self.llm.encode(ids), sampling, index)
        sequence.cache_salt, sequence.grammar = cache_salt, grammar
        sequence.top_logprobs = logprobs
        if prompt_logprobs and logprobs is None:
            sequence.top_logprobs = 0
        loop = asyncio.get_running_loop()
        if self._bell is None or self._bell.loop is not loop:
            self._bell = _Bell(loop)
        decoder = self.llm.decoder(sequence, splitter)
        with self._work:
            self._check_open()  # again: the engine's thread ends under this lock, and would answer nobody then
            waiting = len(self._requests) - len(self.llm.engine.scheduler.running)
            if waiting >= self.max_queue:
                raise Fp4rtError("overload", f"{waiting} requests are waiting already; ask again later")
            request = Request(self, sequence, decoder, request_id, self._bell)
            self._requests[id(sequence)] = request
            self._prompt_tokens += sequence.prompt_length
            if prompt_logprobs:
                self.llm.engine.score(sequence, sequence.top_logprobs)
            else:
                self.llm.engine.submit(sequence)
            self._work.notify()
        return request

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise Fp4rtError("overload", "the engine is shutting down")

    def stats(self) -> Stats:
        """What the engine is doing now (any thread)."""
        try:
            engine = self.llm.engine
        except Fp4rtError:  # closed
            return Stats(finished=dict(self._finished))
        scheduler, cache = engine.scheduler, engine.cache
        running = len(scheduler.running)
        return Stats(running, max(0, len(self._requests) - running), sum(cache.num_pages), cache.pages_in_use,
                     scheduler.prompt_tokens_asked, scheduler.prompt_tokens_found, scheduler.preemptions,
                     self._prompt_tokens, self._generated_tokens, dict(self._finished),
                     scheduler.drafted, scheduler.accepted)

    @property
    def healthy(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, and let those that are there end; False if some have not within `timeout` seconds."""
        self._closing = True
        deadline = time.monotonic() + timeout
        while self._requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._requests

    def close(self) -> None:
        """End what is running, and give all memory back."""
        with self._work:
            self._closing = True
        for request in self._present():
            request.cancel()
        self._wake_up()
        self._thread.join()
        self.llm.close()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- The engine's thread ------------------------------------------------------------------------------------

    def _wake_up(self) -> None:
        with self._work:
            self._work.notify()

    def _serve(self) -> None:
        engine = self.llm.engine
        while True:
            with self._work:
                self._work.wait_for(lambda: engine.busy or self._closing)
                if self._closing and not engine.busy:
                    return
            try:
                with self.llm.turn():
                    for sequence, token in engine.events(others=True):
                        self._deliver(sequence, token)
                        self._let_go_cancelled()
                self._let_go_cancelled()
            except BaseException as error:
                self._fail(error)
                return

    def _deliver(self, sequence: Sequence, token: int) -> None:
        request = self._requests.get(id(sequence))
        if request is None:  # cancelled, and told so
            return
        self._generated_tokens += token >= 0
        try:
            request._push(token)
        except Exception as error:  # a tokenizer that breaks ends its own request only
            known = isinstance(error, Fp4rtError)
            sequence.fail(error if known else Fp4rtError(
                "internal", f"the answer broke off: {type(error).__name__}: {error}"))
        if sequence.finish_reason:
            self._let_go(request)

    def _let_go_cancelled(self) -> None:
        while self._cancelled:
            self._let_go(self._cancelled.popleft())

    def _let_go(self, request: Request) -> None:
        """A request has ended: it is told so, if it does not know, and counted."""
        sequence = request.sequence
        if self._requests.pop(id(sequence), None) is not None:
            request._end(sequence.error or request._delta(request._said([]), [], sequence.finish_reason))
            self._count(sequence.finish_reason)

    def _count(self, finish_reason: str) -> None:
        self._finished[finish_reason] = self._finished.get(finish_reason, 0) + 1

    def _fail(self, error: BaseException) -> None:
        """Nothing can run any more: every request is told why."""
        known = isinstance(error, Fp4rtError)
        with self._work:
            self._failure = error if known else Fp4rtError(
                "device", f"the engine stopped: {type(error).__name__}: {error}")
        for request in self._present():
            request.sequence.fail(self._failure)
            self._let_go(request)

    def _present(self) -> list[Request]:
        """The requests on their way (any thread: the references are copied at once, unlike the values)."""
        return [request for reference in self._requests.valuerefs() if (request := reference()) is not None]


