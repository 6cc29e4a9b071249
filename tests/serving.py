"""A server for tests: in a thread of this process, or as a program of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fp4rt
from fp4rt.serve import Server, bind, make_app


@dataclass
class Running:
    """A server that answers on 127.0.0.1:port."""

    port: int
    llm: fp4rt.AsyncLLM | None = None
    key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None,
            timeout: float = 60) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = {} if body is None else {"content-type": "application/json"}
        if self.key:
            sent["authorization"] = f"Bearer {self.key}"
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, data, {**sent, **(headers or {})})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of an answer that must be 200."""
        status, _, data = self.ask("POST", path, body)
        assert status == 200, data
        return json.loads(data)

    def refused(self, path: str, status: int, body: Any, **options: Any) -> dict[str, Any]:
        """The error of an answer that must have this status."""
        found, headers, data = self.ask("POST", path, body, **options)
        assert found == status, (found, data)
        error = json.loads(data)["error"]
        assert error["message"] and error["type"] and {"param", "code"} <= error.keys()
        assert headers["content-type"] == "application/json"
        return error

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream, which must end with [DONE]."""
        status, headers, data = self.ask("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        parts = [part.removeprefix("data: ") for part in data.decode().split("\n\n") if part]
        assert parts.pop() == "[DONE]"
        return [json.loads(part) for part in parts]

    def begin(self, path: str, body: dict[str, Any]) -> socket.socket:
        """Send a request and do not wait for what comes."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        data = json.dumps(body).encode()
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return sock


@contextlib.contextmanager
def serving(model: str, keys: tuple[str, ...] = (), own_hosts: bool = False, max_queue: int = 1024,
            **options: Any) -> Iterator[Running]:
    """A server in a thread, which ends with the block."""
    sock = bind("127.0.0.1", 0)
    with fp4rt.AsyncLLM.load(model, max_queue=max_queue, **options) as llm:
        app, service = make_app(llm, str(model), keys, own_hosts)
        server = Server(app, service, drain_seconds=10)
        thread = threading.Thread(target=asyncio.run, args=(server.serve([sock]),), daemon=True)
        thread.start()
        running = Running(sock.getsockname()[1], llm, keys[0] if keys else None)
        wait_until(lambda: server.started)
        try:
            yield running
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[tuple[subprocess.Popen, Running]]:
    """`fp4rt serve` as a process, ready; it is killed if it is still there after the block."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fp4rt.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "fp4rt", "serve", *arguments, "--port", "0"], env=environment,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        port, said = 0, b""
        deadline = time.monotonic() + 120
        while not port:
            ready, _, _ = select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))
            line = process.stderr.readline() if ready else b""
            assert line, f"the server did not start: {said.decode()}"
            said += line
            if line.startswith(b"listening on "):
                port = int(line.rsplit(b":", 1)[1])
        running = Running(port)
        wait_until(lambda: running.ask("GET", "/health")[0] == 200)
        yield process, running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def wait_until(true: Any, seconds: float = 30) -> None:
    """Until something holds; a server that refuses connections yet is waited for too."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ConnectionError):
            if true():
                return
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)
