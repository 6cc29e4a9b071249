"""The small endpoints: models, tokens, health, metrics, and the chat page."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import partial
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fp4rt.serve.chat import encode_chat
from fp4rt.serve.completions import token_text
from fp4rt.serve.errors import ApiError, shutting_down
from fp4rt.serve.protocol import (DetokenizeRequest, DetokenizeResponse, Health, Model, Models, TokenizeRequest,
                                  TokenizerInfo, TokenizeResponse)
from fp4rt.serve.service import Service, read_body
from fp4rt.text import SPECIAL

PAGE = Path(__file__).with_name("page.html").read_bytes()
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _hash(tag: str) -> str:
    """A content security policy's name for the page's only <script> or <style>."""
    body = re.search(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), PAGE, re.DOTALL)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'"


PAGE_HEADERS = {
    "content-security-policy": f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer", "cache-control": "no-cache"}


def as_json(body: msgspec.Struct, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def _service(request: Request) -> Service:
    return request.state.service


async def page(_: Request) -> Response:
    return Response(PAGE, headers=PAGE_HEADERS, media_type="text/html; charset=utf-8")


async def openapi(request: Request) -> Response:
    return Response(_service(request).openapi, media_type="application/json")


async def health(request: Request) -> Response:
    """200 while requests are taken; 503 while the server ends, or once the engine has failed."""
    service = _service(request)
    if service.draining:
        raise shutting_down()
    if not service.llm.healthy:
        raise ApiError(503, "the engine has stopped", code="engine_stopped")
    return as_json(Health("ok"))


async def metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), headers={"content-type": METRICS_TYPE})


def _model(service: Service) -> Model:
    return Model(id=service.name, created=service.created, max_model_len=service.max_model_len)


async def models(request: Request) -> Response:
    return as_json(Models(data=[_model(_service(request))]))


async def model(request: Request) -> Response:
    service = _service(request)
    service.check_model(request.path_params["model"])
    return as_json(_model(service))


async def tokenize(request: Request) -> Response:
    """The ids of a text, or of a conversation through the chat template."""
    service, given = _service(request), await read_body(request, TokenizeRequest)
    service.check_model(given.model)
    if (given.prompt is None) == (given.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    only_chat = given.add_generation_prompt is not None or given.tools or given.chat_template_kwargs
    if given.messages is None and only_chat or given.messages is not None and given.add_special_tokens is not None:
        raise ApiError(400, "add_special_tokens goes with prompt; tools, add_generation_prompt and "
                            "chat_template_kwargs go with messages",
                       "add_special_tokens" if given.messages else "add_generation_prompt")

    def encode() -> list[int]:
        if given.messages is None:
            return service.text.encode(given.prompt, given.add_special_tokens is not False)
        return encode_chat(service, given, given.tools or [],
                           add_generation_prompt=given.add_generation_prompt is not False)

    ids = await service.prepare(request, encode)
    spelled = list(map(partial(token_text, service.text), ids)) if given.return_token_strs else None
    return as_json(TokenizeResponse(len(ids), service.max_model_len, ids, spelled))


async def detokenize(request: Request) -> Response:
    """The text of ids, special tokens spelled out."""
    service, given = _service(request), await read_body(request, DetokenizeRequest)
    service.check_model(given.model)
    for token in given.tokens:
        if token >= service.vocab_size:
            raise ApiError(400, f"tokens holds {token}; ids are 0 to {service.vocab_size - 1}", "tokens")
    return as_json(DetokenizeResponse(await service.prepare(
        request, lambda: service.text.decode(given.tokens, skip_special=False))))


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's special tokens and the chat template."""
    text = _service(request).text
    template = text.template.source() if text.has_template else None
    return as_json(TokenizerInfo(*map(text.special_tokens.get, SPECIAL), chat_template=template))
