"""What the endpoints share: the model, requests on their way, and how a body becomes prompts and sampling."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.types import Receive

import fp4rt
from fp4rt.serve.errors import ApiError, from_decoding, overloaded, shutting_down, too_long
from fp4rt.serve.grammar import Grammars
from fp4rt.serve.metrics import Metrics
from fp4rt.serve.protocol import PromptTokensDetails, Sampled, Usage

T = TypeVar("T")

MAX_BODY_BYTES = 16 << 20  # more than the longest prompt takes as token ids
BODIES_BYTES = 256 << 20   # of all bodies that are being read at once
BODY_SECONDS = 30          # for a client to send its body
THREADS = 4                # that tokenize, render chat templates and compile grammars
MAX_PREPARING = 256        # requests that wait for one of these threads


class Disconnected(Exception):
    """The client has gone: there is nobody to answer."""


class Service:
    """A model as it is served.

    name: what clients call it. admitted: HTTP requests on their way. busy: those of them that are being worked on.
    body_bytes: of bodies that are being read.
    """

    def __init__(self, llm: fp4rt.AsyncLLM, name: str, openapi: bytes):
        self.llm, self.name, self.openapi = llm, name, openapi
        self.text = llm.llm.text
        self.vocab_size = llm.llm.engine.model.config.vocab_size
        self.max_model_len = llm.llm.max_model_len
        self.created = int(time.time())
        self.metrics = Metrics(llm, name)
        self.grammars = Grammars(self.text, self.vocab_size)
        self.draining = False
        self.admitted = self.body_bytes = 0
        self.busy: set[Call] = set()
        self._threads = ThreadPoolExecutor(THREADS, "fp4rt-serve")
        self._preparing = 0

    async def prepare(self, request: HttpRequest, work: Callable[[], T]) -> T:
        """Run what takes milliseconds of pure computing in another thread, unless its client goes while it waits.

        Raises ApiError where too many wait, or Disconnected.
        """
        return await Call(self, request.receive).run(self._prepare(work))

    async def _prepare(self, work: Callable[[], T]) -> T:
        if self._preparing >= MAX_PREPARING:
            raise overloaded("too many requests are being prepared")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._preparing -= 1

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {self.name!r}", "model",
                           "model_not_found")

    def check_chats(self) -> None:
        if not self.text.has_template:
            raise ApiError(400, "this model has no chat template; /v1/completions takes a plain prompt", "messages")

    def check_length(self, prompt: int, max_tokens: int | None, param: str) -> None:
        """Refuse what the context cannot hold, with both numbers. param: the field that the prompt came in."""
        if prompt + 1 > self.max_model_len:
            raise too_long(param, prompt, self.max_model_len)
        if max_tokens is not None and prompt + max_tokens > self.max_model_len:
            raise too_long(param, prompt, self.max_model_len, max_tokens)

    def cut(self) -> None:
        """End every call now: streams with a final error event, others with 503."""
        for call in list(self.busy):
            call.cut()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Call:
    """One HTTP request while it is answered: ends early when the client goes or the server must end."""

    def __init__(self, service: Service, receive: Receive):
        self._service, self._receive = service, receive
        self._cut = asyncio.get_running_loop().create_future()

    def cut(self) -> None:
        if not self._cut.done():
            self._cut.set_result(None)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled if it comes too late. Raises Disconnected, or ApiError when cut."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._until_gone())
        self._service.busy.add(self)
        try:
            await asyncio.wait({task, gone, self._cut}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Disconnected if gone.done() else shutting_down()
        finally:
            self._service.busy.discard(self)
            await stop(task, gone)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def stop(*tasks: asyncio.Future) -> None:
    """Cancel tasks and wait until they have ended; what they raise then is of no interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def together(works: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all, side by side; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await stop(*tasks)


async def read_body(request: HttpRequest, kind: type[T]) -> T:
    """The body as a struct.

    Raises ApiError for one that is too long, too slow, not JSON, or of another shape, and where all bodies together
    are too much.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":  # browsers ask before they send this to another site; and it is the truth
        raise ApiError(415, f"the content type is {content_type[:80]!r}; send application/json")
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > MAX_BODY_BYTES:
        raise too_large()
    body = bytearray()
    try:
        await asyncio.wait_for(_read(request, body), BODY_SECONDS)
        return msgspec.json.decode(body, type=kind)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS} s",
                       headers={"connection": "close"}) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise from_decoding(error) from None
    finally:
        request.state.service.body_bytes -= len(body)


async def _read(request: HttpRequest, body: bytearray) -> None:
    """Append the body to `body` as it comes, and count it."""
    service: Service = request.state.service
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        body += part
        service.body_bytes += len(part)
        if len(body) > MAX_BODY_BYTES:
            raise too_large()
        if service.body_bytes > BODIES_BYTES:
            error = overloaded("the bodies of too many requests are being read")
            error.headers["connection"] = "close"
            raise error
        if not message.get("more_body"):
            return


def too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB", headers={"connection": "close"})


def make_sampling(given: Sampled, max_tokens: int | None, vocab_size: int) -> fp4rt.Sampling:
    """The Sampling that a request asks for. What it leaves open is as the checkpoint's generation_config.json says."""
    bias = {}
    for key, value in (given.logit_bias or {}).items():
        token = int(key) if key.isdecimal() and len(key) < 12 else -1
        if not 0 <= token < vocab_size:
            raise ApiError(400, f"logit_bias: {key[:20]!r} is no token id; these are 0 to {vocab_size - 1}",
                           "logit_bias")
        bias[token] = value
    return fp4rt.Sampling(
        max_tokens=max_tokens, temperature=given.temperature,
        top_k=None if given.top_k is None else max(0, given.top_k), top_p=given.top_p, min_p=given.min_p,
        repetition_penalty=given.repetition_penalty, presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty, logit_bias=bias or None,
        seed=None if given.seed is None else given.seed % 2**64,
        stop=() if given.stop is None else (given.stop,) if isinstance(given.stop, str) else tuple(given.stop),
        ignore_eos=bool(given.ignore_eos))


def make_usage(prompt: int, generated: int, cached: int) -> Usage:
    return Usage(prompt, generated, prompt + generated, PromptTokensDetails(cached))


def make_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(16)}"
