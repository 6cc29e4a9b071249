"""Prompts from a file of JSON lines, run together, and their answers to another, line for line."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from fp4rt.async_llm import AsyncLLM
from fp4rt.errors import Fp4rtError, shown
from fp4rt.llm import LLM
from fp4rt.sampling import Sampling

MAX_LINE_BYTES = 64 << 20  # more text than any context holds
AHEAD = 512                # lines that are under way or answered, but not yet written, at most
SAMPLING = frozenset(field.name for field in fields(Sampling))
KEYS = SAMPLING | {"id", "prompt", "messages", "think", "template_arguments"}


@dataclass(frozen=True)
class Defaults:
    """What holds for lines that do not say it themselves: sampling, and for chats the system message and switches.

    chat: a "prompt" is a user's message. A seed is that of the first line; each further one has the next.
    """

    sampling: Sampling
    chat: bool
    system: str | None
    think: bool | None
    arguments: dict[str, Any]


def run(load: Callable[[], LLM], source: str, target: str, defaults: Defaults, show: bool) -> None:
    """Answer every line of `source` ("-": stdin) into `target` ("-": stdout), in order, with the LLM from `load`.

    A line: {"prompt": text or ids} or {"messages": [...]}, with any of `KEYS`. Its answer: {"text", "reasoning",
    "finish_reason", "prompt_tokens", "generated_tokens"}, or {"error"}; an "id" is repeated. Lines that went wrong
    stop no others; at the end they raise Fp4rtError("request"). show: a progress bar on stderr.
    """
    with open_file(source, "rb") as lines:
        if target != "-" and not Path(target).parent.is_dir():
            raise Fp4rtError("request", f"{target}: there is no directory {Path(target).parent}")
        if source != "-" and target != "-" and Path(target).exists() and Path(source).samefile(target):
            raise Fp4rtError("request", f"{target} is the input file; write to another one")
        total = None
        if show and lines.seekable():
            total = sum(1 for line in lines if line.strip())
            lines.seek(0)
        with AsyncLLM(load(), max_queue=2 * AHEAD) as engine, open_file(target, "wb") as out:
            count, failed = asyncio.run(answer_all(engine, lines, out, defaults, total, show))
    if failed:
        raise Fp4rtError("request", f"{failed} of {count} lines went wrong; "
                                    f"each has its \"error\" in {'the output' if target == '-' else target}")


@contextmanager
def open_file(name: str, mode: str) -> Iterator[BinaryIO]:
    """A file, or stdin or stdout for "-". Raises Fp4rtError("request") where it cannot be opened."""
    try:
        file = open(name, mode) if name != "-" else nullcontext((sys.stdin if mode == "rb" else sys.stdout).buffer)
    except OSError as error:
        raise Fp4rtError("request", f"{name}: cannot be opened ({error.strerror})") from None
    with file as opened:
        yield opened


async def answer_all(engine: AsyncLLM, lines: Iterable[bytes], out: BinaryIO, defaults: Defaults, total: int | None,
                     show: bool) -> tuple[int, int]:
    """Keep up to AHEAD lines under way: how many there were, and how many of them went wrong."""
    from tqdm import tqdm

    under_way: deque[asyncio.Task[dict[str, Any]]] = deque()
    count = failed = 0
    with tqdm(total=total, unit="line", leave=False, disable=not show) as bar:
        async def write() -> None:
            nonlocal failed
            answer = await under_way[0]
            under_way.popleft()
            failed += "error" in answer
            out.write(json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n")
            out.flush()
            bar.update()

        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                under_way.append(asyncio.create_task(answer_line(engine, number, line, defaults, count)))
                count += 1
                await asyncio.sleep(0)  # those that are under way may go on
                while under_way and (len(under_way) >= AHEAD or under_way[0].done()):
                    await write()
            while under_way:
                await write()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
    return count, failed


async def answer_line(engine: AsyncLLM, number: int, line: bytes, defaults: Defaults, index: int) -> dict[str, Any]:
    """What is written for one line. Raises Fp4rtError only for what is wrong with more than this line."""
    named: dict[str, Any] = {}
    try:
        asked = parse(line)
        named = {"id": asked["id"]} if "id" in asked else {}
        check(asked)
        ids, splitter = encode(engine.llm, asked, defaults)
        request = engine.submit(ids, sampling_of(asked, defaults, index), splitter=splitter)
        text, reasoning = [], []
        async for delta in request:
            text.append(delta.text)
            reasoning.append(delta.reasoning)
        return {**named, "text": "".join(text), "reasoning": "".join(reasoning), "finish_reason": delta.finish_reason,
                "prompt_tokens": delta.prompt_tokens, "generated_tokens": delta.generated_tokens}
    except Fp4rtError as error:
        if error.kind != "request":
            raise
        return {**named, "error": f"line {number}: {error}"}


def parse(line: bytes) -> dict[str, Any]:
    """A line as an object, or Fp4rtError("request")."""
    if len(line) > MAX_LINE_BYTES:
        raise Fp4rtError("request", f"is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        asked = json.loads(line, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Fp4rtError("request", f"is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Fp4rtError("request", f"is not JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError):  # what only Python writes, or a number or a nesting beyond what it reads
        raise Fp4rtError("request", "is not JSON that can be read: NaN or Infinity, a number too long, or nested too "
                                    "deeply") from None
    if not isinstance(asked, dict):
        raise Fp4rtError("request", f"is {shown(asked)}; it must be an object with a prompt or messages")
    return asked


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check(asked: dict[str, Any]) -> None:
    """Raise Fp4rtError("request") for unknown keys, or for no prompt."""
    if unknown := asked.keys() - KEYS:
        raise Fp4rtError("request", f"unknown key {shown(min(unknown))}; known are {', '.join(sorted(KEYS))}")
    if ("prompt" in asked) == ("messages" in asked):
        raise Fp4rtError("request", "must have either a prompt or messages")


def encode(llm: LLM, asked: dict[str, Any], defaults: Defaults) -> tuple[list[int], Any]:
    """The ids of a line's prompt or messages, and what tells reasoning from the answer to it."""
    think, arguments = asked.get("think"), asked.get("template_arguments", {})
    if think not in (None, True, False) or isinstance(think, int) and not isinstance(think, bool):
        raise Fp4rtError("request", f"think is {shown(think)}; it must be true, false or null")
    if not isinstance(arguments, dict):
        raise Fp4rtError("request", f"template_arguments is {shown(arguments)}; it must be an object")
    messages = asked.get("messages")
    if "prompt" in asked:
        prompt = asked["prompt"]
        if not isinstance(prompt, (str, list)):
            raise Fp4rtError("request", f"prompt is {shown(prompt)}; it must be text or a list of token ids")
        if not defaults.chat:
            if think is not None or arguments:
                raise Fp4rtError("request", "think and template_arguments belong to a chat: give messages, or --chat")
            return llm.encode(prompt), None
        if not isinstance(prompt, str):
            raise Fp4rtError("request", "prompt is a list of token ids; with --chat it must be text")
        messages = [*([{"role": "system", "content": defaults.system}] if defaults.system is not None else []),
                    {"role": "user", "content": prompt}]
    ids = llm.text.encode_chat(messages, think=defaults.think if think is None else think,
                               **{**defaults.arguments, **arguments})
    return ids, llm.text.splitter(ids)


def sampling_of(asked: dict[str, Any], defaults: Defaults, index: int) -> Sampling:
    """The sampling that a line asks for; JSON's null is as if it were not there."""
    given = {key: asked[key] for key in SAMPLING & asked.keys() if asked[key] is not None}
    if isinstance(biases := given.get("logit_bias"), dict):
        given["logit_bias"] = {int(token) if token.isdecimal() else token: bias for token, bias in biases.items()}
    if "seed" not in given and defaults.sampling.seed is not None:
        given["seed"] = (defaults.sampling.seed + index) % 2**64
    return replace(defaults.sampling, **given)

