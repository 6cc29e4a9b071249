"""The application: which path is answered by what, and the OpenAPI file that says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

import fp4rt
from fp4rt.serve import others
from fp4rt.serve.chat import chat_completions
from fp4rt.serve.completions import completions
from fp4rt.serve.front import OPEN, Front, Keys
from fp4rt.serve.protocol import (ChatChunk, ChatCompletion, ChatRequest, Completion, CompletionRequest,
                                  DetokenizeRequest, DetokenizeResponse, Error, Health, Model, Models, TokenizeRequest,
                                  TokenizerInfo, TokenizeResponse)
from fp4rt.serve.service import Service


@dataclass(frozen=True)
class Endpoint:
    """A path. takes: the body; gives: the answer's struct or, as text, its media type; streams: what events hold."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    takes: type | None = None
    gives: type | str = "application/json"
    streams: type | None = None


ENDPOINTS = [
    Endpoint("POST", "/v1/chat/completions", chat_completions, "The reply to a conversation", ChatRequest,
             ChatCompletion, ChatChunk),
    Endpoint("POST", "/v1/completions", completions, "Texts or token ids continued", CompletionRequest, Completion,
             Completion),
    Endpoint("GET", "/v1/models", others.models, "The model that is served", None, Models),
    Endpoint("GET", "/v1/models/{model:path}", others.model, "A model by its name", None, Model),
    Endpoint("POST", "/tokenize", others.tokenize, "The token ids of a text or a conversation", TokenizeRequest,
             TokenizeResponse),
    Endpoint("POST", "/detokenize", others.detokenize, "The text of token ids", DetokenizeRequest, DetokenizeResponse),
    Endpoint("GET", "/tokenizer_info", others.tokenizer_info, "Special tokens and the chat template", None,
             TokenizerInfo),
    Endpoint("GET", "/health", others.health, "Whether requests are taken", None, Health),
    Endpoint("GET", "/metrics", others.metrics, "Figures for Prometheus", None, "text/plain"),
    Endpoint("GET", "/openapi.json", others.openapi, "This description"),
    Endpoint("GET", "/", others.page, "A page to chat on", None, "text/html"),
]

ERRORS = {401: "No valid API key", 404: "No such path or model", 405: "Another method", 408: "The body came too slowly",
          413: "The body is too large", 415: "The body is not application/json", 421: "Not for this host",
          429: "Too many requests wait; Retry-After says when to ask again", 500: "A failure of the server",
          503: "The server is ending, or its engine has failed"}


def make_openapi(keys: bool) -> bytes:
    """OpenAPI 3.1, made from the structs that bodies are decoded to and encoded from."""
    reference = "#/components/schemas/{name}"
    named = {kind for one in ENDPOINTS for kind in (one.takes, one.gives, one.streams) if isinstance(kind, type)}
    ordered = sorted(named | {Error}, key=lambda kind: kind.__name__)
    schemas, components = msgspec.json.schema_components(ordered, ref_template=reference)
    schema_of = dict(zip(ordered, schemas))
    problem = {"application/json": {"schema": schema_of[Error]}}
    paths: dict[str, Any] = {}
    for one in ENDPOINTS:
        path = one.path.replace(":path", "")
        body = {one.gives: {"schema": {"type": "string"}}} if isinstance(one.gives, str) else \
            {"application/json": {"schema": schema_of[one.gives]}}
        if one.gives == "application/json":
            body = {one.gives: {"schema": {"type": "object"}}}
        asked = "As asked"
        if one.streams:
            body["text/event-stream"] = {}
            asked += (f". With stream: true each event's data is a {one.streams.__name__} in JSON; the last is [DONE], or "
                      "an Error where the reply breaks off")
        responses = {"200": {"description": asked, "content": body}}
        for status, text in ERRORS.items():
            responses[str(status)] = {"description": text, "content": problem}
        for status in ("429", "503"):
            responses[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
        operation: dict[str, Any] = {"summary": one.summary, "operationId": one.handler.__name__,
                                     "responses": responses}
        if one.takes:
            responses["400"] = {"description": "The request is wrong; param names the field", "content": problem}
            operation["requestBody"] = {"required": True,
                                        "content": {"application/json": {"schema": schema_of[one.takes]}}}
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True,
                                        "schema": {"type": "string", "minLength": 1}}]
        if keys and one.path not in OPEN:
            operation["security"] = [{"key": []}]
        paths.setdefault(path, {})[one.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0", "info": {"title": "fp4rt serve", "version": fp4rt.__version__},
        "paths": paths, "components": {"schemas": components}}
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return msgspec.json.encode(document)


def make_app(llm: fp4rt.AsyncLLM, name: str, keys: Sequence[str] = (),
             own_hosts: bool = False) -> tuple[Front, Service]:
    """The ASGI application for a model, and what it shares. own_hosts: answer for loopback names only."""
    service = Service(llm, name, make_openapi(bool(keys)))
    router = Router([Route(one.path, one.handler, methods=[one.method]) for one in ENDPOINTS], redirect_slashes=False)
    return Front(router, service, Keys(keys), own_hosts), service
