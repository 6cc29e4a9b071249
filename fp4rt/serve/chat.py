"""POST /v1/chat/completions: a conversation through the model's chat template, with tools, reasoning and schemas."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fp4rt.async_llm import Delta, Request
from fp4rt.engine import Grammar, TokenLogprobs
from fp4rt.errors import Fp4rtError
from fp4rt.serve.completions import token_text, usage_of
from fp4rt.serve.errors import ApiError
from fp4rt.serve.protocol import (ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, ChatRequest,
                                  ContentPart, JsonObjectFormat, JsonSchemaFormat, Message, Reply, ReplyDelta,
                                  ReplyFunction, ReplyTool, ReplyToolDelta, TokenizeRequest, TokenLogprob, ToolChoice,
                                  ToolDefinition, TopLogprob)
from fp4rt.serve.service import Call, Service, make_id, make_sampling, read_body, together
from fp4rt.serve.stream import Emit, EventStream
from fp4rt.text import RESERVED, Splitter, Text, Tool, ToolCall, ToolFormat, ToolSplitter


# What a function without "parameters" takes, as OpenAI's API reference says: nothing.
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: a developer is the system, a call's arguments are an object."""
    plain = []
    for i, message in enumerate(messages):
        one: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        content = message.content
        if isinstance(content, list):
            content = "\n".join(_said(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content))
        if content is None and message.role != "assistant":
            raise ApiError(400, f"messages[{i}] has no content", f"messages[{i}].content")
        one["content"] = content if content is not None else ""
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(message, name) is not None:
                one[name] = getattr(message, name)
        if message.tool_calls:
            one["tool_calls"] = [{"id": call.id, "type": "function", "function": {
                "name": call.function.name,
                "arguments": _arguments(call.function.arguments, f"messages[{i}].tool_calls[{j}]")}}
                for j, call in enumerate(message.tool_calls)]
        plain.append(one)
    return plain


def _said(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise ApiError(400, f"{where} is of type {part.type!r}; only text is taken, no images, audio, video or files",
                       f"{where}.type")
    said = getattr(part, part.type)
    if said is None:
        raise ApiError(400, f"{where} has no {part.type}", f"{where}.{part.type}")
    return said


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ApiError(400, f"{where}.function.arguments is not a JSON object", f"{where}.function.arguments")
    return value


def plain_tools(tools: Sequence[ToolDefinition]) -> list[dict[str, Any]]:
    """Tools as chat templates expect them."""
    return [{"type": "function", "function": {
        "name": tool.function.name, "description": tool.function.description or "",
        "parameters": tool.function.parameters or {"type": "object", "properties": {}}}} for tool in tools]


@dataclass(frozen=True)
class Prompt:
    """A conversation as the engine takes it, and how its reply is to be read."""

    ids: list[int]
    tools: list[Tool]
    format: ToolFormat | None

    def splitter(self, text: Text) -> Splitter | None:
        return text.tool_splitter(self.ids, self.tools, self.format) if self.format else text.splitter(self.ids)


def encode_chat(service: Service, given: ChatRequest | TokenizeRequest, tools: Sequence[ToolDefinition],
                **options: Any) -> list[int]:
    """The ids of a conversation. Takes milliseconds: the chat template runs, in a process of its own.

    Raises ApiError naming the field where the template, or what it is given, is not for this conversation.
    """
    service.check_chats()
    if tools and service.text.tool_format() is None:
        raise ApiError(400, "this model's chat template takes no tools", "tools")
    arguments = given.chat_template_kwargs or {}
    if taken := RESERVED & arguments.keys():
        raise ApiError(400, f"chat_template_kwargs: {', '.join(sorted(taken))} cannot be set there; other fields and "
                            "the tokenizer do", "chat_template_kwargs")
    try:
        return service.text.encode_chat(plain_messages(given.messages), tools=plain_tools(tools) or None,
                                        **{**arguments, **options})
    except Fp4rtError as error:
        if error.kind != "request" or error.param:
            raise
        named = "reasoning_effort" if options.get("think") is not None and "think" in str(error) else "messages"
        raise ApiError(400, str(error).removeprefix(f"{service.text.path}/"), named) from None


def make_prompt(service: Service, given: ChatRequest) -> Prompt:
    """The conversation of a request, as `encode_chat` makes it."""
    text, tools, options = service.text, given.tools or [], {}
    if given.tool_choice not in (None, "none") and not tools:
        raise ApiError(400, "tool_choice needs tools", "tool_choice")
    if len({tool.function.name for tool in tools}) < len(tools):
        raise ApiError(400, "two tools have the same name", "tools")
    if given.tool_choice == "none":
        tools = []
    service.check_chats()
    if given.reasoning_effort == "none":
        options["think"] = False
    elif given.reasoning_effort is not None:
        if "reasoning_effort" not in text.template.interest(bool(tools)).variables:
            raise ApiError(400, "this model's chat template has no reasoning_effort; chat_template_kwargs sets what it "
                                "has", "reasoning_effort")
        options["reasoning_effort"] = given.reasoning_effort
    ids, format = encode_chat(service, given, tools, **options), text.tool_format() if tools else None
    return Prompt(ids, [Tool(tool.function.name, NO_PARAMETERS if tool.function.parameters is None else
                             tool.function.parameters) for tool in tools], format)


def make_grammar(service: Service, given: ChatRequest, prompt: Prompt) -> Grammar | None:
    """What the reply must look like, if anything. Takes milliseconds at times: schemas are compiled."""
    splitter = service.text.splitter(prompt.ids)
    if prompt.tools and given.tool_choice not in (None, "auto"):
        if isinstance(given.response_format, (JsonObjectFormat, JsonSchemaFormat)):
            raise ApiError(400, "response_format and a forced tool_choice exclude each other", "tool_choice")
        tools, several = prompt.tools, given.parallel_tool_calls is not False
        if isinstance(given.tool_choice, ToolChoice):
            wanted = given.tool_choice.function.name
            tools, several = [tool for tool in tools if tool.name == wanted], False
            if not tools:
                raise ApiError(400, f"tool_choice names {wanted!r}, which is not among the tools", "tool_choice")
        return service.grammars.of_tools(tools, prompt.format, several, splitter)
    if isinstance(given.response_format, JsonObjectFormat):
        return service.grammars.of_schema({"type": "object"}, splitter, "response_format")
    if isinstance(given.response_format, JsonSchemaFormat):
        return service.grammars.of_schema(given.response_format.json_schema.schema, splitter, "response_format")
    return None


@dataclass
class Choice:
    """One reply on its way."""

    service: Service
    index: int
    request: Request
    splitter: Splitter | None
    logprobs: bool
    one_call: bool  # parallel_tool_calls is false
    newest: Delta | None = None
    drop: bool = False
    calls: list[ReplyToolDelta] = field(default_factory=list)

    def take(self, delta: Delta) -> ChatChunkChoice:
        """What a delta adds."""
        self.newest = delta
        first = len(self.calls)
        for call in self._found()[first:]:
            self.calls.append(ReplyToolDelta(index=len(self.calls), id=f"call_{secrets.token_hex(12)}",
                                             function=ReplyFunction(call.name, call.arguments)))
        said = ReplyDelta(content=delta.text or UNSET, reasoning_content=delta.reasoning or UNSET,
                          tool_calls=self.calls[first:] or UNSET)
        logprobs = ChatLogprobs([self._told(one) for one in delta.logprobs or []]) if self.logprobs else None
        reason = "tool_calls" if self.calls and delta.finish_reason == "stop" else delta.finish_reason
        return ChatChunkChoice(index=self.index, delta=said, logprobs=logprobs, finish_reason=reason)

    def _found(self) -> list[ToolCall]:
        calls = self.splitter.calls if isinstance(self.splitter, ToolSplitter) else []
        return calls[:1] if self.one_call else calls

    def _told(self, one: TokenLogprobs) -> TokenLogprob:
        def entry(token: int) -> tuple[str, list[int]]:
            return token_text(self.service.text, token), list(self.service.text.token_bytes(token))

        token, data = entry(one.id)
        return TokenLogprob(token, one.logprob, data, [
            TopLogprob(entry(i)[0], logprob, entry(i)[1]) for i, logprob in one.top])

    async def collect(self) -> ChatChoice:
        """The whole reply."""
        parts = [self.take(delta) async for delta in self.service.metrics.watch(self.request)]
        content = "".join(part.delta.content or "" for part in parts)
        reasoning = "".join(part.delta.reasoning_content or "" for part in parts)
        message = Reply(content=content if content or not self.calls else None, reasoning_content=reasoning or UNSET,
                        tool_calls=[ReplyTool(id=call.id, function=call.function) for call in self.calls] or UNSET)
        told = ChatLogprobs([one for part in parts for one in part.logprobs.content]) if self.logprobs else None
        return ChatChoice(index=self.index, message=message, logprobs=told, finish_reason=parts[-1].finish_reason)


async def chat_completions(request: HttpRequest) -> Response:
    service: Service = request.state.service
    given = await read_body(request, ChatRequest)
    service.check_model(given.model)
    if given.top_logprobs and not given.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    max_tokens = given.max_completion_tokens or given.max_tokens
    sampling = make_sampling(given, max_tokens, service.vocab_size)
    prompt = await service.prepare(request, partial(make_prompt, service, given))
    service.check_length(len(prompt.ids), max_tokens, "messages")
    n = given.n or 1
    grammars = await service.prepare(
        request, lambda: [make_grammar(service, given, prompt) for _ in range(n)])
    choices: list[Choice] = []

    def release() -> None:
        for choice in choices:
            choice.request.cancel()

    try:
        for index, grammar in enumerate(grammars):
            splitter = prompt.splitter(service.text)
            made = service.llm.submit(
                prompt.ids, sampling, request_id=request.state.id, cache_salt=given.cache_salt or "", index=index,
                logprobs=(given.top_logprobs or 0) if given.logprobs else None, grammar=grammar, splitter=splitter)
            choices.append(Choice(service, index, made, splitter, bool(given.logprobs),
                                  one_call=given.parallel_tool_calls is False))
        named = dict(id=make_id("chatcmpl"), created=int(time.time()), model=service.name)
        if given.stream:
            usage = bool(given.stream_options and given.stream_options.include_usage)
            return EventStream(service, partial(_stream, choices, partial(ChatChunk, **named), usage), release)
        done = await Call(service, request.receive).run(together([choice.collect() for choice in choices]))
    except BaseException:
        release()
        raise
    reply = ChatCompletion(**named, choices=done, usage=usage_of(choices, n))
    return Response(msgspec.json.encode(reply), media_type="application/json")


async def _stream(choices: list[Choice], chunk: partial, usage: bool, emit: Emit) -> None:
    if usage:
        chunk = partial(chunk, usage=None)  # every chunk but the last says that it has none

    async def one(choice: Choice) -> None:
        opening = ChatChunkChoice(index=choice.index, delta=ReplyDelta(role="assistant", content=""))
        await emit(msgspec.json.encode(chunk(choices=[opening])))
        async for delta in choice.service.metrics.watch(choice.request):
            part = choice.take(delta)
            said = part.delta
            if said.tool_calls and part.finish_reason:  # apart: a client sees by what follows that a call is whole
                await emit(msgspec.json.encode(chunk(choices=[msgspec.structs.replace(part, finish_reason=None)])))
                part = ChatChunkChoice(index=part.index, delta=ReplyDelta(), finish_reason=part.finish_reason)
                said = part.delta
            if said.content or said.reasoning_content or said.tool_calls or part.finish_reason \
                    or part.logprobs and part.logprobs.content:
                await emit(msgspec.json.encode(chunk(choices=[part])))

    await together([one(choice) for choice in choices])
    if usage:
        await emit(msgspec.json.encode(chunk(choices=[], usage=usage_of(choices, len(choices)))))
