"""Text: ids and back, whole characters as they come, stop strings, stop ids, and chat templates of all kinds."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import fp4rt.text.template as template
from fp4rt.errors import Fp4rtError
from fp4rt.text import StopStrings, Text

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama-modelopt-nvfp4"
REFERENCE = json.loads((CHECKPOINT / "reference" / "reference.json").read_text())
CONFIG = json.loads((CHECKPOINT / "config.json").read_text())
SAMPLES = ["Hello, world", "né 漢字 🙂 z", " leading", "a  b\n\n\tc", "👩‍👩‍👧", "<0x41> is not a byte", "▁"]
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def text():
    return Text(CHECKPOINT, CONFIG)


def byte_fallback(strip: bool) -> Tokenizer:
    """A SentencePiece-like tokenizer (Gemma's kind; with `strip`, Llama 2's) whose words are few."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "H", "▁ab"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁a", "b")],
                                     unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("<s>", special=True)])
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if strip else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def text_with(path: Path, tokenizer: Tokenizer | None = None, **files) -> Text:
    """A Text over a directory with this tokenizer and these JSON files."""
    if tokenizer is None:
        shutil.copy(CHECKPOINT / "tokenizer.json", path)
    else:
        tokenizer.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return Text(path, {})


def streamed(text: Text, ids) -> list[str]:
    stream = text.stream()
    return [*(stream.push(i) for i in ids), stream.finish()]


# -- Ids and text ---------------------------------------------------------------------------------------------------


def test_encode_gives_the_reference_ids(text):
    assert text.encode(REFERENCE["prompt_text"]) == REFERENCE["input_ids"]
    assert text.encode(REFERENCE["prompt_text"], add_special=False) == REFERENCE["input_ids"][1:]


@pytest.mark.parametrize("sample", SAMPLES)
def test_decode_undoes_encode(text, sample):
    ids = text.encode(sample)
    assert text.decode(ids) == sample
    assert "".join(streamed(text, ids)) == sample


def test_byte_level_stream_equals_the_library_on_any_ids(text):
    library = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(0, 1030, 40).tolist()  # special tokens, broken UTF-8, and ids beyond the vocabulary
        assert "".join(streamed(text, ids)) == library.decode(ids, skip_special_tokens=True)
        assert text.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("strip", [False, True])
def test_byte_fallback_stream_equals_the_library_on_text(tmp_path, strip):
    tokenizer = byte_fallback(strip)
    text = text_with(tmp_path, tokenizer)
    for sample in [*SAMPLES[:5], "Ha ab é", "  two", ""]:
        ids = [1, *text.encode(sample)]
        assert "".join(streamed(text, ids)) == tokenizer.decode(ids) == text.decode(ids)
    assert "".join(streamed(text, [2 + 0xE6, 2 + 0xBC, 259])) == "\ufffda"


def test_characters_come_whole_and_at_once(text, tmp_path):
    for one in (text, text_with(tmp_path, byte_fallback(False))):
        pieces = streamed(one, one.encode("a🙂b"))
        assert [piece for piece in pieces if piece] == ["a", "🙂", "b"]
        smile = one.encode("🙂", add_special=False)
        assert len(smile) > 1 and streamed(one, smile[:-1])[-1] == "\ufffd"  # cut short: only at the end


def test_a_long_stream_costs_the_same_per_token(text):
    """Bytes that never complete a character pile nothing up: 200 000 of them are done at once."""
    stream, lengths = text.stream(), []
    broken = text.encode("🙂", add_special=False)[1]
    for _ in range(200_000):
        lengths.append(len(stream.push(broken)))
    assert sum(lengths) + len(stream.finish()) >= 200_000


def test_special_tokens_are_not_text(text):
    ids = text.encode("<|begin_of_text|>x<|eot_id|>y", add_special=False)
    assert len(ids) == 4 and text.decode(ids) == "xy"
    assert text.decode(ids, skip_special=False) == "<|begin_of_text|>x<|eot_id|>y"


def test_truncation_in_the_file_is_ignored(tmp_path):
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    assert text_with(tmp_path, tokenizer).encode(REFERENCE["prompt_text"]) == REFERENCE["input_ids"]


@pytest.mark.parametrize("prompt, words", [("a\ud800", "Unicode"), (b"a", "bytes"), (None, "NoneType"), (3, "int")])
def test_prompts_that_are_not_text(text, prompt, words):
    with pytest.raises(Fp4rtError, match=words) as caught:
        text.encode(prompt)
    assert caught.value.kind == "request"


# -- Files ----------------------------------------------------------------------------------------------------------


def test_missing_tokenizer(tmp_path):
    with pytest.raises(Fp4rtError, match="no tokenizer.json") as caught:
        Text(tmp_path, {})
    assert caught.value.kind == "checkpoint"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"version": "1.0"}', b'{"model": {"type": "BPE"}}',
                                    "truncated", "vocabulary"])
def test_damaged_tokenizer(tmp_path, damage):
    whole = (CHECKPOINT / "tokenizer.json").read_bytes()
    if damage == "vocabulary":
        data = json.loads(whole)
        data["model"]["vocab"] = {word: "x" for word in data["model"]["vocab"]}
        damage = json.dumps(data).encode()
    (tmp_path / "tokenizer.json").write_bytes(whole[:len(whole) // 2] if damage == "truncated" else damage)
    with pytest.raises(Fp4rtError, match=r"tokenizer\.json: not a tokenizer") as caught:
        Text(tmp_path, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.CTC(),
                                     decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()])])
def test_a_decoder_that_is_not_read_is_refused(tmp_path, decoder):
    tokenizer = byte_fallback(False)
    tokenizer.decoder = decoder
    with pytest.raises(Fp4rtError, match="its decoder .* is not one that fp4rt reads"):
        text_with(tmp_path, tokenizer)


def test_metaspace_decoder(tmp_path):
    tokenizer = byte_fallback(False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    ids = [261, 259, 261, 260]
    assert text_with(tmp_path, tokenizer).decode(ids) == tokenizer.decode(ids) == "aa ab"


def test_stop_ids_are_a_union(tmp_path):
    shutil.copy(CHECKPOINT / "tokenizer.json", tmp_path)
    eos = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).token_to_id("<|eot_id|>")
    assert Text(tmp_path, {}).stop_ids == frozenset()
    assert Text(tmp_path, {"eos_token_id": 5, "text_config": {"eos_token_id": [6, 7]}}).stop_ids == {5, 6, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 5]}')
    for stated in ('"<|eot_id|>"', '{"content": "<|eot_id|>"}'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {stated}}}')
        assert Text(tmp_path, {"eos_token_id": 5}).stop_ids == {5, 8, eos}
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|begin|>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "no", "eos_token": {"content": "<|eot_id|>"}}')
    text = Text(tmp_path, {})
    assert text.stop_ids == {5, 8, eos}
    assert text.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"}
    for bad in ("2", -1, 1.5, [None], True, {}):
        with pytest.raises(Fp4rtError, match="config.json: eos_token_id is"):
            Text(tmp_path, {"eos_token_id": bad})


# -- Stop strings ---------------------------------------------------------------------------------------------------


def ended(text: str, stops: list[str]) -> str:
    """The definition: the text before the stop string that is complete first, the longest of those."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    return text[:sum(min(ends))] if ends else text


def test_stop_strings_are_their_definition_however_the_text_is_cut():
    random = np.random.default_rng(1)
    for _ in range(3000):
        stops = ["".join(random.choice(list("ab"), random.integers(1, 6))) for _ in range(random.integers(1, 4))]
        whole = "".join(random.choice(list("abc"), 30))
        cuts = np.sort(random.integers(0, 31, random.integers(0, 30)))
        stopper, shown = StopStrings(stops), ""
        for piece in np.split(np.array(list(whole)), cuts):
            shown += stopper.push("".join(piece))
            assert ended(whole, stops).startswith(shown)
        assert stopper.found == any(stop in whole for stop in stops)
        assert shown + stopper.finish() == ended(whole, stops)


def test_no_more_is_held_back_than_could_become_a_stop_string():
    stopper = StopStrings(["</end>", "STOP"])
    pieces = [stopper.push(piece) for piece in ("ab<", "/e", "x", "S", "TO", "O", "q")]
    assert pieces == ["ab", "", "</ex", "", "", "STOO", "q"]
    assert (stopper.push("y</"), stopper.finish(), stopper.found) == ("y", "</", False)
    assert StopStrings(()).push("anything") == "anything"


def test_nothing_comes_after_a_stop_string():
    stopper = StopStrings(["."])
    assert (stopper.push("one. two"), stopper.found) == ("one", True)
    assert stopper.push("three") == "" and stopper.finish() == ""


def test_a_hostile_stop_string_costs_linear_time():
    stopper = StopStrings(["a" * 50_000 + "b"])
    shown = "".join(stopper.push("a") for _ in range(100_000))
    assert shown == "a" * 50_000 and stopper.finish() == "a" * 50_000


# -- Chat templates -------------------------------------------------------------------------------------------------


def test_a_rendered_chat_has_one_bos(text):
    ids = text.encode_chat(CHAT)
    turn = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert text.render_chat(CHAT).startswith("<|begin_of_text|>" + turn)
    assert ids.count(CONFIG["bos_token_id"]) == 1 and ids[0] == CONFIG["bos_token_id"]
    assert text.render_chat(CHAT, add_generation_prompt=False).endswith("Hi<|eot_id|>")


def rendered(tmp_path, source, messages=CHAT, **arguments):
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    return text_with(tmp_path, tokenizer_config={"bos_token": {"content": "<b>"}, "eos_token": "<e>"}).render_chat(
        messages, **arguments)


@pytest.mark.parametrize("source, expected", [
    ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}", "<b>|<e>|"),
    ("{% if true %}\n    {% set x = 1 %}\nline {{ x }}\n{% endif %}\nend", "line 1\nend"),
    ("{{ {'a': '<é>&\\''} | tojson }}", '{"a": "<é>&\'"}'),
    ("{{ {'b': [1], 'a': none} | tojson(indent=1) }}", '{\n "b": [\n  1\n ],\n "a": null\n}'),
    ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
     "{% endfor %}", "02"),
    ("{% generation %}a{{ messages[0].content }}{% endgeneration %}.", "aHi."),
    ("{% set ns = namespace(x=0) %}{% for m in messages[::-1] %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}", "1"),
    ("{{ strftime_now('%Y') | length }}", "4"),
    ("{{ tools is none }} {{ thinking | default('off') }}", "True off"),
    ("漢字 {{ messages[0]['content'].replace('H', '🙂') }}", "漢字 🙂i"),
    ("a\n", "a"),
])
def test_what_templates_use(tmp_path, source, expected):
    assert rendered(tmp_path, source) == expected


def test_arguments_reach_the_template(tmp_path):
    assert rendered(tmp_path, "{{ enable_thinking }} {{ tools[0].name }}", enable_thinking=False,
                    tools=[{"name": "add"}]) == "False add"


@pytest.mark.parametrize("stated, tools, expected", [
    ("{{ 'str' }}", None, "str"),
    ([{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}], None, "one"),
    ([{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}], [{"name": "f"}], "two"),
    ([{"name": "chat", "template": "only"}], None, "only"),
])
def test_templates_in_tokenizer_config(tmp_path, stated, tools, expected):
    text = text_with(tmp_path, tokenizer_config={"chat_template": stated})
    assert text.render_chat(CHAT, tools=tools) == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert text_with(tmp_path, tokenizer_config={"chat_template": stated}).render_chat(CHAT) == "file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    text = text_with(tmp_path, tokenizer_config={"chat_template": stated})
    assert (text.render_chat(CHAT), text.render_chat(CHAT, tools=[{"name": "f"}])) == ("file", "tools")


@pytest.mark.parametrize("stated, words", [
    (None, "has no chat template"), (3, "neither text nor"), ([], "neither text nor"),
    ([{"name": "a"}], "neither text nor"), ([{"name": "a", "template": 1}], "neither text nor"),
    ("{% if %}", "line 1 of the chat template is not valid"),
    ([{"name": "a", "template": ""}, {"name": "b", "template": ""}], "no default"),
    ("{% include 'x' %}", "no loader"), ("{{ raise_exception('only user\nturns') }}", "refuses .*: only user turns$"),
    ("{{ messages[7].content }}", "refuses these messages"), ("{{ 1 / 0 }}", "ZeroDivisionError"),
])
def test_templates_that_do_not_work(tmp_path, stated, words):
    text = text_with(tmp_path, tokenizer_config={"chat_template": stated} if stated is not None else {})
    with pytest.raises(Fp4rtError, match=words) as caught:
        text.render_chat(CHAT)
    assert "\n" not in str(caught.value)


HOSTILE = {
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "forbidden"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('true') }}", "forbidden"),
    "changes": ("{{ messages.append(1) }}", "forbidden"),
    "range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "s of processor time"),
    "power": ("{{ 10 ** (10 ** 9) }}", "s of processor time|memory"),
    "nested": ("{% set n = namespace(a=[1]) %}{% for i in range(50) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
               "s of processor time|memory"),
    "string": ("{{ 'a' * 10 ** 11 }}", "MiB of memory"),
    "width": ("{{ 'a'.center(10 ** 11) }}", "MiB of memory"),
    "format": ("{{ '%100000000000d' % 1 }}", "memory|refuses|fails"),
    "doubling": ("{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
                 "memory"),
    "output": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 16777216 characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(tmp_path, monkeypatch, name):
    source, words = HOSTILE[name]
    monkeypatch.setattr(template, "CPU_SECONDS", 1)
    monkeypatch.setattr(template, "MEMORY_BYTES", 256 << 20)
    started = time.monotonic()
    with pytest.raises(Fp4rtError, match=words) as caught:
        rendered(tmp_path, source)
    assert "\n" not in str(caught.value) and time.monotonic() - started < template.WALL_SECONDS


@pytest.mark.parametrize("messages", [[], "hi", None, [{}], ["hi"], [{"role": 3, "content": ""}],
                                      [{"role": "user", "content": 3}], [{"role": "user", "content": "", "x": {1}}]])
def test_messages_that_are_none(text, messages):
    with pytest.raises(Fp4rtError, match="message") as caught:
        text.render_chat(messages)
    assert caught.value.kind == "request"
