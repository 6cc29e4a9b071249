"""Server-sent events: a reply that is sent while it is made, and ends with an error event if it cannot be finished."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fp4rt.errors import Fp4rtError
from fp4rt.serve.errors import ApiError, from_fp4rt
from fp4rt.serve.service import Call, Disconnected, Service

Emit = Callable[[bytes], Awaitable[None]]

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]


class EventStream(Response):
    """Sends what `produce` emits, then [DONE].

    However it ends (the client goes, the server must end, the engine fails), `produce` is cancelled and `release`
    called; a client that is still there gets the reason as a last event, and no [DONE].
    """

    def __init__(self, service: Service, produce: Callable[[Emit], Awaitable[None]], release: Callable[[], None]):
        super().__init__()
        self._service, self._produce, self._release = service, produce, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def emit(data: bytes) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._produce(emit)
            await emit(b"[DONE]")

        try:
            await Call(self._service, receive).run(work())
        except ApiError as error:
            await emit(error.body())
        except Fp4rtError as error:
            await emit(from_fp4rt(error).body())
        except Disconnected:
            return
        except Exception:
            await emit(ApiError(500, "internal error").body())
            raise  # to be logged
        finally:
            self._release()
            await send({"type": "http.response.body", "body": b""})
