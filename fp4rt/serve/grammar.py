"""What a reply may look like: JSON schemas and forced tool calls as grammars, and the tokens these allow next.

llguidance (Moskal et al., "LLGuidance: making structured outputs go brrr", 2025) computes the masks. A model that
reasons does so first: the thought is part of the grammar, between its tags, and free.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fp4rt.errors import Fp4rtError
from fp4rt.text import Splitter, Text, Tool, ToolFormat
from fp4rt.text.reasoning import Harmony, Tag, Tagged
from fp4rt.text.tools import FORMS, QUOTE, takes_text

MAX_GRAMMAR = 1 << 17  # characters of a grammar, schemas included
CACHED = 64            # compiled grammars that are kept
WHITE_SPACE = r"[ \t]{1,8}|\r?\n[ \t]{0,64}"  # between JSON's tokens: a bound, or a lost model writes nothing else

Added = dict[str, tuple[int, bool]]  # added tokens: {spelling: (id, special)}

GEMMA_TEXT = "/([^<]|<[^|])*/"
GEMMA_NUMBER = r"/-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?/"
# Fuel bounds the time of compiling (about 50,000 per millisecond) and of a mask (14,000 per millisecond).
LIMITS = dict(initial_lexer_fuel=5_000_000, step_lexer_fuel=400_000, step_max_items=50_000, max_grammar_size=500_000)


class Grammar:
    """One reply's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, name: str):
        self._matcher, self._name = matcher, name
        self._words = np.zeros(-(-vocab_size // 32), np.uint32)

    def mask(self, words: np.ndarray) -> None:
        """Set bit i % 32 of words[i // 32], uint32 [ceil(V / 32)], for every id that may come next; clear the rest."""
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        words[:] = self._words[:len(words)]

    def accept(self, token: int) -> None:
        """The next id is this one. Raises Fp4rtError where the grammar does not allow it."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """Nothing may follow but the end."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise failure(self._name, self._matcher.get_error())


def failure(name: str, reason: str) -> Fp4rtError:
    """What is wrong with a grammar that came from the field `name`, in one line."""
    said = re.sub(r"^at \d+\(\d+\): ", "", reason.split("<state>")[0])  # a place in our grammar, not in theirs
    lines = [line.strip() for line in said.splitlines() if line.strip() and not re.match(r" *\d+ \|| *\^", line)]
    return Fp4rtError("request", f"{name}: {' '.join(lines)[:300] or 'is too complex'}", name)


class Grammars:
    """Compiles grammars for one tokenizer. Called from several threads."""

    def __init__(self, text: Text, vocab_size: int):
        self._text = text
        self._vocab_size = max(vocab_size, text.vocab_size)
        self._tokenizer: LLTokenizer | None = None
        self._added: Added = {}
        self._lock = threading.Lock()
        self._compiled = lru_cache(CACHED)(self._compile)

    def of_schema(self, schema: dict[str, Any], splitter: Splitter | None, name: str) -> Grammar:
        """JSON by a schema, after what the splitter says of reasoning. `name`: the request's field, for errors."""
        def write() -> str:
            return f"start: {self._thought(splitter)} {self._final(splitter)} body\nbody: {_json(schema)}\n"

        return self._make(write, splitter, name)

    def of_tools(self, tools: Sequence[Tool], format: ToolFormat, several: bool, splitter: Splitter | None) -> Grammar:
        """One call of one of the tools, or `several`, in the checkpoint's form."""
        def write() -> str:
            return Calls(format, self.added).write(tools, self._thought(splitter), several)

        return self._make(write, splitter, "tools")

    def _make(self, write: Callable[[], str], splitter: Splitter | None, name: str) -> Grammar:
        try:
            lark = write() + _THOUGHT_RULES
        except RecursionError:
            raise failure(name, "its schema is nested too deeply") from None
        if isinstance(splitter, Tagged) and not self._is_token(splitter.closing):
            lark += f"thought[suffix={json.dumps(splitter.closing.spelling)}]: /(?s:.*)/\n"
        if len(lark) > MAX_GRAMMAR:
            raise failure(name, f"its schema is {len(lark)} characters long; at most {MAX_GRAMMAR} are taken")
        return Grammar(self._compiled(lark, name).deep_copy(), self._vocab_size, name)

    @property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it, which takes a second; so only once it is needed."""
        with self._lock:
            if self._tokenizer is None:
                file = str(self._text.path / "tokenizer.json")
                self._tokenizer = LLTokenizer(file, n_vocab=self._vocab_size, eos_token=sorted(self._text.stop_ids))
                self._added = {spelling: (i, self._tokenizer.is_special_token(i))
                               for spelling, (i, _) in self._text.added.items()}
            return self._tokenizer

    @property
    def added(self) -> Added:
        """The tokenizer's added tokens; special here are those that no text in a grammar matches."""
        self.tokenizer
        return self._added

    def _compile(self, lark: str, name: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, lark, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            first = matcher.deep_copy()
            first.compute_bitmask()  # a schema that refers to nothing but itself compiles, and allows nothing
            if not first.is_error():
                return matcher
            matcher = first
        reason = matcher.get_error()
        raise failure(name, "nothing can satisfy it" if reason.startswith("NoExtension") else reason)

    def _thought(self, splitter: Splitter | None) -> str:
        """What may come before the answer, as a part of a rule's right side."""
        if isinstance(splitter, Harmony):
            start, channel, message, end = (mark(self.added, tag) for tag in Harmony.TAGS)
            return f'({channel} "analysis" {message} TEXT {end} {start} "assistant")*'
        if isinstance(splitter, Tagged):
            opening, closing = (mark(self.added, tag.spelling) for tag in (splitter.opening, splitter.closing))
            closed = f"TEXT {closing}" if self._is_token(splitter.closing) else "thought"
            return f"{closed} WS?" if splitter.thinking else f"({opening} {closed} WS?)?"
        return ""

    def _final(self, splitter: Splitter | None) -> str:
        """What opens the answer itself."""
        if not isinstance(splitter, Harmony):
            return ""
        _, channel, message, _ = (mark(self.added, tag) for tag in Harmony.TAGS)
        return f'{channel} "final" (" " {mark(self.added, "<|constrain|>")} "json")? {message}'

    def _is_token(self, tag: Tag) -> bool:
        """Whether no text can spell the tag, so that it ends any text before it."""
        return self.added.get(tag.spelling, (0, False))[1]


_THOUGHT_RULES = "TEXT: /(?s:.*)/\nWS: /[ \\n]{1,8}/\n"


def mark(added: Added, spelling: str) -> str:
    """A tag in a grammar: by its id where it is a special token, else by its spelling."""
    i, special = added.get(spelling, (0, False))
    return f"<[{i}]>" if special else json.dumps(spelling)


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


# -- Tool calls -----------------------------------------------------------------------------------------------------


class Calls:
    """The grammar of calls in one checkpoint's form (fp4rt/text/tools.py)."""

    def __init__(self, format: ToolFormat, added: Added):
        self._format, self._added, self._rules = format, added, []

    def write(self, tools: Sequence[Tool], thought: str, several: bool) -> str:
        """All rules, `start` first. Each function's arguments follow its own schema."""
        form, added = self._format.form, self._added
        names = [self._call(form, tool) for tool in tools]
        if form == "harmony":
            body = "call"
        else:
            opening, closing = (tag and mark(added, tag) for tag in FORMS[form])
            if form == "toolcall" or form == "mistral" and not self._format.named_arguments:
                body = f'{opening} "[" call {"(" + json.dumps(", ") + " call)*" if several else ""} "]" {closing or ""}'
            else:
                between = {"llama": '"; "', "hermes": '"\\n"', "xml": '"\\n"'}.get(form, "")
                body = f"call ({between} call)*" if several else "call"
        return "\n".join([f"start: {thought} {body}", f"call: {' | '.join(names)}", *self._rules, ""])

    def _rule(self, right: str) -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}: {right}")
        return name

    def _call(self, form: str, tool: Tool) -> str:
        """The name of the rule for one call."""
        schema = {"type": "object", **tool.parameters}
        quoted = json.dumps(tool.name)

        def tag(spelling: str) -> str:
            return mark(self._added, spelling)

        if form == "harmony":
            return self._rule(f'{tag("<|channel|>")} "commentary to=functions." {quoted} (" " {tag("<|constrain|>")} '
                              f'"json")? {tag("<|message|>")} {self._rule(_json(schema))}')
        opening, closing = (spelling and tag(spelling) for spelling in FORMS[form])
        if form == "xml":
            return self._rule(f'{opening} "\\n<function=" {quoted} ">\\n" {self._xml(schema)} '
                              f'"</function>\\n" {closing}')
        if form == "gemma":
            return self._rule(f'{opening} "call:" {quoted} {self._gemma(schema)} {closing}')
        arguments = self._rule(_json(schema))
        if form == "mistral" and self._format.named_arguments:
            return self._rule(f'{opening} {quoted} {tag("[ARGS]")} {arguments}')
        key = "parameters" if form == "llama" else "arguments"
        call = json.dumps(f'{{"name": {quoted}, "{key}": ') + f' {arguments} "}}"'
        return self._rule(f'{opening} "\\n" {call} "\\n" {closing}' if form == "hermes" else call)

    def _xml(self, schema: dict[str, Any]) -> str:
        parts = []
        for key, value in _properties(schema).items():
            text = self._rule(r"/([^<]|<[^\/])*/" if takes_text(value) else _json(_with_defs(value, schema)))
            part = f'{json.dumps(f"<parameter={key}>" + chr(10))} {text} "\\n</parameter>\\n"'
            parts.append(part if key in _required(schema) else f"({part})?")
        return " ".join(parts)

    def _gemma(self, schema: Any) -> str:
        """Gemma's own notation: keys bare, strings between <|"|>."""
        schema = schema if isinstance(schema, dict) else {}
        quote = mark(self._added, QUOTE)
        enum = schema.get("enum")
        if isinstance(enum, list) and enum and all(isinstance(one, str) for one in enum):
            return self._rule(" | ".join(f"{quote} {json.dumps(one)} {quote}" for one in enum))
        match schema.get("type"):
            case "string":
                return f"({quote} {GEMMA_TEXT} {quote})"
            case "integer":
                return "/-?(0|[1-9][0-9]{0,30})/"
            case "number":
                return GEMMA_NUMBER
            case "boolean":
                return '("true" | "false")'
            case "array":
                item = self._gemma(schema.get("items"))
                return self._rule(f'"[" ({item} ("," {item})*)? "]"')
            case "object" if _properties(schema):
                pairs = {key: f"{json.dumps(key + ':')} {self._gemma(value)}"
                         for key, value in _properties(schema).items()}
                needed = [key for key in pairs if key in _required(schema)]
                if not needed:
                    pair = self._rule(" | ".join(pairs.values()))
                    return self._rule(f'"{{" ({pair} ("," {pair})*)? "}}"')
                first = ' "," '.join(pairs[key] for key in needed)
                rest = " ".join(f'("," {pair})?' for key, pair in pairs.items() if key not in needed)
                return self._rule(f'"{{" {first} {rest} "}}"')
            case "object" if schema.get("additionalProperties") is False:
                return '"{}"'
        if not any(rule.startswith("gemma_any:") for rule in self._rules):
            self._rules += [
                f'gemma_any: {quote} {GEMMA_TEXT} {quote} | {GEMMA_NUMBER} | "true" | "false" | "null" | '
                'gemma_object | "[" (gemma_any ("," gemma_any)*)? "]"',
                'gemma_object: "{" (gemma_pair ("," gemma_pair)*)? "}"',
                'gemma_pair: /[a-zA-Z_][\\w]{0,63}/ ":" gemma_any']
        return "gemma_object" if schema.get("type") == "object" else "gemma_any"


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}


def _required(schema: dict[str, Any]) -> list[Any]:
    found = schema.get("required")
    return found if isinstance(found, list) else []


def _with_defs(schema: Any, root: dict[str, Any]) -> dict[str, Any]:
    """A part of a schema with the definitions that its references may point to."""
    defs = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**defs, **schema} if isinstance(schema, dict) else defs
