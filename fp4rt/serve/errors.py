"""What a client is told when a request cannot be answered: OpenAI's error body, with a status that fits."""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response

from fp4rt.errors import Fp4rtError
from fp4rt.serve.protocol import Error, ErrorDetail

RETRY_SECONDS = 1
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than the one that was asked for. code: OpenAI's name for the problem, where it has one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return msgspec.json.encode(Error(ErrorDetail(str(self), kind, self.param, self.code)))

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, "application/json")


def overloaded(message: str, status: int = 429) -> ApiError:
    """Not now, but later: 429 where the queue is full, 503 where the server is about to end."""
    return ApiError(status, message, code="overloaded", headers={"retry-after": str(RETRY_SECONDS)})


def shutting_down() -> ApiError:
    return overloaded("the server is shutting down", 503)


def too_long(param: str, prompt: int, room: int, asked: int | None = None) -> ApiError:
    """A prompt of `prompt` tokens, or one with `asked` more to generate, where the context holds `room`."""
    wanted = (f"the prompt has {prompt} tokens" if asked is None else
              f"{prompt + asked} tokens are asked for ({prompt} in the prompt, {asked} to generate)")
    return ApiError(400, f"This model's maximum context length is {room} tokens, but {wanted}. Shorten it.",
                    param, "context_length_exceeded")


def from_fp4rt(error: Fp4rtError) -> ApiError:
    """An Fp4rtError as its kind says; a request's own problem is the client's, everything else the server's."""
    if error.kind == "request":
        return ApiError(400, str(error), error.param)
    return overloaded(str(error)) if error.kind == "overload" else ApiError(500, str(error), code=error.kind)


def from_decoding(error: Exception) -> ApiError:
    """A body that is no JSON, or JSON of another shape, with the field that is wrong."""
    if not isinstance(error, msgspec.ValidationError):
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        return ApiError(400, f"the body is not JSON: {reason}")
    message, _, path = str(error).partition(" - at `")
    where = path.removesuffix("`").removeprefix("$").lstrip(".")
    field = re.search(r"(?:unknown|required) field `(.*)`$", message)
    if field:
        where = f"{where}.{field[1]}".lstrip(".")
    return ApiError(400, f"{where}: {message}" if where and not field else message, where or None,
                    "unknown_parameter" if "unknown field" in message else None)
