"""Structured replies: what a grammar allows is what its schema says, for every family's thoughts and tool calls."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llguidance")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from fp4rt.errors import Fp4rtError  # noqa: E402
from fp4rt.serve.chat import NO_PARAMETERS  # noqa: E402
from fp4rt.serve.grammar import Grammars  # noqa: E402
from fp4rt.text import Text  # noqa: E402
from fp4rt.text.tools import Tool  # noqa: E402
from test_tools import SPECIAL, TEMPLATES  # noqa: E402

SCHEMA = {"type": "object", "required": ["city"], "additionalProperties": False, "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}}}
TOOLS = [Tool("get_weather", SCHEMA), Tool("clock", {}), Tool("now", NO_PARAMETERS)]
VOCAB = 400
END = "<|end_of_text|>"


def make_text(path: Path, specials: list[str], template: str, plain: list[str] = ()) -> Text:
    """A tokenizer of single bytes, `specials` and `plain` added tokens, with a chat template."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(bytes_)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, *specials])
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in plain])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (path / "chat_template.jinja").write_text(template)
    return Text(path, {})


def accepts(grammar, text: Text, reply: str) -> bool:
    """Whether the grammar takes the whole reply, each token allowed by the mask before it, and may end there."""
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in [*text.encode(reply, add_special=False), next(iter(text.stop_ids))]:
        grammar.mask(words)
        if not words[token // 32] >> np.uint32(token % 32) & 1:
            return False
        if token not in text.stop_ids:
            grammar.accept(token)
    return True


@pytest.fixture
def plain(tmp_path: Path) -> Text:
    return make_text(tmp_path, [], "{{ messages[0].content }}")


def test_a_schema_is_followed(plain: Text):
    grammars = Grammars(plain, VOCAB)
    for reply, good in [('{"city": "Köln", "days": 2}', True), ('{"city":"x"}', True), ('{"days": 2}', False),
                        ('{"city": 1}', False), ('{"city": "x", "more": 1}', False), ('{"city": "x"', False)]:
        assert accepts(grammars.of_schema(SCHEMA, None, "response_format"), plain, reply) == good, reply


def test_it_is_finished_when_nothing_can_follow(plain: Text):
    grammar = Grammars(plain, VOCAB).of_schema(SCHEMA, None, "response_format")
    for token in plain.encode('{"city": "x"}', add_special=False):
        assert not grammar.finished
        grammar.accept(token)
    assert grammar.finished


def test_what_the_grammar_forbids_is_an_error_of_this_request(plain: Text):
    grammar = Grammars(plain, VOCAB).of_schema(SCHEMA, None, "response_format")
    with pytest.raises(Fp4rtError) as caught:
        grammar.accept(plain.encode("x", add_special=False)[0])
    assert caught.value.kind == "request" and caught.value.param == "response_format"


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_come_first_and_are_free(tmp_path: Path, special: bool):
    tags = ["<think>", "</think>"]
    text = make_text(tmp_path, tags if special else [], "{{ messages }}<think></think>", [] if special else tags)
    grammars = Grammars(text, VOCAB)

    def grammar(prompt: str):
        return grammars.of_schema(SCHEMA, text.splitter(text.encode(prompt, add_special=False)), "response_format")

    assert accepts(grammar("Q"), text, '<think>\nHm {"a\n</think>\n\n{"city": "x"}')
    assert accepts(grammar("Q"), text, '{"city": "x"}')
    assert not accepts(grammar("Q"), text, 'Hm {"city": "x"}')
    assert accepts(grammar("Q<think>\n"), text, 'Hm, <b>\n</think>\n{"city": "x"}')
    assert not accepts(grammar("Q<think>\n"), text, 'Hm, <b>\n')
    assert not accepts(grammar("Q<think>\n"), text, 'Hm</think>so {"city": "x"}')


def test_harmony_thinks_on_its_own_channel(tmp_path: Path):
    text = make_text(tmp_path, SPECIAL["harmony"], TEMPLATES["harmony"])
    grammars = Grammars(text, VOCAB)
    splitter = text.splitter(text.encode("<|start|>assistant", add_special=False))
    analysis = "<|channel|>analysis<|message|>{Hm<|end|><|start|>assistant"
    for reply, good in [(analysis + '<|channel|>final<|message|>{"city": "x"}', True),
                        ('<|channel|>final <|constrain|>json<|message|>{"city": "x"}', True),
                        (analysis + '<|channel|>final<|message|>city', False), (analysis, False)]:
        assert accepts(grammars.of_schema(SCHEMA, splitter, "response_format"), text, reply) == good


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_forced_call_is_one_that_is_read_again(tmp_path: Path, form: str):
    """A reply that the grammar lets through at every token, whichever is chosen, is a call of a tool by its schema."""
    text = make_text(tmp_path, SPECIAL[form], TEMPLATES[form])
    prompt = text.encode("<|start|>assistant" if form == "harmony" else "", add_special=False)
    format = text.tool_format()
    assert format.form == form
    grammars = Grammars(text, VOCAB)
    rng = np.random.default_rng(5)
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    closers = [i for i in range(text.vocab_size)
               if text.token_bytes(i) in (b'"', b"}", b"]") or len(text.token_bytes(i)) > 1]
    for tools in [TOOLS, TOOLS[-1:]] * 8:
        grammar = grammars.of_tools(tools, format, False, text.splitter(prompt))
        splitter, stream = text.tool_splitter(prompt, tools, format), text.stream()
        said: list[int] = []
        for _ in range(2000):
            grammar.mask(words)
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
            assert allowed.any()
            if grammar.finished:
                break
            ids = np.flatnonzero(allowed)
            closing = np.intersect1d(ids, closers)  # these end strings and thoughts, so that the walk does
            token = int(rng.choice(closing if len(closing) and rng.random() < 0.7 else ids))
            if token in text.stop_ids:
                break
            grammar.accept(token)
            said.append(token)
            splitter.push(token, stream.push(token))
        splitter.finish(stream.finish())
        assert len(splitter.calls) == 1, text.decode(said, skip_special=False)
        call = splitter.calls[0]
        arguments = json.loads(call.arguments)
        assert call.name in ("get_weather", "clock") or call.name == "now" and arguments == {}
        if call.name == "get_weather":
            assert isinstance(arguments["city"], str) and arguments.keys() <= {"city", "days", "exact"}
            assert isinstance(arguments.get("days", 0), int) and isinstance(arguments.get("exact", True), bool)


@pytest.mark.parametrize("schema", [
    {"type": "frog"}, {"type": "string", "pattern": "(a|b"}, {"$ref": "#/nowhere"}, {"allOf": [{"if": True}]},
    {"type": "object", "properties": []}, {"type": "array", "minItems": -1}, {"enum": "x"},
    {"type": "string", "pattern": "x" * 200_000}, {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}])
def test_bad_schemas_are_refused(plain: Text, schema: dict):
    with pytest.raises(Fp4rtError) as caught:
        Grammars(plain, VOCAB).of_schema(schema, None, "response_format")
    assert caught.value.kind == "request" and str(caught.value).startswith("response_format: ")
    assert len(str(caught.value)) < 400


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize("schema", [
    {"type": "string", "pattern": "(a|a?)+" * 30 + "(x+x+)+y"},
    {"type": "string", "pattern": "((a{1000}){1000}){1000}"}, {"type": "string", "pattern": ".*a.{5000}b.{5000}"},
    {"type": "string", "pattern": r"(\p{L}{1,500}\p{N}{1,500}){1,500}"},
    {"type": "array", "items": {"type": "string", "minLength": 10**9}, "minItems": 10**9},
    {"type": "object", "properties": {
        f"p{i}": {"type": "string", "pattern": f"^[a-z]{{1,{i + 1}}}$"} for i in range(1000)}},
    {"anyOf": [{"type": "string", "pattern": f"(a|b){{{i}}}c*"} for i in range(1000)]}, nested(120), nested(3000)])
def test_compiling_and_masks_are_bounded_in_time(plain: Text, schema: dict):
    """Hostile schemas either compile or are refused, and no mask takes long: seconds, on any machine."""
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    started = time.perf_counter()
    try:
        grammar = Grammars(plain, VOCAB).of_schema(schema, None, "response_format")
        for token in plain.encode('"' + "a" * 50, add_special=False):
            grammar.mask(words)
            if words[token // 32] >> np.uint32(token % 32) & 1:
                grammar.accept(token)
    except Fp4rtError as error:
        assert error.kind == "request"
    assert time.perf_counter() - started < 20
