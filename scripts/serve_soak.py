"""Loads `fp4rt serve` until something gives: clients that come and go, half of them cut off, and SIGTERM under load.

    python scripts/serve_soak.py demo --device cpu --deterministic --requests 5000 --clients 64 --sigterms 20

It starts the server itself, with what options of `fp4rt serve` it is given. It checks, and says so line by line, that
replies under load equal those of a quiet run (with --deterministic), that /health answers throughout, that no page is
in use when all is over, and that SIGTERM under load ends with exit code 0 and no stream without [DONE] or an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import sys
import time
from dataclasses import dataclass

CASES = 48           # different requests
HEALTH_SECONDS = 5   # the longest that /health may take on a machine that is busy
WORDS = "the small brown dog and a friendly old owl went to see what was behind the green door of the house".split()


@dataclass
class Reply:
    """A reply's text; ended: "done", "error" (an error event or status), "cut" (by us), or "broken" (by the server)."""

    text: str
    ended: str
    seconds: float


def make_case(number: int) -> dict:
    """Request number `number`: completions and chats of all lengths, greedy and drawn, streamed and whole."""
    rng = random.Random(number)
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 60)))
    body = {"max_tokens": rng.randint(1, 48), "ignore_eos": True, "stream": rng.random() < 0.7,
            "temperature": rng.choice([0, 1.0]), "seed": number}
    return {**body, "prompt": words} if number % 2 else {**body, "messages": [{"role": "user", "content": words}]}


class Client:
    """Requests to one server, over connections of their own."""

    def __init__(self, port: int):
        self.port = port

    async def _send(self, method: str, path: str,
                    body: dict | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = json.dumps(body).encode() if body is not None else b""
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        return reader, writer

    async def get(self, path: str) -> tuple[int, str]:
        reader, writer = await self._send("GET", path)
        try:
            data = (await reader.read()).decode()
            return int(data.split(" ", 2)[1]), data
        finally:
            writer.close()

    async def ask(self, body: dict, cut_after: float | None = None) -> Reply:
        """A completion; cut_after: seconds until we hang up."""
        started, data = time.perf_counter(), bytearray()
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        reader, writer = await self._send("POST", path, body)

        async def read() -> None:
            while part := await reader.read(65536):
                data.extend(part)

        try:
            await asyncio.wait_for(read(), cut_after)
        except asyncio.TimeoutError:
            return Reply("", "cut", cut_after)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
        return self._understand(bytes(data), time.perf_counter() - started)

    @staticmethod
    def _understand(data: bytes, seconds: float) -> Reply:
        head, _, body = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            return Reply(body.decode(errors="replace"), "error" if b'"error"' in body else "broken", seconds)
        if b"text/event-stream" not in head:
            try:
                choice = json.loads(body)["choices"][0]
            except ValueError:
                return Reply("", "broken", seconds)
            return Reply(choice["text"] if "text" in choice else choice["message"]["content"], "done", seconds)
        text, ended = "", "broken"
        for event in re.findall(rb"data: (.*)\n\n", body.replace(b"\r\n", b"\n")):
            if event == b"[DONE]":
                ended = "done"
                continue
            said = json.loads(event)
            if "error" in said:
                ended = "error"
            for choice in said.get("choices", []):
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        return Reply(text, ended, seconds)

    async def pages(self) -> float:
        """The share of K/V pages in use."""
        _, text = await self.get("/metrics")
        return float(re.search(r"fp4rt:kv_cache_usage_perc\{.*\} (\S+)", text)[1])


class Program:
    """`fp4rt serve` with these options, on a free port."""

    def __init__(self, options: list[str]):
        self.options = options

    async def __aenter__(self) -> Program:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fp4rt", "serve", *self.options, "--port", "0", stderr=asyncio.subprocess.PIPE)
        said = b""
        while True:
            line = await self.process.stderr.readline()
            said += line
            if not line:
                raise SystemExit(f"the server did not start:\n{said.decode()}")
            if line.startswith(b"listening on "):
                self.client = Client(int(line.rsplit(b":", 1)[1]))
                break
        self._log = asyncio.create_task(self._drain_log())
        return self

    async def _drain_log(self) -> None:
        while line := await self.process.stderr.readline():
            if b'"level": "error"' in line:
                sys.stderr.write(line.decode())

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._log


def check(good: bool, what: str) -> None:
    print(f"{'ok    ' if good else 'FAILED'} {what}", flush=True)
    if not good:
        raise SystemExit(1)


async def load(options: list[str], requests: int, clients: int, exact: bool) -> None:
    """The long load, against a quiet run before it."""
    async with Program(options) as server:
        client, rng = server.client, random.Random(0)
        at_first = await client.pages()
        quiet = [await client.ask(make_case(i)) for i in range(CASES)]
        check(all(one.ended == "done" for one in quiet), f"{CASES} requests one by one")
        typical = sorted(one.seconds for one in quiet)[CASES // 2]
        todo = list(range(requests))
        ended: dict[str, int] = {}
        wrong, slowest, running = 0, 0.0, True

        async def watch() -> None:
            nonlocal slowest
            while running:
                started = time.perf_counter()
                status, _ = await client.get("/health")
                slowest = max(slowest, time.perf_counter() - started)
                check(status == 200, "/health") if status != 200 else None
                await asyncio.sleep(0.1)

        async def one_client() -> None:
            nonlocal wrong
            while todo:
                number = todo.pop() % CASES
                cut = rng.uniform(0, 2 * typical * clients ** 0.5) if rng.random() < 0.5 else None
                reply = await client.ask(make_case(number), cut)
                ended[reply.ended] = ended.get(reply.ended, 0) + 1
                wrong += reply.ended == "done" and reply.text != quiet[number].text

        watcher = asyncio.create_task(watch())
        started = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(clients)))
        seconds = time.perf_counter() - started
        running = False
        await watcher
        print(f"       {requests} requests of {clients} clients in {seconds:.1f} s: "
              + ", ".join(f"{count} {name}" for name, count in sorted(ended.items())))
        check(not ended.get("broken") and not ended.get("error"), "no reply broken off, none refused")
        check(slowest < HEALTH_SECONDS, f"/health always answered, at most after {slowest:.3f} s")
        if exact:
            check(wrong == 0, "replies under load equal those of the quiet run")
        else:
            print(f"       {wrong} replies differ from the quiet run (exactly equal only with --deterministic)")
        for _ in range(100):
            if await client.pages() == at_first:
                break
            await asyncio.sleep(0.1)
        check(await client.pages() == at_first, "as many pages in use as before")
        server.process.send_signal(signal.SIGTERM)
        check(await server.process.wait() == 0, "SIGTERM at rest: exit code 0")


async def terminate(options: list[str], clients: int, times: int) -> None:
    """SIGTERM under load, again and again."""
    rng = random.Random(1)
    ended: dict[str, int] = {}
    for number in range(times):
        async with Program([*options, "--drain-seconds", str((0, 0.2, 20)[number % 3])]) as server:
            async def ask(i: int, server: Program = server) -> Reply:
                await asyncio.sleep(i / clients / 10)
                try:
                    return await server.client.ask({**make_case(i), "max_tokens": 48})
                except ConnectionError:  # it does not listen any more
                    return Reply("", "error", 0.0)

            asked = [asyncio.create_task(ask(i)) for i in range(clients)]
            await asyncio.sleep(rng.uniform(0.1, 1))
            server.process.send_signal(signal.SIGTERM)
            code = await asyncio.wait_for(server.process.wait(), 60)
            replies = await asyncio.gather(*asked)
            broken = [one for one in replies if one.ended == "broken"]
            for one in replies:
                ended[one.ended] = ended.get(one.ended, 0) + 1
            if code or broken:
                check(False, f"SIGTERM under load, time {number + 1}: exit code {code}, {len(broken)} replies broken")
    check(True, f"SIGTERM under load {times} times: exit code 0, {ended.get('done', 0)} replies whole, "
                f"{ended.get('error', 0)} ended with an error, none without a word")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--sigterms", type=int, default=20)
    given, options = parser.parse_known_args()
    if given.requests:
        asyncio.run(load(options, given.requests, given.clients, "--deterministic" in options))
    if given.sigterms:
        asyncio.run(terminate(options, given.clients, given.sigterms))


if __name__ == "__main__":
    main()
