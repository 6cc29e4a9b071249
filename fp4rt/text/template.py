"""A checkpoint's chat template: where it is found, and its rendering in processes of its own.

A chat template is a stranger's program. Jinja's sandbox keeps it from attributes and calls it should not reach, but
bounds neither time nor memory: `10 ** (10 ** 9)`, a list that contains itself twice forty times over, or nested loops
run for ever inside one call that no thread can interrupt, and there is no end to such expressions to forbid. So it
runs in a child process under the operating system's limits, which is kept for the next render (pool.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp4rt.errors import Fp4rtError
from fp4rt.text.pool import Limits, RenderPool
from fp4rt.text.reasoning import Interest

CPU_SECONDS = 5          # for one render; real templates take a millisecond
WALL_SECONDS = 60        # for one render
MEMORY_BYTES = 1 << 30
MAX_TEXT = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
NAMED = "additional_chat_templates"  # a folder of those besides the default one


def find_template(path: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate:
    """chat_template.jinja with NAMED/*.jinja, else what tokenizer_config.json holds: one, or a list of {name, template}.
    """
    file = path / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(str(file), {"default": _read(file)} | {
            other.stem: _read(other) for other in sorted((path / NAMED).glob("*.jinja"))})
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


def _read(file: Path) -> str:
    try:
        if file.stat().st_size > MAX_TEMPLATE_BYTES:
            raise Fp4rtError("checkpoint", f"{file}: more than {MAX_TEMPLATE_BYTES} bytes is too large")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise Fp4rtError("checkpoint", f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Fp4rtError("checkpoint", f"{file}: not UTF-8 text; download it again") from None


class ChatTemplate:
    """The templates of one checkpoint by name, and the file they come from."""

    def __init__(self, file: str, named: dict[str, str]):
        self._file, self._named = file, named
        self._pool = RenderPool(file, named, Limits(CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES, MAX_TEXT))
        self._interests: dict[str, Interest] = {}

    def source(self, tools: bool = False) -> str:
        """The template itself; with tools, "tool_use" where there is one."""
        return self._named[self._name(tools)]

    def _name(self, tools: bool) -> str:
        name = "tool_use" if tools and "tool_use" in self._named else "default"
        return name if self._named.get(name) else next(iter(self._named))

    def render(self, variables: dict[str, Any]) -> str:
        """The text of the template over JSON-like variables (any thread; several render side by side).

        Raises Fp4rtError: "request" where the template refuses the messages, else "checkpoint".
        """
        return self._pool.run({"template": self._name(bool(variables.get("tools"))), "variables": variables})["text"]

    def interest(self, tools: bool = False) -> Interest:
        """What the template looks at. Raises Fp4rtError("checkpoint") where it is broken."""
        name = self._name(tools)
        if name not in self._interests:
            found = self._pool.run({"template": name})
            self._interests[name] = Interest(self._file, frozenset(found["looks_at"]), frozenset(found["strings"]))
        return self._interests[name]

    def close(self) -> None:
        """End the processes that render; it renders no more. Closing twice is fine."""
        self._pool.close()
