"""Reasoning: switched on and off as a chat template can be told to, and told apart from the answer as text comes.

How a checkpoint marks its thoughts is read from its tokenizer and chat template: <think> and </think>; <|channel> and
<channel|>, with a label on the first line; or the messages of OpenAI's harmony format, where every one names a channel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fp4rt.errors import Fp4rtError, shown

Kind = Literal["reasoning", "answer"]
Piece = tuple[Kind, str]
Message = dict[str, Any]

SWITCHES = ("enable_thinking", "thinking")        # variables that templates read, true or false
MARKERS = {True: "/think", False: "/no_think"}    # or what they look for in a message
EFFORT = "reasoning_effort"                       # or how much, where it cannot be switched off

PROMPT_TAIL = 64  # tokens at the end of a prompt in which a thought can be opened, letter by letter if need be
MAX_HEADER = 256  # characters between <|start|> and <|message|>: a role, a recipient, a channel


# -- Switching ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interest:
    """What a chat template looks at: variables that it does not set itself, and the strings written in its code."""

    file: str
    variables: frozenset[str]
    strings: frozenset[str]


def switch_thinking(think: bool, interest: Interest, messages: Sequence[Message],
                    arguments: dict[str, Any]) -> tuple[Sequence[Message], dict[str, Any]]:
    """The messages and template arguments that ask this template for thinking, or for none.

    A marker goes into the system message; one in a user's message still has the say that the template gives it.
    Raises Fp4rtError("request") where the template has no such switch, or is told twice.
    """
    if not isinstance(think, bool):
        raise Fp4rtError("request", f"think is {shown(think)}; it must be True, False or None (the template's default)")
    for name in SWITCHES:
        if name in interest.variables:
            if name in arguments:
                raise Fp4rtError("request", f"think and the template argument {name} say the same thing: give one")
            return messages, {**arguments, name: think}
    if any(text.strip() == MARKERS[think] for text in interest.strings):
        return _with_marker(messages, MARKERS[think], MARKERS[not think]), arguments
    if EFFORT in interest.variables:
        if think:
            return messages, arguments
        raise Fp4rtError("request", f"{interest.file}: this model always reasons; how much is set with the template "
                                    f'argument {EFFORT}, for instance "low"')
    raise Fp4rtError("request", f"{interest.file}: the chat template has no switch that turns thinking "
                                f"{'on' if think else 'off'}; leave think unset")


def _with_marker(messages: Sequence[Message], marker: str, opposite: str) -> list[Message]:
    """The conversation with this marker, and not its opposite, in the system message."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": marker}, *messages]
    content = messages[0].get("content") or ""
    if isinstance(content, list):
        parts = [{**part, "text": str(part.get("text", "")).replace(opposite, "")} for part in content]
        content = [*parts, {"type": "text", "text": marker}]
    else:
        content = f"{content.replace(opposite, '')}\n{marker}".lstrip()
    return [{**messages[0], "content": content}, *messages[1:]]


def name_thoughts(message: Message) -> Message:
    """A message with its "reasoning_content" under the name that gpt-oss's template reads, too: "thinking".

    As HF transformers does; but not beside both content and a call, which that template would refuse.
    """
    thought = message.get("reasoning_content")
    if not thought or message.get("content") and message.get("tool_calls"):
        return message
    return {"thinking": thought, **message}


# -- Splitting ------------------------------------------------------------------------------------------------------


class Splitter(Protocol):
    """Tokens of a reply and the text that each adds in, pieces of reasoning and answer out."""

    def push(self, token: int, text: str) -> list[Piece]:
        """What is known of the reply with this token, beyond what was returned before."""

    def finish(self, text: str = "") -> list[Piece]:
        """The reply ends with this text: what was held back."""


@dataclass(frozen=True)
class Tag:
    """A tag as a tokenizer knows it: id is None where it is plain text, which may span tokens."""

    spelling: str
    id: int | None
    special: bool


def make_splitter(added: dict[str, tuple[int, bool]], template: str, prompt: str) -> Splitter | None:
    """The splitter for replies to a prompt that ends so; None where neither tokenizer nor template knows of thoughts.

    added: the tokenizer's added tokens, {spelling: (id, special)}. template: its source. prompt: its last tokens,
    special ones spelled out.
    """
    def tag(spelling: str) -> Tag:
        return Tag(spelling, *added.get(spelling, (None, False)))

    if all(spelling in added for spelling in Harmony.TAGS):
        return Harmony({added[spelling][0]: spelling for spelling in Harmony.TAGS}, prompt)
    for opening, closing, label in (("<|channel>", "<channel|>", "thought\n"), ("<think>", "</think>", "")):
        if closing in added or closing in template:
            return Tagged(tag(opening), tag(closing), label, prompt)
    return None


class _Writer:
    """Sections of text out, without the white space around a thought.

    Of a thought the white space at both ends is layout, and so is that before an answer which follows one. A second
    section of a kind is set off from the first by an empty line. Held back are white space at the end of a thought so
    far, and what could be its label.
    """

    def __init__(self) -> None:
        self._written: set[Kind] = set()
        self._thought = False
        self.begin("answer")

    def begin(self, kind: Kind, label: str = "") -> list[Piece]:
        """End the section and begin another: what the first still had to say. `label`: left out where it begins so."""
        pieces = self.finish() if self._thought else []
        self._kind, self._label, self._fresh, self._held = kind, label, True, ""
        self._thought |= kind == "reasoning"
        return pieces

    def write(self, text: str) -> list[Piece]:
        text = self._held + text
        if self._label:
            if self._label.startswith(text):
                self._held = text
                return []
            text, self._label = text.removeprefix(self._label), ""
        if self._fresh and self._thought:
            text = text.lstrip()
        body = text.rstrip() if self._kind == "reasoning" else text
        self._held = text[len(body):]
        if not body:
            return []
        if self._fresh and self._kind in self._written:
            body = "\n\n" + body
        self._fresh = False
        self._written.add(self._kind)
        return [(self._kind, body)]

    def finish(self) -> list[Piece]:
        cut = self._held if self._label and self._held.rstrip() != self._label.rstrip() else ""
        self._held, self._label = "", ""
        return self.write(cut)


class Tagged:
    """Thoughts between two tags, opened by the prompt or by the model.

    A tag that is a token of its own is recognized by its id alone, any other by its spelling. An opening tag counts
    where the answer has not begun; later only if it is a special token, which no text contains: an answer may well be
    about "<think>". Held back is what could become a tag, and white space that may lie between thoughts.
    """

    def __init__(self, opening: Tag, closing: Tag, label: str, prompt: str):
        self.opening, self.closing, self._label = opening, closing, label
        self._writer = _Writer()
        self._kind: Kind = "answer"
        self._begun = False  # the answer
        self._held = ""
        layout = prompt.rstrip()
        if layout.endswith(opening.spelling):
            self._turn("reasoning")
        elif label and layout.endswith(opening.spelling + label.rstrip()):
            self._turn("reasoning")
            self._writer.write(label)

    @property
    def thinking(self) -> bool:
        """Whether what comes next is reasoning, until the closing tag."""
        return self._kind == "reasoning"

    def push(self, token: int, text: str) -> list[Piece]:
        thinking = self.thinking
        tag = self.closing if thinking else self.opening
        if token != tag.id or not (thinking or tag.special or not self._begun):
            return self._text(text)
        before = self._text(text.removesuffix(tag.spelling))
        return [*before, *self._turn("answer" if thinking else "reasoning")]

    def finish(self, text: str = "") -> list[Piece]:
        pieces = [*self._text(text), *self._writer.write(self._held)]
        self._held = ""
        return [*pieces, *self._writer.finish()]

    def _turn(self, kind: Kind) -> list[Piece]:
        """The other kind begins. What is held now is white space before an opening tag, or the last of a thought."""
        pieces = self._writer.write(self._held) if self._kind == "reasoning" else []
        self._kind, self._begun, self._held = kind, False, ""
        return [*pieces, *self._writer.begin(kind, self._label if kind == "reasoning" else "")]

    def _text(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        text = self._held + text
        while True:
            tag = self.closing if self._kind == "reasoning" else self.opening
            spelling = tag.spelling if tag.id is None else ""
            if self._kind == "reasoning":
                body, found, rest = text.partition(spelling) if spelling else (text, "", "")
                keep = len(body) - (0 if found else overlap(body, spelling))
                pieces += self._writer.write(body[:keep])
                self._held = body[keep:]
            else:
                start = text.lstrip()
                found = not self._begun and bool(spelling) and start.startswith(spelling)
                rest = start[len(spelling):]
                if not found:
                    self._begun |= not (start == "" or spelling.startswith(start))
                    self._held = "" if self._begun else text
                    pieces += self._writer.write(text) if self._begun else []
            if not found:
                return pieces
            self._held = ""
            pieces += self._turn("answer" if self._kind == "reasoning" else "reasoning")
            text = rest


def overlap(text: str, tag: str) -> int:
    """The length of the longest end of the text that could become the tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class Harmony:
    """Messages <|start|>role<|channel|>channel<|message|>text<|end|> (OpenAI, "harmony response format", 2025).

    The channel "analysis" is reasoning. All else is the answer: "final", and "commentary", which is meant to be read
    too (what it holds for a recipient, a tool's arguments, included). Headers are left out. Text outside of any
    message, which the format has no place for, is answer as well. Every tag is a token, so that only headers are held
    back.
    """

    TAGS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")

    def __init__(self, tags: dict[int, str], prompt: str):
        self._tags = tags
        self._writer = _Writer()
        self._place: Literal["outside", "header", "body"] = "outside"
        self._held = ""
        start = prompt.rfind("<|start|>")
        for part in re.split(f"({'|'.join(map(re.escape, self.TAGS))})", prompt[start:]) if start >= 0 else []:
            if part in self.TAGS:
                self._tag(part)
            elif self._place == "header":
                self._held = part
        if "<|channel|>" not in prompt[start:] and self._place == "header":  # only the role is written yet
            self._place, self._held = "outside", ""

    def push(self, token: int, text: str) -> list[Piece]:
        tag = self._tags.get(token)
        return self._text(text) if tag is None else [*self._text(text.removesuffix(tag)), *self._tag(tag)]

    def finish(self, text: str = "") -> list[Piece]:
        pieces = [*self._text(text), *(self._answer() if self._place == "outside" and self._held.strip() else [])]
        return [*pieces, *self._writer.finish()]

    def _text(self, text: str) -> list[Piece]:
        if self._place == "body":
            return self._writer.write(text)
        self._held += text
        start = self._held.lstrip()
        header = len(self._held) <= MAX_HEADER and (self._place == "header" or start[:3] == "to="[:len(start)])
        return [] if header else self._answer()

    def _answer(self) -> list[Piece]:
        """What was held back is no header."""
        text, self._held, self._place = self._held, "", "body"
        return [*self._writer.begin("answer"), *self._writer.write(text)]

    def _tag(self, tag: str) -> list[Piece]:
        header, self._held = self._held, ""
        self._place = {"<|message|>": "body", "<|end|>": "outside"}.get(tag, "header")
        if tag != "<|message|>":
            return []
        return self._writer.begin("reasoning" if header.split()[:1] == ["analysis"] else "answer")
