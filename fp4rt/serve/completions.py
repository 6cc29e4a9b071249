"""POST /v1/completions: texts or token ids continued, with the prompt and its log-probabilities where asked for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fp4rt.async_llm import Delta, Request
from fp4rt.engine import TokenLogprobs
from fp4rt.serve.errors import ApiError
from fp4rt.serve.protocol import (MAX_CHOICES, Completion, CompletionChoice, CompletionLogprobs, CompletionRequest)
from fp4rt.serve.service import Call, Service, make_id, make_sampling, make_usage, read_body, together
from fp4rt.serve.stream import Emit, EventStream
from fp4rt.text import Text, TextStream


def token_text(text: Text, token: int) -> str:
    """A token by itself: its text, or bytes:\\x.. where these are no whole characters (OpenAI's way)."""
    data = text.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass
class Choice:
    """One reply on its way. echo: the prompt's text, which is to come first; drop: the one token made is not wanted."""

    service: Service
    index: int
    request: Request
    ids: list[int]
    echo: str | None
    logprobs: int | None
    drop: bool
    stream: TextStream  # of the reply's tokens whose log-probabilities were told
    offset: int = 0     # characters before them
    started: bool = False
    newest: Delta | None = None

    def take(self, delta: Delta) -> CompletionChoice:
        """What a delta adds."""
        self.newest = delta
        text = "" if self.drop else delta.text
        told = [] if self.drop else list(delta.logprobs or [])
        entries: list[tuple[int, TokenLogprobs | None]] = []
        offsets: list[int] = []
        if not self.started and self.echo is not None:
            text = self.echo + text
            if self.logprobs is not None:
                entries = [(self.ids[0], None), *((one.id, one) for one in delta.prompt_logprobs or [])]
                offsets = self._prompt_offsets(self.echo)
            self.offset = len(self.echo)
        self.started = True
        for one in told:
            entries.append((one.id, one))
            begin, self.offset = self._place(self.stream, one.id, self.offset)
            offsets.append(begin)
        logprobs = self._logprobs(entries, offsets) if self.logprobs is not None else None
        return CompletionChoice(index=self.index, text=text, logprobs=logprobs, finish_reason=self._reason(delta))

    def _reason(self, delta: Delta) -> str | None:
        return "length" if self.drop and delta.finish_reason else delta.finish_reason

    def _prompt_offsets(self, echo: str) -> list[int]:
        """Where in `echo` each token of the prompt begins; 0 for what the tokenizer puts before it."""
        text = self.service.text
        before = text.decode(self.ids, skip_special=False).find(echo)
        stream, end, offsets = text.stream(skip_special=before < 0), -max(0, before), []
        for token in self.ids:
            begin, end = self._place(stream, token, end)
            offsets.append(min(max(0, begin), len(echo)))
        return offsets

    def _place(self, stream: TextStream, token: int, end: int) -> tuple[int, int]:
        """Where a token begins in a text of `end` characters so far, and how many there are with it.

        Part of a character begins where that does; what was part of one before and comes to nothing is U+FFFD now.
        """
        after = end + len(stream.push(token))
        return max(end, after - len(token_text(self.service.text, token))), after

    def _logprobs(self, entries: Sequence[tuple[int, TokenLogprobs | None]], offsets: list[int]) -> CompletionLogprobs:
        spell = partial(token_text, self.service.text)
        told = CompletionLogprobs(offsets, [], [], [])
        for token, one in entries:
            told.tokens.append(spell(token))
            told.token_logprobs.append(one.logprob if one else None)
            told.top_logprobs.append({spell(i): p for i, p in reversed(one.top)} if one else None)  # of equals the best
        return told

    async def collect(self) -> CompletionChoice:
        """The whole reply."""
        parts = [self.take(delta) async for delta in self.service.metrics.watch(self.request)]
        told = None
        if self.logprobs is not None:
            told = CompletionLogprobs(*([one for part in parts for one in getattr(part.logprobs, name)]
                                        for name in CompletionLogprobs.__struct_fields__))
        return CompletionChoice(index=self.index, text="".join(part.text for part in parts), logprobs=told,
                                finish_reason=parts[-1].finish_reason)


async def completions(request: HttpRequest) -> Response:
    service: Service = request.state.service
    given = await read_body(request, CompletionRequest)
    service.check_model(given.model)
    prompts = _prompts(given)
    n = given.n or 1
    if given.best_of not in (None, n):
        raise ApiError(400, f"best_of is {given.best_of}; only n itself is taken", "best_of")
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts times n={n} is more than {MAX_CHOICES} replies", "prompt")
    tokenized = await service.prepare(
        request, lambda: [service.text.encode(one) if isinstance(one, str) else one for one in prompts])
    for ids in tokenized:
        service.check_length(len(ids), given.max_tokens, "prompt")
    drop = given.max_tokens == 0  # the engine makes one token at least; it is not shown
    sampling = make_sampling(given, 1 if drop else given.max_tokens, service.vocab_size)
    choices: list[Choice] = []

    def release() -> None:
        for choice in choices:
            choice.request.cancel()

    try:
        for prompt, ids in zip(prompts, tokenized):
            echo = None if not given.echo else prompt if isinstance(prompt, str) else service.text.decode(ids)
            for index in range(n):
                made = service.llm.submit(
                    ids, sampling, request_id=request.state.id, cache_salt=given.cache_salt or "", index=index,
                    logprobs=given.logprobs, prompt_logprobs=bool(given.echo) and given.logprobs is not None)
                choices.append(Choice(service, len(choices), made, ids, echo, given.logprobs, drop,
                                      service.text.stream()))
        reply = partial(Completion, id=make_id("cmpl"), created=int(time.time()), model=service.name)
        if given.stream:
            usage = bool(given.stream_options and given.stream_options.include_usage)
            return EventStream(service, partial(_stream, choices, reply, usage, n), release)
        done = await Call(service, request.receive).run(together([choice.collect() for choice in choices]))
    except BaseException:
        release()
        raise
    return Response(msgspec.json.encode(reply(choices=done, usage=usage_of(choices, n))), media_type="application/json")


async def _stream(choices: list[Choice], reply: partial, usage: bool, n: int, emit: Emit) -> None:
    async def one(choice: Choice) -> None:
        async for delta in choice.service.metrics.watch(choice.request):
            part = choice.take(delta)
            if part.text or part.finish_reason or part.logprobs:
                await emit(msgspec.json.encode(reply(choices=[part])))

    await together([one(choice) for choice in choices])
    if usage:
        await emit(msgspec.json.encode(reply(choices=[], usage=usage_of(choices, n))))


def usage_of(choices: Sequence[Choice], n: int):
    """Prompts count once each, whatever n is."""
    newest = [choice.newest for choice in choices]
    return make_usage(sum(delta.prompt_tokens for delta in newest[::n]),
                      sum(0 if choice.drop else delta.generated_tokens for choice, delta in zip(choices, newest)),
                      sum(delta.cached_tokens for delta in newest[::n]))


def _prompts(given: CompletionRequest) -> list[str | list[int]]:
    """One or several texts or lists of ids: of one kind."""
    prompt = given.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(one) for one in prompt}
    if kinds == {int}:
        return [prompt]
    if len(kinds) > 1:
        raise ApiError(400, "prompt mixes texts, token ids and lists of them; give one kind", "prompt")
    if [] in prompt:
        raise ApiError(400, "prompt holds an empty list of token ids", "prompt")
    return prompt
