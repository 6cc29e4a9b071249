"""Tool calls: how a checkpoint writes them, told apart from the rest of a reply as text comes, and as a grammar.

Which form a checkpoint uses is read from its tokenizer and chat template, like its reasoning tags (reasoning.py):

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>                      Qwen2.5, Qwen3, Hermes
    xml       <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function>...   Qwen3-Coder, Nemotron 3
    toolcall  <TOOLCALL>[{"name": ..., "arguments": {...}}, ...]</TOOLCALL>                 Nemotron Nano 2
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]NAME[ARGS]{...}
    gemma     <|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>,KEY:1}<tool_call|>                   Gemma 4
    llama     {"name": ..., "parameters": {...}} as the whole reply, <|python_tag|> before  Llama 3.x
    harmony   <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}     gpt-oss
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fp4rt.text.reasoning import Harmony, Piece, Splitter, overlap

FORMS = {  # form -> the tags around calls; None: to the end of the reply
    "hermes": ("<tool_call>", "</tool_call>"), "xml": ("<tool_call>", "</tool_call>"),
    "toolcall": ("<TOOLCALL>", "</TOOLCALL>"), "mistral": ("[TOOL_CALLS]", None),
    "gemma": ("<|tool_call>", "<tool_call|>"), "llama": ("<|python_tag|>", None)}
QUOTE = '<|"|>'                                   # Gemma's quotation mark
INNER = ("[ARGS]", "[CALL_ID]", QUOTE)            # special tokens that a call's text is made of
MAX_NESTING = 64                                  # of Gemma's objects and arrays


@dataclass(frozen=True)
class ToolCall:
    """One call: the function's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Tool:
    """A function that the model may call: its name and the JSON schema of its arguments."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ToolFormat:
    """How a checkpoint writes calls. added: the tokenizer's added tokens, {spelling: (id, special)}."""

    form: str
    added: dict[str, tuple[int, bool]]
    named_arguments: bool = False  # Mistral's newer form, NAME[ARGS]{...}

    def splitter(self, tools: Sequence[Tool], inner: Splitter | None, prompt: str) -> ToolSplitter:
        """What takes the calls out of a reply. inner: tells the reasoning apart; prompt: its end, spelled out."""
        if self.form == "harmony":
            tags = {self.added[spelling][0]: spelling for spelling in Harmony.TAGS}
            return HarmonyTools(tags, self.added.get("<|constrain|>", (None, False))[0], prompt)
        return TaggedTools(self, tools, inner)


def find_format(added: dict[str, tuple[int, bool]], template: str) -> ToolFormat | None:
    """The form in which a checkpoint with this tokenizer and chat template calls tools; None where it has none."""
    if all(tag in added for tag in (*Harmony.TAGS, "<|call|>")):
        return ToolFormat("harmony", added)
    if "tools" not in template:
        return None
    for form, sign in (("gemma", "<|tool_call>"), ("toolcall", "<TOOLCALL>"), ("xml", "<function="),
                       ("hermes", "<tool_call>"), ("mistral", "[TOOL_CALLS]"), ("llama", '"parameters"'),
                       ("llama", "<|python_tag|>")):
        if sign in template:
            return ToolFormat(form, added, "[ARGS]" in added or "[ARGS]" in template)
    return None


# -- Splitting ------------------------------------------------------------------------------------------------------


class ToolSplitter(Splitter):
    """A Splitter whose pieces leave the calls out; they are found in `calls`, each as soon as it is whole."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []


class TaggedTools(ToolSplitter):
    """Calls between an opening and a closing tag, or from an opening tag to the end.

    Held back is what could become a tag, and a call until it is whole. What turns out to be none is answer.
    """

    def __init__(self, format: ToolFormat, tools: Sequence[Tool], inner: Splitter | None):
        super().__init__()
        self._opening, self._closing = FORMS[format.form]
        self._bare = format.form == "llama"  # a reply that begins with { is a call as well
        self._tools = {tool.name: tool for tool in tools}
        self._read = READERS[format.form]
        spelled = (*FORMS[format.form], *INNER)
        self._spellings = {i: spelling for spelling, (i, _) in format.added.items() if spelling in spelled}
        self._inner = inner
        self._held, self._inside, self._begun = "", False, False

    def push(self, token: int, text: str) -> list[Piece]:
        spelling = self._spellings.get(token, "")
        if not text.endswith(spelling):  # a special token adds nothing to the text by itself
            text += spelling
        return self._take(self._inner.push(token, text) if self._inner else [("answer", text)])

    def finish(self, text: str = "") -> list[Piece]:
        pieces = self._take(self._inner.finish(text) if self._inner else [("answer", text)])
        held, self._held = self._held, ""
        rest = self._close(held, "") if self._inside else "" if self.calls and not held.strip() else held
        return [*pieces, ("answer", rest)] if rest else pieces

    def _take(self, pieces: list[Piece]) -> list[Piece]:
        taken = [(kind, self._answer(text) if kind == "answer" else text) for kind, text in pieces]
        return [(kind, text) for kind, text in taken if text]

    def _answer(self, text: str) -> str:
        """What of the answer with this text added is known to be no call, beyond what was returned before."""
        said = ""
        searched = len(self._held)
        text = self._held + text
        while True:
            if self._inside:
                start = max(0, searched - len(self._closing)) if self._closing else 0
                end = text.find(self._closing, start) if self._closing else text.find(self._opening)
                if end < 0:
                    self._held = text
                    return said
                said += self._close(text[:end], self._closing or "")
                text, searched = text[end + len(self._closing or ""):], 0
                self._inside = False
            if self._bare and not self._begun and text.lstrip().startswith("{"):
                self._inside, self._begun = True, True
                continue
            before, found, rest = text.partition(self._opening)
            keep = len(before) - (0 if found else overlap(before, self._opening))
            layout = not before[:keep].strip() and (not self._begun or bool(self.calls))  # white space around calls
            if not layout:
                said += before[:keep]
                self._begun = True
            if not found:
                self._held = before if layout else before[keep:]
                return said
            self._held, self._inside, self._begun, text, searched = "", True, True, rest, 0

    def _close(self, body: str, closing: str) -> str:
        """The calls in a body go to `calls`; a body without any comes back as text."""
        self._inside = False
        try:
            calls = self._read(body, self._tools)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            calls = []
        self.calls += calls
        if calls:
            return ""
        return body if self._bare and body.lstrip().startswith("{") else self._opening + body + closing


class HarmonyTools(Harmony, ToolSplitter):
    """Calls are the messages to a recipient "functions.NAME" on any channel."""

    def __init__(self, tags: dict[int, str], constrain: int | None, prompt: str):
        ToolSplitter.__init__(self)
        self._constrain = constrain
        self._recipient: str | None = None  # of the header that is being read
        self._name: str | None = None       # of the call that is being read
        self._arguments = ""
        Harmony.__init__(self, tags, prompt)

    def push(self, token: int, text: str) -> list[Piece]:
        return super().push(token, text + " " if token == self._constrain else text)  # it ends a recipient's name

    def finish(self, text: str = "") -> list[Piece]:
        pieces = super().finish(text)
        self._end_call()
        return pieces

    def _text(self, text: str) -> list[Piece]:
        if self._name is None:
            return super()._text(text)
        self._arguments += text
        return []

    def _tag(self, tag: str) -> list[Piece]:
        self._end_call()
        recipient = re.search(r"to=functions\.([\w.-]+)", self._held)
        pieces = super()._tag(tag)
        if tag in ("<|start|>", "<|end|>"):
            self._recipient = None
        elif recipient:
            self._recipient = recipient[1]
        if tag == "<|message|>":
            self._name, self._recipient = self._recipient, None
        return pieces

    def _end_call(self) -> None:
        if self._name is not None:
            self.calls.append(ToolCall(self._name, self._arguments.strip() or "{}"))
        self._name, self._arguments = None, ""


# -- Reading --------------------------------------------------------------------------------------------------------


def _made(name: str, arguments: dict[str, Any]) -> ToolCall:
    """A call. Raises ValueError for what JSON (RFC 8259) or UTF-8 cannot say, though Python's reader takes it: NaN,
    numbers beyond a double's, half of a surrogate pair."""
    call = ToolCall(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    f"{call.name}{call.arguments}".encode()
    return call


def _call(entry: dict[str, Any]) -> ToolCall:
    """{"name", "arguments" or "parameters"}, the arguments as an object or as its text."""
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(entry["name"], str) or not isinstance(arguments, dict):
        raise ValueError("a call needs a name and an object of arguments")
    return _made(entry["name"], arguments)


def read_json(body: str, _: dict[str, Tool]) -> list[ToolCall]:
    """A call or a list of them."""
    found = json.loads(body)
    return [_call(entry) for entry in (found if isinstance(found, list) else [found])]


def read_llama(body: str, tools: dict[str, Tool]) -> list[ToolCall]:
    """Calls of known functions, one after another, with ; or white space between them."""
    calls, rest, decoder = [], body.strip(), json.JSONDecoder()
    while rest:
        entry, end = decoder.raw_decode(rest)
        calls.append(_call(entry))
        rest = rest[end:].lstrip("; \n\t,")
    if any(call.name not in tools for call in calls):
        raise ValueError("no call of a known function")
    return calls


def read_mistral(body: str, tools: dict[str, Tool]) -> list[ToolCall]:
    """A list of calls, or NAME[CALL_ID]ID[ARGS]{...} with the id and [ARGS] left out by some versions."""
    if body.lstrip().startswith("["):
        return read_json(body, tools)
    match = re.fullmatch(r"([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\]\s*)?(\{.*\})", body.strip(), re.DOTALL)
    if match is None:
        raise ValueError("no call")
    return [_call({"name": match[1], "arguments": match[2]})]


def read_xml(body: str, tools: dict[str, Tool]) -> list[ToolCall]:
    """<function=NAME> with its <parameter=KEY>s: text, unless the function's schema says that it is something else."""
    if body.lstrip().startswith(("{", "[")):
        return read_json(body, tools)
    calls = []
    for name, inside in re.findall(r"<function=([^<>\s]+)>(.*?)(?:</function>|$)", body, re.DOTALL):
        properties = tools[name].parameters.get("properties", {}) if name in tools else {}
        values = {}
        for key, text in re.findall(r"<parameter=([^<>]+)>(.*?)(?:</parameter>|(?=<parameter=)|$)", inside, re.DOTALL):
            text = text.removeprefix("\n").removesuffix("\n")
            values[key] = text if takes_text(properties.get(key, {})) else _value(text)
        calls.append(_made(name, values))
    return calls


def takes_text(schema: Any) -> bool:
    """Whether a parameter with this schema is written as it is, not as JSON."""
    if not isinstance(schema, dict):
        return True
    kind = schema.get("type")
    if kind is None:
        return not any(key in schema for key in ("anyOf", "oneOf", "allOf", "$ref", "enum", "const", "properties"))
    return "string" in kind if isinstance(kind, list) else kind == "string"


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
        _made("", {"": value})
        return value
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def read_gemma(body: str, _: dict[str, Tool]) -> list[ToolCall]:
    """call:NAME{...}, with keys bare and strings between <|"|>."""
    match = re.fullmatch(r"\s*call:([\w.-]+)\s*(\{.*\})\s*", body, re.DOTALL)
    if match is None:
        raise ValueError("no call")
    values, end = _gemma_value(match[2], 0, 0)
    if end != len(match[2]):
        raise ValueError("text after the arguments")
    return [_made(match[1], values)]


def _gemma_value(text: str, at: int, depth: int) -> tuple[Any, int]:
    """The value at a position, and where it ends."""
    if depth > MAX_NESTING:
        raise ValueError("nested too deeply")
    at = _skip(text, at)
    if text.startswith(QUOTE, at):
        end = text.index(QUOTE, at + len(QUOTE))
        return text[at + len(QUOTE):end], end + len(QUOTE)
    if text[at] in "{[":
        is_object, closing = text[at] == "{", "}" if text[at] == "{" else "]"
        values: Any = {} if is_object else []
        at = _skip(text, at + 1)
        while text[at] != closing:
            key = ""
            if is_object:
                if text.startswith(QUOTE, at):
                    key, at = _gemma_value(text, at, depth + 1)
                    at = text.index(":", at) + 1
                else:
                    end = text.index(":", at)
                    key, at = text[at:end].strip(), end + 1
            value, at = _gemma_value(text, at, depth + 1)
            if is_object:
                values[key] = value
            else:
                values.append(value)
            at = _skip(text, at)
            if text[at] == ",":
                at = _skip(text, at + 1)
            elif text[at] != closing:
                raise ValueError("neither , nor the end")
        return values, at + 1
    end = re.compile(r"[,}\]]").search(text, at)
    if end is None:
        raise ValueError("no end")
    return json.loads(text[at:end.start()].strip()), end.start()


def _skip(text: str, at: int) -> int:
    while text[at:at + 1].isspace():
        at += 1
    if at >= len(text):
        raise ValueError("ends too early")
    return at


READERS: dict[str, Callable[[str, dict[str, Tool]], list[ToolCall]]] = {
    "hermes": read_xml, "xml": read_xml, "toolcall": read_json, "mistral": read_mistral, "gemma": read_gemma,
    "llama": read_llama}
