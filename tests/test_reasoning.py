"""Reasoning: switched as each family's template can be, told apart from the answer however the text is cut."""

import json
import os
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import fp4rt
from fp4rt.cli import main
from fp4rt.errors import Fp4rtError
from fp4rt.llm import LLM
from fp4rt.text import Text
from fp4rt.text.reasoning import MAX_HEADER, Harmony, Tag, Tagged

CHECKPOINTS = Path(__file__).parent / "checkpoints"
GEMMA, GPT_OSS, NEMOTRON, LLAMA = (CHECKPOINTS / name for name in (
    "gemma4-moe-bf16", "gpt-oss-mxfp4", "nemotron-h-moe-modelopt-nvfp4", "llama-modelopt-nvfp4"))
ASK = [{"role": "user", "content": "Hi"}]

# Miniatures of the families' templates, each with what is particular about how it switches thinking.
QWEN3 = """{%- set last = messages | selectattr('role', 'equalto', 'user') | list | last %}
{%- set ns = namespace(past=true) %}
{%- for m in messages %}{% if m is sameas last %}{% set ns.past = false %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content is defined and not ns.past %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}{{ m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
GEMMA4 = """{%- macro without_thoughts(text) %}
{%- for part in text.split('<channel|>') %}{{ part.split('<|channel>')[0] }}{% endfor %}{% endmacro %}
{{- bos_token }}
{%- if enable_thinking is defined and enable_thinking %}{{ '<|turn>system\\n<|think|>\\n<turn|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|turn>' + m.role + '\\n' + without_thoughts(m.content) | trim + '<turn|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|turn>model\\n' }}
{%- if not enable_thinking | default(false) %}{{ '<|channel>thought\\n<channel|>' }}{% endif %}{% endif %}"""
NANO_V2 = """{#- enable_thinking is no argument here -#}
{%- set ns = namespace(enable_thinking=true) %}
{%- for m in messages if m.role in ('user', 'system') %}
{%- if '/no_think' in m.content %}{% set ns.enable_thinking = false %}
{%- elif '/think' in m.content %}{% set ns.enable_thinking = true %}{% endif %}{% endfor %}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{{- '<SPECIAL_10>System\\n' + system.replace('/no_think', '').replace('/think', '').strip() + '\\n' }}
{%- for m in messages if m.role != 'system' %}
{{- '<SPECIAL_11>' + m.role | capitalize + '\\n' }}
{{- m.content.replace('/no_think', '').replace('/think', '').strip() + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\\n' }}
{{- '<think>\\n' if ns.enable_thinking else '<think></think>' }}{% endif %}"""
NEMOTRON3 = """{%- set enable_thinking = enable_thinking if enable_thinking is defined else True %}
{{- '<|im_start|>system\\n<|im_end|>\\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m.content | trim + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{{- '<think>\\n' if enable_thinking else '<think></think>' }}{% endif %}"""
HARMONY = """{%- macro system() %}
{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}
{{- '<|start|>system<|message|>Reasoning: ' + reasoning_effort + '<|end|>' }}
{%- endmacro %}{{ system() }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"

# family: (template, special tokens, added tokens that are not special)
FAMILIES = {
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "gemma4": (GEMMA4, ["<bos>", "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>"], []),
    "nano-v2": (NANO_V2, ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>"], []),
    "nemotron3": (NEMOTRON3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"], []),
    "gpt-oss": (HARMONY, [*Harmony.TAGS, "<|return|>", "<|call|>"], []),
    "plain": (PLAIN, ["<s>"], []),
}


def write_text_files(path: Path, template: str, special: list[str], ordinary: list[str]) -> None:
    """One token for each byte and these added ones; this chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(template)
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": special[0]}))


@pytest.fixture
def family(tmp_path):
    def make(name: str) -> Text:
        write_text_files(tmp_path, *FAMILIES[name])
        return Text(tmp_path, {})

    return make


def joined(pieces) -> tuple[str, str]:
    """(reasoning, answer) of pieces, none of which may be empty."""
    assert all(text for _, text in pieces)
    return tuple("".join(text for kind, text in pieces if kind == which) for which in ("reasoning", "answer"))


def split(text: Text, prompt: list[int], reply: str) -> tuple[str, str]:
    """(reasoning, answer) of a reply, token by token."""
    stream, splitter = text.stream(), text.splitter(prompt)
    pieces = [piece for i in text.encode(reply, add_special=False) for piece in splitter.push(i, stream.push(i))]
    return joined([*pieces, *splitter.finish(stream.finish())])


# -- Splitting, by its definition -----------------------------------------------------------------------------------


def by_definition(text: str, opening: str, closing: str, label: str, opened: bool, anywhere: bool) -> tuple[str, str]:
    """(reasoning, answer) of a whole text: thoughts before the answer, or anywhere, without the space around them."""
    thoughts, answers, seen = [], [], opened
    text = opening + text if opened else text
    while text:
        thought = re.match(rf"\s*{re.escape(opening)}(.*?)({re.escape(closing)}|$)", text, re.DOTALL)
        if thought:
            seen = True
            body = thought[1] + ("\n" if thought[1] == label.strip() else "")
            thoughts.append(body.removeprefix(label).strip())
            text = text[thought.end():]
        else:
            until = text.find(opening) if anywhere and opening in text else len(text)
            answers.append(text[:until].lstrip() if seen else text[:until])
            text = text[until:]
    return tuple("\n\n".join(part for part in parts if part) for parts in (thoughts, answers))


TAGS = {"think": ("<think>", "</think>", ""), "channel": ("<|channel>", "<channel|>", "thought\n")}


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("name", TAGS)
def test_tags_spelled_in_text_under_every_cut(name, opened):
    """Every text of up to three parts in every two cuts, and long ones cut at random."""
    opening, closing, label = TAGS[name]
    parts = [opening, closing, opening[:3], closing[:4], label or "x", " \n", "a", ">"]
    random = np.random.default_rng(0)
    cases = [("".join(choice), None) for choice in product(parts, repeat=3)]
    cases += [("".join(random.choice(parts, 12)), random) for _ in range(400)]
    for whole, cutter in cases:
        expected = by_definition(whole, *TAGS[name], opened, False)
        size = len(whole)
        cuts = ([(i, j) for i in range(size) for j in range(i, size, 5)] if cutter is None
                else [np.sort(cutter.integers(0, size, 8)) for _ in range(3)])
        for cut in cuts:
            splitter = Tagged(Tag(opening, None, False), Tag(closing, None, False), label, opening * opened)
            ends = [0, *cut, size]
            pieces = [piece for a, b in zip(ends, ends[1:]) for piece in splitter.push(7, whole[a:b])]
            assert joined([*pieces, *splitter.finish()]) == expected, (whole, cut)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("name", TAGS)
def test_exactly_what_is_settled_comes_out(name, opened):
    """After every character: what all continuations have in common, no more and no less."""
    opening, closing, label = TAGS[name]
    random = np.random.default_rng(1)
    endings = ["", "x", " x", *(tag[n:] + "y" for tag in (opening, closing, label) for n in range(len(tag)))]
    endings += [label[n:] for n in range(len(label))]
    for _ in range(150):
        whole = "".join(random.choice([opening, closing, opening[:3], closing[:4], label or "b", " ", "\n", "a"], 7))
        splitter = Tagged(Tag(opening, None, False), Tag(closing, None, False), label, opening * opened)
        shown = []
        for end, char in enumerate(whole, 1):
            shown += splitter.push(7, char)
            futures = [by_definition(whole[:end] + rest, *TAGS[name], opened, False) for rest in endings]
            settled = tuple(os.path.commonprefix([future[kind] for future in futures]) for kind in (0, 1))
            assert joined(shown) == settled, whole[:end]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", TAGS)
def test_tags_that_are_tokens(name, special):
    """They count by id: the same letters as other tokens are text. A special one opens a thought anywhere."""
    opening, closing, label = TAGS[name]
    random = np.random.default_rng(2)
    parts = ["\0", "\1", opening, closing, label or "x", " \n", "a", "b>"]
    for choice in [*product(parts, repeat=3), *(random.choice(parts, 9) for _ in range(500))]:
        splitter, pieces = Tagged(Tag(opening, 1, special), Tag(closing, 2, special), label, ""), []
        shown, thinking, begun = "", False, False  # the text with "\0" and "\1" for the tags that count
        for part in choice:
            token, spelled = {"\0": (1, opening), "\1": (2, closing)}.get(part, (7, part))
            pieces += splitter.push(token, "" if special and token != 7 else spelled)
            if token == 1 and not thinking and (special or not begun):
                thinking, begun = True, False
                shown += part
            elif token == 2 and thinking:
                thinking = False
                shown += part
            elif token == 7 or not special:
                begun |= not thinking and bool(spelled.strip())
                shown += spelled
        assert joined([*pieces, *splitter.finish()]) == by_definition(shown, "\0", "\1", label, False, special), choice


def test_a_character_cut_before_a_tag_stays_with_its_section():
    splitter = Tagged(Tag("<think>", 1, False), Tag("</think>", 2, False), "", "<think>\n")
    pieces = [*splitter.push(7, "so"), *splitter.push(2, "\ufffd</think>"), *splitter.push(7, "\n\nyes")]
    assert joined(pieces) == ("so\ufffd", "yes")


def harmony(parts, prompt: str = "<|start|>assistant", size: int = 0) -> tuple[str, str]:
    """(reasoning, answer) of tags and texts, these in pieces of `size` characters."""
    splitter, pieces = Harmony(dict(enumerate(Harmony.TAGS)), prompt), []
    for part in parts:
        if part in Harmony.TAGS:
            pieces += splitter.push(Harmony.TAGS.index(part), "")
        else:
            step = size or max(len(part), 1)
            pieces += [piece for i in range(0, len(part), step) for piece in splitter.push(9, part[i:i + step])]
    return joined([*pieces, *splitter.finish()])


@pytest.mark.parametrize("size", range(12))
@pytest.mark.parametrize("reply, prompt, expected", [
    ("<|channel|>analysis<|message|>Hm. \n<|end|><|start|>assistant<|channel|>final<|message|>Yes",
     "<|start|>assistant", ("Hm.", "Yes")),
    ("<|channel|>final<|message|>to= <b>", "<|start|>assistant", ("", "to= <b>")),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
     "<|start|>assistant<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>final<|message|>Yes",
     "<|start|>assistant", ("a\n\nb", "Wait.\n\nYes")),
    (" to=functions.f<|channel|>commentary json<|message|>{}", "<|start|>assistant", ("", "{}")),
    ("<|channel|>analysis<|message|>cut sho", "<|start|>assistant", ("cut sho", "")),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assist", "<|start|>assistant", ("a", "")),
    ("<|channel|>anal", "<|start|>assistant", ("", "")),
    ("no header at all", "<|start|>assistant", ("", "no header at all")),
    ("toy", "<|start|>assistant", ("", "toy")), ("to", "<|start|>assistant", ("", "to")),
    ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "<|start|>assistant", ("a", "b")),
    ("<|message|>b", "<|start|>assistant<|channel|>final", ("", "b")),
    ("c<|end|><|start|>assistant<|channel|>final<|message|>b", "<|start|>assistant<|channel|>analysis<|message|>",
     ("c", "b")),
    ("c", "<|start|>assistant<|channel|>final<|message|>", ("", "c")),
    ("<|start|>assistant<|channel|>final<|message|>b", "<|start|>user<|message|>analysis<|end|>", ("", "b")),
    ("<|channel|>" + "x" * (MAX_HEADER + 1), "<|start|>assistant", ("", "x" * (MAX_HEADER + 1))),
])
def test_harmony_messages(reply, prompt, expected, size):
    parts = [part for part in re.split(r"(<\|\w+\|>)", reply) if part]
    assert harmony(parts, prompt, size) == expected


# -- Templates and tokenizers of the families ------------------------------------------------------------------------


@pytest.mark.parametrize("name, think, ending", [
    ("qwen3", None, "<|im_start|>assistant\n"), ("qwen3", True, "<|im_start|>assistant\n"),
    ("qwen3", False, "assistant\n<think>\n\n</think>\n\n"),
    ("gemma4", None, "<|turn>model\n<|channel>thought\n<channel|>"), ("gemma4", True, "<|turn>model\n"),
    ("gemma4", False, "<|turn>model\n<|channel>thought\n<channel|>"),
    ("nano-v2", None, "Assistant\n<think>\n"), ("nano-v2", True, "Assistant\n<think>\n"),
    ("nano-v2", False, "Assistant\n<think></think>"),
    ("nemotron3", None, "assistant\n<think>\n"), ("nemotron3", True, "assistant\n<think>\n"),
    ("nemotron3", False, "assistant\n<think></think>"),
    ("gpt-oss", None, "<|start|>assistant"), ("gpt-oss", True, "<|start|>assistant"),
])
def test_each_family_is_switched(family, name, think, ending):
    prompt = family(name).render_chat(ASK, think=think)
    assert prompt.endswith(ending)
    assert "no_think" not in prompt and ("<|think|>" in prompt) == (name == "gemma4" and think is True)


@pytest.mark.parametrize("system, think, ending", [
    ("Be kind.", False, "<think></think>"), ("Be kind. /think", False, "<think></think>"),
    ("Be kind. /no_think", True, "<think>\n"), ("", False, "<think></think>"),
])
def test_a_marker_joins_the_system_message(family, system, think, ending):
    messages = [{"role": "system", "content": system}, *ASK]
    prompt = family("nano-v2").render_chat(messages, think=think)
    assert prompt.startswith(f"<SPECIAL_10>System\n{system.split('/')[0].strip()}\n") and prompt.endswith(ending)
    assert messages[0]["content"] == system


def test_a_marker_joins_a_system_message_of_parts(family):
    text = family("nano-v2")
    (text.path / "chat_template.jinja").write_text("{{ messages[0].content | tojson }}{{ '/no_think' in '' }}")
    messages = [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, *ASK]
    assert '{"type": "text", "text": "/no_think"}' in text.render_chat(messages, think=False)


@pytest.mark.parametrize("content, calls, seen", [
    ("", [{}], "Well|Well"), (None, [{}], "Well|Well"), ("Yes.", None, "Well|Well"), ("Let me look.", [{}], "|Well")])
def test_thoughts_have_the_name_that_harmony_reads_unless_it_would_refuse_them(family, content, calls, seen):
    """gpt-oss takes either content or thoughts beside a call."""
    text = family("plain")
    (text.path / "chat_template.jinja").write_text("{{ messages[1].thinking }}|{{ messages[1].reasoning_content }}")
    reply = {"role": "assistant", "content": content, "reasoning_content": "Well", "tool_calls": calls}
    assert text.render_chat([*ASK, reply]) == seen and "thinking" not in reply


@pytest.mark.parametrize("name, think, arguments, words", [
    ("gpt-oss", False, {}, "always reasons.*reasoning_effort"), ("plain", True, {}, "no switch that turns thinking on"),
    ("plain", False, {}, "no switch that turns thinking off"), ("qwen3", "no", {}, "think is 'no'"),
    ("qwen3", False, {"enable_thinking": True}, "give one"), ("qwen3", None, {"bos_token": "x"}, "bos_token: set by"),
])
def test_what_cannot_be_switched_is_said(family, name, think, arguments, words):
    with pytest.raises(Fp4rtError, match=words) as caught:
        family(name).render_chat(ASK, think=think, **arguments)
    assert caught.value.kind == "request" and "\n" not in str(caught.value)


def test_effort_reaches_the_template(family):
    assert "Reasoning: high" in family("gpt-oss").render_chat(ASK, reasoning_effort="high")


@pytest.mark.parametrize("source", [
    "{% if not enable_thinking is defined %}{% set enable_thinking = true %}{% endif %}{{ enable_thinking }}",
    "{% macro f(x=enable_thinking) %}{{ x }}{% endmacro %}{{ f() }}", "{{ enable_thinking | default('unset') }}",
    "{% set thinking = enable_thinking %}{{ thinking }}", "{% if thinking is defined %}{{ thinking }}{% endif %}",
])
def test_a_variable_is_found_however_it_is_used(family, source):
    text = family("plain")
    (text.path / "chat_template.jinja").write_text(source)
    assert text.render_chat(ASK, think=False) == "False"


@pytest.mark.parametrize("source", [
    "enable_thinking {# enable_thinking #}", "{{ 'enable_thinking' }}", "{{ messages[0].enable_thinking }}",
    "{% set enable_thinking = true %}{{ enable_thinking }}", "{{ dict(enable_thinking=true) }}", "Say /no_think.",
])
def test_a_name_that_is_no_variable_is_not_a_switch(family, source):
    text = family("plain")
    (text.path / "chat_template.jinja").write_text(source)
    with pytest.raises(Fp4rtError, match="no switch"):
        text.render_chat(ASK, think=False)


def test_a_hostile_template_is_examined_under_limits(family, monkeypatch):
    text = family("plain")
    monkeypatch.setattr("fp4rt.text.template.CPU_SECONDS", 1)
    monkeypatch.setattr("fp4rt.text.template.MEMORY_BYTES", 256 << 20)
    (text.path / "chat_template.jinja").write_text("{{ 10 ** (10 ** 9) }}{{ enable_thinking }}")
    with pytest.raises(Fp4rtError, match="processor time|memory"):
        text.render_chat(ASK, think=False)


@pytest.mark.parametrize("name, think, reply, expected", [
    ("qwen3", None, "<think>\nWell…\n</think>\n\nYes", ("Well…", "Yes")), ("qwen3", None, "Yes", ("", "Yes")),
    ("qwen3", False, " Yes, <think> is a tag", ("", " Yes, <think> is a tag")),
    ("qwen3", None, "<think>\nWell", ("Well", "")), ("qwen3", None, "<think>\n\n</think>\n\nYes", ("", "Yes")),
    ("gemma4", None, "Yes", ("", "Yes")), ("gemma4", True, "<|channel>thought\nWell\n<channel|>Yes", ("Well", "Yes")),
    ("gemma4", True, "<|channel>thought<channel|>Yes", ("", "Yes")),
    ("gemma4", None, "Yes<|channel>thought\nWell<channel|>No", ("Well", "Yes\n\nNo")),
    ("nano-v2", None, "Well\n</think>\n\nYes", ("Well", "Yes")), ("nano-v2", False, "Yes", ("", "Yes")),
    ("nano-v2", None, "a < b </thin </think>Yes </think>", ("a < b </thin", "Yes </think>")),
    ("nemotron3", None, "Well\n</think>\nYes", ("Well", "Yes")), ("nemotron3", False, "Yes", ("", "Yes")),
    ("gpt-oss", None, "<|channel|>analysis<|message|>Well<|end|><|start|>assistant<|channel|>final<|message|>Yes",
     ("Well", "Yes")),
])
def test_each_family_is_split(family, name, think, reply, expected):
    text = family(name)
    assert split(text, text.encode_chat(ASK, think=think), reply) == expected


def test_tags_in_a_question_open_nothing(family):
    text = family("nano-v2")
    prompt = text.encode_chat([{"role": "user", "content": "What is <think>"}], think=False)
    assert split(text, prompt, "A tag") == ("", "A tag")


def test_a_model_without_thoughts_is_not_split(family):
    assert family("plain").splitter([1, 2]) is None


def test_reasoning_goes_back_as_reasoning_content(family):
    """Where a template shows thoughts since the last question, and not those of former turns."""
    text = family("qwen3")
    answer = {"role": "assistant", "content": "Yes", "reasoning_content": "Well"}
    assert "<think>\nWell\n</think>\n\nYes" in text.render_chat([*ASK, answer], add_generation_prompt=False)
    assert "Well" not in text.render_chat([*ASK, answer, {"role": "user", "content": "Sure?"}])


@pytest.mark.parametrize("path, think, ending", [
    (GEMMA, None, "<channel|>"), (GEMMA, True, "<|turn>model\n"), (NEMOTRON, None, "<think>\n"),
    (NEMOTRON, False, "<think></think>"),
])
def test_checkpoints_are_switched(path, think, ending):
    assert Text(path, {}).render_chat(ASK, think=think).endswith(ending)


def test_a_checkpoint_without_a_switch_says_so():
    with pytest.raises(Fp4rtError, match="chat_template.jinja: the chat template has no switch"):
        Text(LLAMA, {}).render_chat(ASK, think=False)


# -- The library ----------------------------------------------------------------------------------------------------

REPLIES = {
    GEMMA: ("<|channel>thought\nlet me see\n<channel|>one scale", True),
    NEMOTRON: ("let me see\n</think>\none scale", None),
    GPT_OSS: ("<|channel|>analysis<|message|>let me see<|end|>"
              "<|start|>assistant<|channel|>final<|message|>one scale", None),
}


def say(monkeypatch, *replies: str) -> None:
    """Let models draw the tokens of these replies, one reply a call."""
    waiting = list(replies)

    def run(self, sequences):
        for sequence in sequences:
            for token in self.text.encode(waiting.pop(0), add_special=False):
                sequence.append(token)
                yield sequence, token
                if sequence.finish_reason:
                    break

    monkeypatch.setattr(LLM, "_run", run)


@pytest.mark.parametrize("path", REPLIES, ids=lambda path: path.name)
def test_output_tells_reasoning_from_the_answer(monkeypatch, path):
    reply, think = REPLIES[path]
    say(monkeypatch, *[reply] * 4)
    with fp4rt.load(path, device="reference", max_model_len=256) as llm:
        output = llm.chat(ASK, think=think)
        assert (output.reasoning, output.text) == ("let me see", "one scale")
        assert output.ids == llm.text.encode(reply, add_special=False)
        assert joined(list(llm.stream_chat(ASK, think=think))) == (output.reasoning, output.text)
        raw, = llm.generate(llm.text.encode_chat(ASK, think=think))
        assert raw.reasoning == "" and raw.text == llm.text.decode(output.ids)
        stopped = llm.chat(ASK, fp4rt.Sampling(stop=("e",)), think=think)  # also in the thought, where it is none
        assert (stopped.reasoning, stopped.text, stopped.finish_reason) == ("let me see", "on", "stop")


def test_a_session_remembers_answer_and_reasoning(monkeypatch):
    reply, think = REPLIES[GEMMA]
    say(monkeypatch, reply, reply, "<|channel>thought\nlet")
    with fp4rt.load(GEMMA, device="reference", max_model_len=256) as llm:
        session = llm.session()
        assert "".join(session.send("Hi", think=think)) == "one scale"
        assert joined(list(session.stream("Hi", think=think))) == ("let me see", "one scale")
        answer = {"role": "assistant", "content": "one scale", "reasoning_content": "let me see"}
        assert session.messages == [*ASK, answer] * 2
        assert list(session.send("Hi", think=think)) == []
        assert session.messages[-1] == {"role": "assistant", "content": "", "reasoning_content": "let"}


# -- The command line -----------------------------------------------------------------------------------------------


def command(*arguments: str | Path, **options):
    return CliRunner().invoke(main, [str(one) for one in arguments], **options)


ON = ["--device", "reference", "--max-model-len", "256"]


def test_generate_writes_reasoning_to_stderr(monkeypatch):
    for quiet in (False, True):
        say(monkeypatch, REPLIES[GEMMA][0])
        monkeypatch.setattr("fp4rt.cli.generate.figures", lambda llm: "")
        result = command("generate", GEMMA, "Hi", "--chat", "--think", *ON, *["-q"] * quiet)
        assert (result.exit_code, result.stdout) == (0, "one scale\n")
        assert result.stderr == "" if quiet else "let me see\n\n" in result.stderr
        assert "\x1b" not in result.stderr


def test_reasoning_is_dim_on_a_terminal(monkeypatch):
    say(monkeypatch, REPLIES[GEMMA][0])
    monkeypatch.setattr("fp4rt.cli.generate.figures", lambda llm: "")
    result = command("generate", GEMMA, "Hi", "--chat", "--think", *ON, color=True)
    assert "\x1b[2m" in result.stderr and result.stdout == "one scale\n"


def test_chat_writes_reasoning_to_stderr(monkeypatch):
    for quiet in (False, True):
        say(monkeypatch, *[REPLIES[GEMMA][0]] * 2)
        result = command("chat", GEMMA, "--think", *ON, *["-q"] * quiet, input="Hi\nHi\n")
        assert (result.exit_code, result.stdout) == (0, "one scale\none scale\n")
        assert result.stderr == "" if quiet else result.stderr.count("let me see\n\n") == 2


@pytest.mark.parametrize("arguments, expected", [
    ([], {"think": None}), (["--think"], {"think": True}), (["--no-think"], {"think": False}),
    (["--template-arg", "enable_thinking=false", "--template-arg", "effort=low", "--template-arg", "a=[1, \"=\"]",
      "--template-arg", "b=", "--template-arg", "c=x=y"],
     {"think": None, "enable_thinking": False, "effort": "low", "a": [1, "="], "b": "", "c": "x=y"}),
])
def test_switches_reach_the_template(monkeypatch, arguments, expected):
    seen = []
    monkeypatch.setattr(Text, "render_chat", lambda self, messages, **given: seen.append(given) or "x")
    say(monkeypatch, "a", "a")
    assert command("generate", GEMMA, "Hi", "--chat", "-q", *ON, *arguments).exit_code == 0
    assert command("chat", GEMMA, "-q", *ON, *arguments, input="Hi\n").exit_code == 0
    assert seen == [expected] * 3  # chat tries the template before the first turn


@pytest.mark.parametrize("arguments, words", [
    (["--think"], "--think needs --chat"), (["--template-arg", "a=1"], "--template-arg needs --chat"),
    *((["--chat", "--template-arg", given], words) for given, words in (
        ("messages=[]", "messages is set by fp4rt"), ("think=true", "use --think"), ("tools=[]", "tools is set by"),
        ("a", "'a' is not KEY=VALUE"), ("=1", "'=1' is not KEY=VALUE"), ("a b=1", "'a b=1' is not KEY=VALUE"))),
    (["--chat", "--template-arg", "a=1", "--template-arg", "a=2"], "a is given twice"),
])
def test_wrong_usage(arguments, words):
    result = command("generate", GEMMA, "Hi", *ON, *arguments)
    assert result.exit_code == 2 and words in result.stderr and result.stdout == ""


@pytest.mark.parametrize("start", [["generate", LLAMA, "Hi", "--chat"], ["chat", LLAMA]])
def test_a_switch_that_is_not_there_is_one_line(start):
    result = command(*start, "--no-think", "-q", *ON, input="Hi\n")
    assert result.exit_code == 1 and result.stdout == ""
    line, = result.stderr.splitlines()
    assert line.startswith("error: ") and "no switch that turns thinking off" in line
