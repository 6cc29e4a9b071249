"""Tool calls: every family's form is taken out of a reply however it is cut into tokens, and what is no call stays."""

from __future__ import annotations

import json
import random

import pytest

from fp4rt.text.reasoning import make_splitter
from fp4rt.text.tools import Tool, find_format

WEATHER = Tool("get_weather", {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}}})
CLOCK = Tool("clock", {"type": "object", "properties": {}})
PARIS = {"city": "Paris", "days": 3, "exact": True}
QUOTE = '<|"|>'

TEMPLATES = {  # what each family's chat template is recognized by
    "hermes": "{% if tools %}<tool_call>{% endif %}<think></think>",
    "xml": "{% if tools %}<tool_call><function=x>{% endif %}<think></think>",
    "toolcall": "{% if tools %}<TOOLCALL>{% endif %}",
    "mistral": "{% if tools %}[TOOL_CALLS]{% endif %}",
    "gemma": "{% if tools %}<|tool_call>{% endif %}<|channel>thought<channel|>",
    "llama": '{% if tools %}{"name": function name, "parameters": {}}{% endif %}',
    "harmony": "{% if tools %}namespace functions{% endif %}"}
SPECIAL = {
    "hermes": ["<think>", "</think>"], "xml": ["<think>", "</think>"], "toolcall": [],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
    "gemma": ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", QUOTE],
    "llama": ["<|python_tag|>"],
    "harmony": ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>"]}

# form, reply, reasoning, answer, [(name, arguments)]
REPLIES = [
    ("hermes", '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", '
     '"days": 3, "exact": true}}\n</tool_call>', "Hm.", "", [("get_weather", PARIS)]),
    ("hermes", 'I look.\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>\n<tool_call>{"name": "clock", '
     '"arguments": "{}"}</tool_call>', "", "I look.\n", [("clock", {}), ("clock", {})]),
    ("hermes", "no <tool call> here <tool_cal", "", "no <tool call> here <tool_cal", []),
    ("hermes", "<tool_call>{broken}</tool_call> then", "", "<tool_call>{broken}</tool_call> then", []),
    ("hermes", '<tool_call>{"name": "clock", "arguments": {}}', "", "", [("clock", {})]),
    *((form, text, "", text, []) for form, text in [  # what no client could read as JSON is no call
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": -1e999}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": "\\ud83d"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
        ("llama", '{"name": "clock", "parameters": {"a": "\\ud83d"}}'),
        ("gemma", "<|tool_call>call:clock{a:NaN}<tool_call|>")]),
    ("xml", "<think>Hm</think><tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
     "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n</function>\n</tool_call>", "Hm", "",
     [("get_weather", PARIS)]),
    ("xml", "<tool_call><function=get_weather><parameter=city>\n12\n</parameter></function></tool_call>", "", "",
     [("get_weather", {"city": "12"})]),
    ("toolcall", '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3, "exact": true}}, '
     '{"name": "clock", "arguments": {}}]</TOOLCALL>', "", "", [("get_weather", PARIS), ("clock", {})]),
    ("mistral", '[TOOL_CALLS][{"name": "clock", "arguments": {}}]', "", "", [("clock", {})]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abc123DEF[ARGS]{"city": "Paris", "days": 3, "exact": true}'
     "[TOOL_CALLS]clock[ARGS]{}", "", "", [("get_weather", PARIS), ("clock", {})]),
    ("mistral", '[TOOL_CALLS] clock [ARGS] {"a": "{}"} \n', "", "", [("clock", {"a": "{}"})]),
    ("mistral", "[TOOL_CALLS]clock   {} {", "", "[TOOL_CALLS]clock   {} {", []),
    ("xml", "<tool_call><function=<function=clock><parameter=<parameter=a>b</function></tool_call>", "", "",
     [("clock", {"a": "b"})]),
    ("gemma", "<|channel>thought\nHm<channel|><|tool_call>"
     f"call:get_weather{{city:{QUOTE}Paris{QUOTE},days:3,exact:true}}<tool_call|>", "Hm", "", [("get_weather", PARIS)]),
    ("gemma", f"<|tool_call>call:clock{{a:[1,{{b:{QUOTE}x, }}{QUOTE}}},null],{QUOTE}c d{QUOTE}:-1.5}}<tool_call|>", "",
     "", [("clock", {"a": [1, {"b": "x, }"}, None], "c d": -1.5})]),
    ("gemma", "<|tool_call>call:clock{a:[1<tool_call|>", "", "<|tool_call>call:clock{a:[1<tool_call|>", []),
    ("llama", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3, "exact": true}}', "", "",
     [("get_weather", PARIS)]),
    ("llama", '<|python_tag|>{"type": "function", "name": "clock", "parameters": {}}; '
     '{"name": "clock", "parameters": {}}', "", "", [("clock", {}), ("clock", {})]),
    ("llama", '{"name": "Bob", "age": 3}', "", '{"name": "Bob", "age": 3}', []),
    ("llama", 'As JSON: {"name": "clock", "parameters": {}}', "", 'As JSON: {"name": "clock", "parameters": {}}', []),
    ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
     'to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris", "days": 3, "exact": true}', "Hm.", "",
     [("get_weather", PARIS)]),
    ("harmony", " to=functions.clock<|channel|>commentary json<|message|>{}", "", "", [("clock", {})]),
    ("harmony", "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary "
     "to=functions.clock<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>Done.", "",
     "I look.\n\nDone.", [("clock", {})]),
]


def tokens_of(reply: str, added: dict[str, tuple[int, bool]], cut: random.Random):
    """(id, text) as a tokenizer could have it: special tokens whole and without text, the rest cut anywhere."""
    while reply:
        special = next((one for one in added if reply.startswith(one)), None)
        if special:
            yield added[special][0], ""
            reply = reply[len(special):]
            continue
        end = min([reply.find(one) for one in added if one in reply], default=len(reply))
        size = cut.randint(1, min(end, 5))
        yield 1000, reply[:size]
        reply = reply[size:]


@pytest.mark.parametrize("form,reply,reasoning,answer,calls", REPLIES)
def test_calls_are_taken_out(form: str, reply: str, reasoning: str, answer: str, calls: list):
    added = {spelling: (i, True) for i, spelling in enumerate(SPECIAL[form])}
    prompt = "<|start|>assistant" if form == "harmony" else ""
    format = find_format(added, TEMPLATES[form])
    assert format.form == form
    for seed in range(20):
        splitter = format.splitter([WEATHER, CLOCK], make_splitter(added, TEMPLATES[form], prompt), prompt)
        pieces = []
        for token, text in tokens_of(reply, added, random.Random(seed)):
            pieces += splitter.push(token, text)
        pieces += splitter.finish()
        assert "".join(text for kind, text in pieces if kind == "reasoning") == reasoning
        assert "".join(text for kind, text in pieces if kind == "answer") == answer
        assert [(call.name, json.loads(call.arguments)) for call in splitter.calls] == calls


def test_a_call_is_known_when_it_ends():
    format = find_format({}, TEMPLATES["hermes"])
    splitter = format.splitter([CLOCK], None, "")
    assert splitter.push(1, 'Now: <tool_call>{"name": "clock", "arguments": {}}') == [("answer", "Now: ")]
    assert not splitter.calls
    splitter.push(2, "</tool_call>")
    assert [call.name for call in splitter.calls] == ["clock"]


def test_a_template_without_tools_has_no_format():
    assert find_format({}, "{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert find_format({}, "plain {{ tools }}") is None


def taken(form: str, reply: str) -> tuple[str, list]:
    """(answer, calls) of a reply in one piece."""
    format = find_format({}, TEMPLATES[form])
    splitter = format.splitter([WEATHER, CLOCK], None, "")
    pieces = [*splitter.push(1, reply), *splitter.finish()]
    return "".join(text for _, text in pieces), [(call.name, call.arguments) for call in splitter.calls]


ARGUMENTS = {  # a call of "clock" with the argument a
    "hermes": '<tool_call>{{"name": "clock", "arguments": {{"a": {}}}}}</tool_call>',
    "toolcall": '<TOOLCALL>[{{"name": "clock", "arguments": {{"a": {}}}}}]</TOOLCALL>',
    "mistral": '[TOOL_CALLS]clock[ARGS]{{"a": {}}}', "llama": '{{"name": "clock", "parameters": {{"a": {}}}}}',
    "gemma": "<|tool_call>call:clock{{a:{}}}<tool_call|>"}


@pytest.mark.parametrize("form", ARGUMENTS)
@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_cannot_write_makes_no_call(form: str, number: str):
    reply = ARGUMENTS[form].format(number)
    assert taken(form, reply) == (reply, [])


@pytest.mark.parametrize("form", [form for form in ARGUMENTS if form != "gemma"])
def test_half_of_a_surrogate_pair_makes_no_call(form: str):
    broken = ARGUMENTS[form].format('"é \\ud800"')
    assert taken(form, broken) == (broken, [])
    assert taken(form, ARGUMENTS[form].format('"\\ud83d\\ude00"')) == ("", [("clock", '{"a": "😀"}')])
    if form != "mistral":  # a name may be written with escapes, too
        broken = ARGUMENTS[form].format(1).replace("clock", "\\ud800")
        assert taken(form, broken) == (broken, [])


def test_an_xml_parameter_that_is_no_json_is_text():
    reply = "<tool_call><function=get_weather><parameter=days>{}</parameter></function></tool_call>"
    for text in ("NaN", "1e999", "soon", "{", '"\\ud800"'):
        assert taken("xml", reply.format(text)) == ("", [("get_weather", json.dumps({"days": text}))])
