"""Prompts from a file: each line's answer is its own, in order, and a bad line says why and stops no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import fp4rt
from fp4rt.cli import main

CHECKPOINT = Path(__file__).parent / "checkpoints" / "llama-modelopt-nvfp4"
OPTIONS = ("--device", "reference", "--max-model-len", "256", "--temperature", "0", "--max-tokens", "6", "--ignore-eos")


def run(tmp_path: Path, lines: list, *arguments: str, source: str | None = None) -> tuple[Result, list[dict]]:
    """The command's result, and what it wrote; a line that is no text is written as JSON."""
    given, answers = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    given.write_bytes(b"\n".join(
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines) + b"\n")
    files = "--input-file", source or str(given), "--output-file", str(answers)
    result = CliRunner().invoke(main, ["generate", str(CHECKPOINT), *files, "-q", *OPTIONS, *arguments],
                                input=given.read_bytes())
    return result, [json.loads(line) for line in answers.read_bytes().splitlines()] if answers.exists() else []


@pytest.fixture(scope="module")
def llm():
    with fp4rt.load(CHECKPOINT, device="reference", max_model_len=256) as loaded:
        yield loaded


def test_every_line_is_answered_as_alone_and_in_order(tmp_path: Path, llm: fp4rt.LLM):
    chat = [{"role": "user", "content": "one scale"}]
    lines = [{"prompt": "The block scale", "max_tokens": 30}, {"prompt": [5, 6, 7], "id": "b"}, "",
             {"messages": chat, "id": {"any": 1}}, {"prompt": "x", "temperature": 1.0, "seed": 3, "stop": ["e"]}]
    result, answers = run(tmp_path, lines)
    assert result.exit_code == 0, result.output
    sampling = dict(temperature=0, max_tokens=6, ignore_eos=True)
    expected = [llm.generate("The block scale", fp4rt.Sampling(**{**sampling, "max_tokens": 30}))[0],
                llm.generate([5, 6, 7], fp4rt.Sampling(**sampling))[0], llm.chat(chat, fp4rt.Sampling(**sampling)),
                llm.generate("x", fp4rt.Sampling(**{**sampling, "temperature": 1.0, "seed": 3, "stop": ("e",)}))[0]]
    assert [answer.get("id") for answer in answers] == [None, "b", {"any": 1}, None]
    for answer, output in zip(answers, expected, strict=True):
        assert (answer["text"], answer["reasoning"], answer["finish_reason"], answer["prompt_tokens"]) == (
            output.text, output.reasoning, output.finish_reason, output.prompt_tokens)
        assert answer["generated_tokens"] == len(output.ids)


def test_more_lines_than_are_under_way_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fp4rt.cli._batch.AHEAD", 3)
    result, answers = run(tmp_path, [{"prompt": [i + 1], "id": i, "max_tokens": 1 + i % 4} for i in range(20)])
    assert result.exit_code == 0 and [answer["id"] for answer in answers] == list(range(20))
    assert [answer["generated_tokens"] for answer in answers] == [1 + i % 4 for i in range(20)]


def test_a_bad_line_says_why_and_stops_no_other(tmp_path: Path):
    bad = [("{", "line 1: is not JSON"), ("7", "line 2: is 7; it must be an object"),
           (b"\"\xff\"", "line 3: is not UTF-8"), ({"text": "x", "id": "t"}, "unknown key 'text'"),
           ({}, "either a prompt or messages"), ({"prompt": "x", "messages": []}, "either a prompt or messages"),
           ({"prompt": 7}, "prompt is 7"),
           ({"prompt": [10**9]}, "1000000000"), ({"prompt": []}, "no tokens"), ({"prompt": [1] * 256}, "256 tokens"),
           ({"prompt": "x", "top_p": 7, "id": "p"}, "top_p is 7"), ({"prompt": "x", "seed": "a"}, "seed is 'a'"),
           ({"messages": "x"}, "messages must be a list"), ({"messages": [{"role": "user", "content": 5}]}, "[0]"),
           ({"prompt": "x", "think": True}, "belong to a chat"), ("[" * 100000, "is not JSON"),
           ("1" * 5000, "is not JSON"), ('{"prompt": [1], "id": NaN}', "is not JSON"),
           ({"prompt": "\ud800"}, "not valid Unicode")]
    result, answers = run(tmp_path, [*(line for line, _ in bad), {"prompt": [1]}])
    assert len(answers) == len(bad) + 1
    for (line, words), answer in zip(bad, answers):
        assert words in answer["error"], (line, answer)
    assert answers[3]["id"] == "t" and answers[10]["id"] == "p" and answers[-1]["finish_reason"] == "length"
    assert result.exit_code == 1 and f"{len(bad)} of {len(bad) + 1} lines went wrong" in result.stderr


def test_options_hold_for_lines_that_do_not_say_otherwise(tmp_path: Path, llm: fp4rt.LLM):
    _, answers = run(tmp_path, [{"prompt": "Hi"}, {"prompt": "Hi", "seed": None}], "--chat", "--system", "Be kind.",
                     "--temperature", "1", "--seed", "40")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    for i, answer in enumerate(answers):
        expected = llm.chat(messages, fp4rt.Sampling(temperature=1, max_tokens=6, ignore_eos=True, seed=40 + i))
        assert answer["text"] == expected.text


def test_stdin(tmp_path: Path):
    result, answers = run(tmp_path, [{"prompt": [1]}], source="-")
    assert result.exit_code == 0 and len(answers) == 1


@pytest.mark.parametrize("arguments, code, words", [
    (["--input-file", "x"], 2, "belong together"), (["--output-file", "x"], 2, "belong together"),
    (["a prompt", "--input-file", "x", "--output-file", "y"], 2, "give one of them"),
    (["--input-file", "x", "--output-file", "y", "--system", "s"], 2, "--system needs --chat"),
    (["--input-file", "nowhere", "--output-file", "y"], 1, "nowhere: cannot be opened"),
    (["--input-file", "{file}", "--output-file", "{file}"], 1, "is the input file"),
    (["--input-file", "{file}", "--output-file", "{file}.d/y"], 1, "there is no directory"),
])
def test_wrong_usage(tmp_path: Path, arguments: list[str], code: int, words: str):
    file = tmp_path / "x"
    file.write_text('{"prompt": [1]}\n')
    result = CliRunner().invoke(main, ["generate", str(CHECKPOINT), *OPTIONS,
                                       *(argument.replace("{file}", str(file)) for argument in arguments)])
    assert result.exit_code == code and words in result.stderr
    assert file.read_text() == '{"prompt": [1]}\n'
