"""The outermost layer: who may ask, a request id, a line in the log, and an answer to every error."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import sys
import time
import traceback
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fp4rt.errors import Fp4rtError
from fp4rt.serve.errors import ApiError, from_fp4rt, shutting_down
from fp4rt.serve.service import Disconnected, Service

OPEN = frozenset({"/", "/health", "/openapi.json"})  # what anyone may see: no model, no figures
REQUEST_ID = re.compile(rb"[\w.-]{1,64}")
SAFE = [(b"x-content-type-options", b"nosniff")]

log = logging.getLogger("fp4rt.serve")


class JsonLines(logging.Formatter):
    """One JSON object per line: what the record's `fields` hold beside time, level and event. Never a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        return json.dumps({"time": stamp, "level": record.levelname.lower(), "event": record.getMessage(),
                           **getattr(record, "fields", {})}, ensure_ascii=False)


def event(level: int, name: str, **fields: object) -> None:
    log.log(level, name, extra={"fields": fields})


class Keys:
    """API keys. Only digests are kept, and every one is compared, each in constant time."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        found = [hmac.compare_digest(digest, one) for one in self._digests]
        return scheme.lower() == b"bearer" and any(found)


def understood(error: Exception) -> ApiError | None:
    """What a client may be told of an error; None where it is not one of ours."""
    if isinstance(error, Fp4rtError):
        return from_fp4rt(error)
    if isinstance(error, HTTPException):  # starlette's 404 and 405
        message = {404: "no such path; /openapi.json tells which there are",
                   405: "this path takes another method"}.get(error.status_code, error.detail)
        return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return error if isinstance(error, ApiError) else None


def is_loopback(host: str) -> bool:
    """Whether only this machine answers to an address; a name other than localhost may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Front:
    """ASGI around the app. own_hosts: whether only requests for a loopback name are answered.

    Without a key, a page of some other site that a browser shows could reach a server on this machine under a name of
    its own (DNS rebinding); the Host header tells.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Keys, own_hosts: bool):
        self._app, self._service, self._keys, self._own_hosts = app, service, keys, own_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()
        scope["app"] = self  # so that starlette's router raises for a path or method that it does not know
        scope["state"] = {"id": name.decode(), "service": self._service}
        started, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name), *SAFE]
            await send(message)

        try:
            self._admit(scope["path"], headers)
            self._service.admitted += 1
            try:
                await self._app(scope, receive, answer)
            finally:
                self._service.admitted -= 1
        except Disconnected:
            status = status or 499  # nginx's number for a client that has gone
        except Exception as error:
            known = understood(error)
            if known is not None and known.code == "overloaded" and self._service.draining:
                known = shutting_down()  # 503: not the queue is full, the engine takes nothing more
            if known is None or known.status >= 500 and not self._service.draining:
                self._log_failure(name.decode(), error)
            if status == 0:
                await (known or ApiError(500, "internal error")).response()(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self._service.metrics.responses.labels(path, str(status)).inc()
            event(logging.INFO, "request", request_id=name.decode(), method=scope["method"], path=path, status=status,
                  seconds=round(time.perf_counter() - started, 4), client=(scope.get("client") or ("", 0))[0])

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError for a request that must not go on."""
        if self._own_hosts:
            host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1"))
            if not is_loopback(re.sub(r"^\[(.*)]$", r"\1", host)):
                raise ApiError(421, f"this server answers for localhost only, not for {host[:100]!r}; start it with an "
                                    "API key to use other names")
        if path in OPEN:
            return
        if self._keys and not self._keys.allow(headers.get(b"authorization", b"")):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key",
                           headers={"www-authenticate": "Bearer"})
        if self._service.draining and path != "/metrics":
            raise shutting_down()

    @staticmethod
    def _log_failure(request_id: str, error: Exception) -> None:
        """Where it happened and what kind; an error of our own also in words, others' words may hold a prompt."""
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        words = {"message": str(error)} if isinstance(error, (ApiError, Fp4rtError)) else {}
        event(logging.ERROR, "failure", request_id=request_id, error=type(error).__name__, where=where, **words)


def log_to_stderr() -> None:
    """JSON lines on stderr: ours, and what uvicorn warns of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("fp4rt.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
