"""The process: a socket, HTTP/1.1 with a limit on everything a client may do slowly, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fp4rt.errors import Fp4rtError
from fp4rt.serve.errors import ApiError, overloaded
from fp4rt.serve.front import Front, event
from fp4rt.serve.service import Service

MAX_HEADER_BYTES = 32 << 10
PIECE = 8 << 10            # given to h11 at once, which bounds what is not whole, not what came whole in one read
MAX_CONNECTIONS = 1024
HEADER_SECONDS = 10        # for a request line and its headers, from the first byte or from connecting; and for what
                           # is left of a body whose request has been answered
KEEP_ALIVE_SECONDS = 30    # between a response and the next request
WRITE_SECONDS = 30         # for a client to take anything of what waits for it
FLUSH_SECONDS = 5          # for last words when the server ends


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, without patience for clients that connect and are silent, trickle headers, or never read."""

    _headers: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(overloaded(f"more than {MAX_CONNECTIONS} connections are open", 503))
            return
        _notice_dead_peers(transport.get_extra_info("socket"))
        self._headers = self.loop.call_later(HEADER_SECONDS, self._abort)

    def data_received(self, data: bytes) -> None:
        for begin in range(0, len(data), PIECE):
            if self.transport.is_closing():
                return
            super().data_received(data[begin:begin + PIECE])
        answered = self.conn.our_state is h11.DONE  # and more of the body comes, which nobody reads
        if self.conn.their_state is not h11.IDLE and not answered:
            self._stop_headers()
        elif self._headers is None and self.timeout_keep_alive_task is None:  # or a next request has begun
            self._headers = self.loop.call_later(HEADER_SECONDS, self._abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_headers()
        self._stop_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._writing or self.loop.call_later(WRITE_SECONDS, self._abort)

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _refuse(self, error: ApiError) -> None:
        body = error.body()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close",
                   **error.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(f"HTTP/1.1 {error.status} \r\n{head}\r\n".encode() + body)
        self.transport.close()

    def _abort(self) -> None:
        self.transport.abort()

    def _stop_headers(self) -> None:
        if self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def _notice_dead_peers(sock: socket.socket) -> None:
    """Let the kernel end connections whose other end has vanished, or takes nothing for WRITE_SECONDS."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3),
                        ("TCP_USER_TIMEOUT", WRITE_SECONDS * 1000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def bind(host: str, port: int) -> socket.socket:
    """A socket on that address, taken now so that a mistake shows before a model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except OSError as error:
        raise Fp4rtError("request", f"cannot listen on {host} port {port}: {error.strerror or error}", "port") from None


class Server(uvicorn.Server):
    """Ends in order: no new requests, then those that run, then those that still do with an error, then the socket."""

    def __init__(self, app: Front, service: Service, drain_seconds: float, ready: Callable[[], None] = lambda: None):
        """drain_seconds: how long running requests may go on at the end. ready: called once connections are taken."""
        super().__init__(uvicorn.Config(
            app, http=Protocol, loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES, timeout_graceful_shutdown=FLUSH_SECONDS))
        self._service, self._drain_seconds, self._ready = service, drain_seconds, ready
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT begins the end, the second hurries it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, both = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for one in both:
            loop.add_signal_handler(one, self.end)
        try:
            yield
        finally:
            for one in both:
                loop.remove_signal_handler(one)

    def end(self) -> None:
        """Begin to end, or cut what still runs. Called in the loop's thread."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())
        else:
            self._service.cut()

    async def _end(self) -> None:
        service, deadline = self._service, time.monotonic() + self._drain_seconds
        service.draining = True
        event(logging.INFO, "draining", requests=service.admitted, seconds=self._drain_seconds)
        while service.admitted and time.monotonic() < deadline:  # what is still being read or rendered may run too
            await asyncio.sleep(0.02)
        event(logging.INFO, "ending", cut=service.admitted)
        await service.llm.drain(0)
        service.cut()
        self.should_exit = True
