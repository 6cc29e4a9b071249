"""A checkpoint's chat template: where it is found, and its rendering in a process of its own.

A chat template is a stranger's program. Jinja's sandbox keeps it from attributes and calls it should not reach, but
bounds neither time nor memory: `10 ** (10 ** 9)`, a list that contains itself twice forty times over, or nested loops
run for ever inside one call that no thread can interrupt, and there is no end to such expressions to forbid. So it
runs in a child process under the operating system's limits, which costs about 40 ms and leaves nothing behind.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fp4rt.errors import Fp4rtError
from fp4rt.text.reasoning import Interest

CPU_SECONDS = 5          # of the child, its start included; real templates take a few milliseconds
WALL_SECONDS = 60        # for a child that waits: it never should
MEMORY_BYTES = 1 << 30   # address space of the child
MAX_TEXT = 16 << 20      # characters
MAX_TEMPLATE_BYTES = 1 << 20


def find_template(path: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate:
    """chat_template.jinja, else what tokenizer_config.json holds: a template, or a list of {name, template}."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            if file.stat().st_size > MAX_TEMPLATE_BYTES:
                raise Fp4rtError("checkpoint", f"{file}: more than {MAX_TEMPLATE_BYTES} bytes is too large")
            return ChatTemplate(str(file), {"default": file.read_text(encoding="utf-8")})
        except OSError as error:
            raise Fp4rtError("checkpoint", f"{file}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise Fp4rtError("checkpoint", f"{file}: not UTF-8 text; download it again") from None
    file = path / "tokenizer_config.json"
    stated = tokenizer_config.get("chat_template")
    if stated is None:
        raise Fp4rtError("checkpoint", f"{path}: has no chat template (neither chat_template.jinja nor one in "
                                       "tokenizer_config.json); use a plain prompt")
    if isinstance(stated, str):
        stated = [{"name": "default", "template": stated}]
    try:
        named = {entry["name"]: entry["template"] for entry in stated}
        if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
            raise TypeError
    except (TypeError, KeyError):
        raise Fp4rtError("checkpoint", f"{file}: chat_template is neither text nor a list of named ones") from None
    if len(named) > 1 and "default" not in named:
        raise Fp4rtError("checkpoint", f"{file}: chat_template has {', '.join(named)} but no default")
    return ChatTemplate(str(file), named)


class ChatTemplate:
    """The templates of one checkpoint by name, and the file they come from."""

    def __init__(self, file: str, named: dict[str, str]):
        self._file, self._named = file, named
        self._interests: dict[str, Interest] = {}

    def source(self, tools: bool = False) -> str:
        """The template itself; with tools, "tool_use" where there is one."""
        name = "tool_use" if tools and "tool_use" in self._named else "default"
        return self._named.get(name) or next(iter(self._named.values()))

    def render(self, variables: dict[str, Any]) -> str:
        """The text of the template over JSON-like variables.

        Raises Fp4rtError: "request" where the template refuses the messages, else "checkpoint".
        """
        return self._run(self.source(bool(variables.get("tools"))), variables=variables)["text"]

    def interest(self, tools: bool = False) -> Interest:
        """What the template looks at. Raises Fp4rtError("checkpoint") where it is broken."""
        source = self.source(tools)
        if source not in self._interests:
            found = self._run(source)
            self._interests[source] = Interest(self._file, frozenset(found["looks_at"]), frozenset(found["strings"]))
        return self._interests[source]

    def _run(self, template: str, **what: Any) -> dict[str, Any]:
        """What render.py replies to a job on this template."""
        try:
            job = json.dumps({"path": [entry for entry in sys.path if entry], "template": template, **what,
                              "cpu_seconds": CPU_SECONDS, "memory_bytes": MEMORY_BYTES, "max_text": MAX_TEXT})
        except (TypeError, ValueError, RecursionError) as error:
            raise Fp4rtError("request", f"the messages are not plain data ({error})") from None
        try:
            child = subprocess.run([sys.executable, "-I", "-S", str(Path(__file__).with_name("render.py"))],
                                   input=job.encode(), capture_output=True, timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            raise Fp4rtError("checkpoint", f"{self._file}: did not finish within {WALL_SECONDS} s") from None
        except OSError as error:
            raise Fp4rtError("device", f"the chat template needs a process of its own, and {sys.executable!r} does not "
                                       f"start ({error.strerror})") from None
        try:
            reply = json.loads(child.stdout)
        except ValueError:
            raise Fp4rtError("checkpoint", f"{self._file}: {self._cause_of_death(child)}") from None
        if "error" in reply:
            raise Fp4rtError(reply["kind"], f"{self._file}: {reply['error']}")
        return reply

    @staticmethod
    def _cause_of_death(child: subprocess.CompletedProcess[bytes]) -> str:
        if child.returncode == -getattr(signal, "SIGXCPU", 0):
            return f"the chat template takes more than {CPU_SECONDS} s of processor time"
        last = child.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1][:200]
        return f"the chat template could not be rendered (its process ended with {child.returncode}: {last})"
