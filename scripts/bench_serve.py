"""Times `fp4rt serve` as its clients see it: tokens per second of many streams, and first tokens beside a long prompt.

    python scripts/bench_serve.py MODEL --clients 32 --clients 128 --prompt-tokens 128 --max-tokens 256
    python scripts/bench_serve.py MODEL --long-prompt 32768 --max-num-batched-tokens 512 --max-model-len 33000

It starts the server itself, with what other options of `fp4rt serve` it is given. Prompts are random ids, greedy and
past any end-of-text token, each reply between half of --max-tokens and all of them, so that requests come and go at
any moment. Before anything is timed it checks that a stream says what a whole reply says, and how many
tokens that is. Each of --clients is a run of its own, of --rounds requests per client, one after the other; a run of
one request per client comes before it, to record and compile what it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

from serve_soak import Program, check

VOCABULARY = 256      # ids of prompts: every model has as many
SHORT_PROMPT = 32     # tokens of the prompts that come beside a long one
SHORT_INTERVAL = 0.1  # seconds between them


@dataclass
class Stream:
    """A streamed reply. Seconds on one clock; events: when each piece of text came; tokens: by the server's usage."""

    begun: float
    events: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    ended: float = 0.0

    @property
    def first(self) -> float:
        return self.events[0] - self.begun


def body(prompt: list[int], tokens: int, stream: bool) -> dict:
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream, **usage}


def make_prompt(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(tokens)]


async def stream(port: int, prompt: list[int], tokens: int) -> Stream:
    """A completion, streamed. Raises SystemExit where the server refuses it or breaks it off."""
    data = json.dumps(body(prompt, tokens, True)).encode()
    found = Stream(time.perf_counter())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"the server refused: {head.decode()}{(await reader.read(2000)).decode()}")
    done = False
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            found.tokens = event["usage"]["completion_tokens"]
        elif event.get("choices"):
            found.events.append(time.perf_counter())
            found.text += event["choices"][0]["text"]
    found.ended = time.perf_counter()
    writer.close()
    if not done:
        raise SystemExit("a stream was broken off")
    return found


def shares(seconds: list[float]) -> str:
    """Median and 95 % of times, in ms."""
    ranked = sorted(seconds)
    return f"{statistics.median(ranked) * 1e3:9.1f} {ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))] * 1e3:9.1f}"


async def throughput(port: int, clients: int, rounds: int, prompt_tokens: int, max_tokens: int) -> None:
    rng = random.Random(clients)

    async def one_client(count: int) -> list[Stream]:
        nonlocal asked
        replies = []
        for _ in range(count):
            tokens = rng.randint((max_tokens + 1) // 2, max_tokens)
            asked += tokens
            replies.append(await stream(port, make_prompt(rng, prompt_tokens), tokens))
        return replies

    asked = 0
    await asyncio.gather(*(one_client(1) for _ in range(clients)))
    asked = 0
    started = time.perf_counter()
    replies = [one for client in await asyncio.gather(*(one_client(rounds) for _ in range(clients))) for one in client]
    seconds = max(one.ended for one in replies) - started
    tokens = sum(one.tokens for one in replies)
    check(tokens == asked, f"{clients} clients: {len(replies)} replies of {tokens} tokens in all, as asked for")
    gaps = [later - earlier for one in replies for earlier, later in zip(one.events, one.events[1:])]
    events = sum(len(one.events) for one in replies)
    print(f"{'clients':>8} {'tokens/s':>9} {'first ms':>9} {'95 %':>9} {'gap ms':>9} {'95 %':>9} {'tokens/event':>12}\n"
          f"{clients:8} {tokens / seconds:9.1f} {shares([one.first for one in replies])} {shares(gaps)} "
          f"{tokens / events:12.2f}", flush=True)


async def beside(port: int, long_prompt: int) -> None:
    """First tokens of short prompts that come at a steady rate while a long one is computed."""
    rng = random.Random(0)
    await asyncio.gather(*(stream(port, make_prompt(rng, tokens), 4) for tokens in (
        long_prompt // 4, SHORT_PROMPT, SHORT_PROMPT, SHORT_PROMPT)))  # compiles what is still missing
    quiet = [await stream(port, make_prompt(rng, SHORT_PROMPT), 4) for _ in range(8)]
    print(f"{'first tokens':>24} {'requests':>8} {'median ms':>9} {'95 %':>9}\n"
          f"{'alone':>24} {len(quiet):8} {shares([one.first for one in quiet])}")
    long = asyncio.create_task(stream(port, make_prompt(rng, long_prompt), 2))
    await asyncio.sleep(SHORT_INTERVAL)
    short = []
    while not long.done():
        short.append(asyncio.create_task(stream(port, make_prompt(rng, SHORT_PROMPT), 4)))
        await asyncio.wait({long}, timeout=SHORT_INTERVAL)
    computed = (await long).events[0]
    during = [one.first for one in await asyncio.gather(*short) if one.events[0] < computed]
    check(bool(during), f"{len(during)} first tokens came before that of a prompt of {long_prompt} tokens")
    print(f"{f'beside {long_prompt} tokens':>24} {len(during):8} {shares(during)}\n"
          f"the long prompt's own came after {(await long).first:.2f} s", flush=True)


async def run(given: argparse.Namespace, options: list[str]) -> None:
    started = time.perf_counter()
    async with Program([given.model, *options]) as server:
        print(f"it listens {time.perf_counter() - started:.2f} s after its start")
        prompt = make_prompt(random.Random(1), 40)
        whole = await server.client.ask(body(prompt, 24, False))
        streamed = await stream(server.client.port, prompt, 24)
        check(whole.ended == "done" and whole.text == streamed.text and streamed.tokens == 24,
              "a stream says what a whole reply says")
        for clients in given.clients:
            await throughput(server.client.port, clients, given.rounds, given.prompt_tokens, given.max_tokens)
        if given.long_prompt:
            await beside(server.client.port, given.long_prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--long-prompt", type=int, default=0)
    given, options = parser.parse_known_args()
    asyncio.run(run(given, options))


if __name__ == "__main__":
    main()
