"""The server: every endpoint as its clients use it, every mistake told by its field, nothing left behind."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")

import fp4rt  # noqa: E402
from fp4rt.serve.app import make_openapi  # noqa: E402
from fp4rt.serve.service import THREADS  # noqa: E402
from fp4rt.text import Text  # noqa: E402
from serving import Running, program, serving, wait_until  # noqa: E402

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is 2+3?"}]
LONG = dict(prompt="Once upon a time", max_tokens=900, ignore_eos=True)  # seconds of work
GREEDY = dict(temperature=0)


@pytest.fixture(scope="module")
def server():
    with serving("demo", device="cpu", max_model_len=1024, max_num_seqs=8, kv_tokens=8192) as running:
        yield running


def idle(server: Running) -> None:
    """Nothing runs, nothing waits, and nobody holds a page."""
    wait_until(lambda: not server.llm.llm.engine.busy)
    stats = server.llm.stats()
    assert (stats.running, stats.waiting, stats.kv_pages_in_use) == (0, 0, 0)


# -- Completions ----------------------------------------------------------------------------------------------------


def test_a_completion(server: Running):
    reply = server.post(TEXT, model="demo", prompt="Once upon a time", max_tokens=8, **GREEDY)
    choice, = reply["choices"]
    assert reply["object"] == "text_completion" and reply["model"] == "demo"
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    ids = server.llm.llm.encode("Once upon a time")
    assert reply["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 8, "total_tokens": len(ids) + 8,
                              "prompt_tokens_details": {"cached_tokens": 0}}
    streamed = server.events(TEXT, prompt="Once upon a time", max_tokens=8, stream_options={"include_usage": True},
                             **GREEDY)
    assert "".join(one["choices"][0]["text"] for one in streamed[:-1]) == choice["text"]
    assert streamed[-2]["choices"][0]["finish_reason"] == "length"
    assert streamed[-1]["choices"] == [] and streamed[-1]["usage"]["completion_tokens"] == 8


def test_every_form_of_a_prompt(server: Running):
    ids = server.llm.llm.encode("Once upon")
    texts = {server.post(TEXT, prompt=prompt, max_tokens=5, **GREEDY)["choices"][0]["text"]
             for prompt in ("Once upon", ["Once upon"], ids, [ids])}
    assert len(texts) == 1
    reply = server.post(TEXT, prompt=["Once upon", "The dog"], n=2, max_tokens=5, **GREEDY)
    assert [one["index"] for one in reply["choices"]] == [0, 1, 2, 3]
    said = [one["text"] for one in reply["choices"]]
    assert said[0] == said[1] == texts.pop() and said[2] == said[3] != said[0]
    assert reply["usage"]["prompt_tokens"] == len(ids) + len(server.llm.llm.encode("The dog"))


def test_echo_and_the_prompts_log_probabilities(server: Running):
    """As lm-eval's local-completions asks for them, with max_tokens 0 and 1."""
    prompt = "Once upon a time there was"
    for max_tokens in (0, 1):
        choice, = server.post(TEXT, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2, **GREEDY)["choices"]
        told = choice["logprobs"]
        ids = server.llm.llm.encode(prompt)
        assert choice["text"].startswith(prompt) and (choice["text"] == prompt) == (max_tokens == 0)
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(ids) + max_tokens
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert all(p <= 0 for p in told["token_logprobs"][1:])
        assert all(len(top) == 2 for top in told["top_logprobs"][1:])
        assert told["text_offset"][0] == 0  # the token that the tokenizer puts before a text
        assert told["text_offset"][1:] == [sum(map(len, told["tokens"][1:i])) for i in range(1, len(told["tokens"]))]
    with fp4rt.load("demo", device="cpu") as llm:
        logits = llm.logits(ids)[:-1].astype(np.float64)
    expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(ids) - 1), ids[1:]]
    assert np.allclose(told["token_logprobs"][1:len(ids)], expected, atol=1e-2)


def test_offsets_are_places_in_the_text(server: Running):
    """Parts of a character begin where it does; special tokens take room only where the prompt spells them."""
    spelled = "na\u00efve \U0001f642<|eot_id|> dog"
    ids = server.llm.llm.encode(spelled)
    bias = {str(i): 30 for i in server.llm.llm.text.encode("\U0001f642\u00ef x", add_special=False)}
    for prompt, echoed in ((spelled, spelled), (ids, spelled.replace("<|eot_id|>", ""))):
        choice, = server.post(TEXT, prompt=prompt, max_tokens=40, echo=True, logprobs=0, temperature=2, seed=1,
                              logit_bias=bias, ignore_eos=True)["choices"]
        text, tokens, offsets = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert text.startswith(echoed) and offsets == sorted(offsets)
        assert any(token.startswith("bytes:") for token in tokens[len(ids):])
        for token, offset in zip(tokens, offsets, strict=True):
            if token.startswith("bytes:"):
                assert not text[offset].isascii()
            elif not token.startswith("<|"):
                assert text.startswith(token, offset), (token, offset)
        assert offsets[tokens.index("<|eot_id|>")] == len("na\u00efve \U0001f642")


def test_continuations_are_scored_as_lm_eval_does(server: Running):
    """Ids of several contexts and continuations in one request; token_logprobs[context:-1] is the continuation."""
    text = server.llm.llm.text
    pairs = [("The dog", " ran"), ("Q: 2+3?\nA:", " 5 \U0001f642 na\u00efve"), ("", "<|begin_of_text|>Once upon a time"),
             ("Once upon a time there was a", " b" * 300)]
    asked = [(len(text.encode(a, add_special=False)) or 1, text.encode(a + b, add_special=False)) for a, b in pairs]
    choices = server.post(TEXT, model="demo", prompt=[ids for _, ids in asked], max_tokens=1, logprobs=1, echo=True,
                          seed=1234, **GREEDY)["choices"]
    with fp4rt.load("demo", device="cpu") as llm:
        for (context, ids), choice in zip(asked, sorted(choices, key=lambda one: one["index"]), strict=True):
            told = choice["logprobs"]
            assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(ids) + 1
            logits = llm.logits(ids)[context - 1:-1].astype(np.float64)
            expected = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(logits)), ids[context:]]
            assert np.allclose(told["token_logprobs"][context:-1], expected, atol=1e-2)
            best = [one == max(top.values()) for one, top in zip(told["token_logprobs"][context:-1],
                                                                 told["top_logprobs"][context:-1])]
            clear = np.diff(np.partition(logits, -2)[:, -2:])[:, 0] > 0.05  # where rounding decides nothing
            assert clear.any() and (np.array(best) == (logits.argmax(-1) == ids[context:]))[clear].all()


def test_logprobs_in_streams_are_those_of_the_whole(server: Running):
    body = dict(prompt="The dog", max_tokens=6, logprobs=3, **GREEDY)
    whole = server.post(TEXT, **body)["choices"][0]["logprobs"]
    parts = [one["choices"][0]["logprobs"] for one in server.events(TEXT, **body)]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_seeds_stops_biases_and_penalties(server: Running):
    def text(**options) -> str:
        return server.post(TEXT, **{"prompt": "Once upon a time", "max_tokens": 24, **options})["choices"][0]["text"]

    assert text(temperature=1.5, seed=7) == text(temperature=1.5, seed=7)
    assert text(temperature=1.5, seed=-7) == text(temperature=1.5, seed=-7) != text(temperature=1.5, seed=7)
    two = server.post(TEXT, prompt="Once upon a time", max_tokens=24, temperature=1.5, seed=7, n=2)["choices"]
    assert two[0]["text"] != two[1]["text"]
    plain = text(**GREEDY)
    stop = plain.split()[3]
    assert text(stop=stop, **GREEDY) == plain[:plain.index(stop)]
    assert text(stop=[stop, "zzz"], **GREEDY) == plain[:plain.index(stop)]
    token = server.llm.llm.text.encode(" dog", add_special=False)[0]
    assert text(logit_bias={str(token): 100}, max_tokens=3, **GREEDY) == " dog dog dog"
    assert text(top_k=1, temperature=1) == plain
    assert text(frequency_penalty=2, **GREEDY) != plain
    partial = server.llm.llm.text.encode("\U0001f642", add_special=False)[0]  # a byte that begins a character
    held = server.post(TEXT, prompt="x", max_tokens=1, stop=["\ufffd"], logit_bias={str(partial): 100}, **GREEDY)
    assert (held["choices"][0]["text"], held["choices"][0]["finish_reason"]) == ("", "stop")


# -- Chat -----------------------------------------------------------------------------------------------------------


def test_a_chat(server: Running):
    reply = server.post(CHAT, messages=HELLO, max_completion_tokens=20, logprobs=True, top_logprobs=2, **GREEDY)
    choice, = reply["choices"]
    assert choice["message"]["content"] == "2 + 3 = 5" and choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant" and "reasoning_content" not in choice["message"]
    told = choice["logprobs"]["content"]
    assert len(told) == reply["usage"]["completion_tokens"]
    assert bytes(byte for one in told[:-1] for byte in one["bytes"]).decode() == "2 + 3 = 5"
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in told)
    streamed = server.events(CHAT, messages=HELLO, max_tokens=20, n=2, stream_options={"include_usage": True}, **GREEDY)
    for index in range(2):
        deltas = [one["choices"][0] for one in streamed[:-1] if one["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in deltas) == "2 + 3 = 5"
        assert [one["finish_reason"] for one in deltas if one["finish_reason"]] == ["stop"]
    assert all(one["usage"] is None for one in streamed[:-1])
    assert streamed[-1]["usage"]["completion_tokens"] == 2 * reply["usage"]["completion_tokens"]


def test_parts_of_text_and_developers_are_taken(server: Running):
    parts = [{"role": "developer", "content": "Be short."},
             {"role": "user", "content": [{"type": "text", "text": "What is 2+3?"}, {"type": "text", "text": ""}]}]
    plain = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2+3?\n"}]
    assert (server.post("/tokenize", messages=parts)["tokens"] == server.post("/tokenize", messages=plain)["tokens"]
            == server.llm.llm.text.encode_chat(plain))


SCHEMA = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99},
    "kind": {"enum": ["cat", "dog"]}},
          "required": ["name", "age", "kind"], "additionalProperties": False}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_replies_follow_a_schema(server: Running, temperature: float):
    format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    reply = server.post(CHAT, messages=HELLO, response_format=format, temperature=temperature, n=3, seed=3)
    for choice in reply["choices"]:
        pet = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop" and pet.keys() == SCHEMA["properties"].keys()
        assert len(pet["name"]) <= 8 and pet["age"] <= 99 and pet["kind"] in ("cat", "dog")


def test_a_schema_changes_nobody_elses_reply(server: Running):
    alone = server.post(CHAT, messages=HELLO, max_tokens=20, **GREEDY)["choices"][0]["message"]["content"]
    said: list[tuple[str, str]] = []

    def ask(kind: str) -> None:
        reply = server.post(CHAT, messages=HELLO, max_tokens=20, response_format={"type": kind}, **GREEDY)
        said.append((kind, reply["choices"][0]["message"]["content"]))

    threads = [threading.Thread(target=ask, args=[kind]) for kind in ("text", "json_object") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text for kind, text in said if kind == "text"] == [alone] * 3
    assert all(text.lstrip().startswith("{") for kind, text in said if kind == "json_object")


# -- The others -----------------------------------------------------------------------------------------------------


def test_small_endpoints(server: Running):
    assert server.ask("GET", "/health")[0] == 200
    models = json.loads(server.ask("GET", "/v1/models")[2])
    assert [one["id"] for one in models["data"]] == ["demo"] and models["data"][0]["max_model_len"] == 1024
    assert server.ask("GET", "/v1/models/demo")[0] == 200 and server.ask("GET", "/v1/models/other")[0] == 404
    tokens = server.post("/tokenize", prompt="Once upon a time", return_token_strs=True)
    assert tokens["tokens"] == server.llm.llm.encode("Once upon a time") and tokens["count"] == len(tokens["tokens"])
    assert "".join(tokens["token_strs"]) == "<|begin_of_text|>Once upon a time"
    assert server.post("/detokenize", tokens=tokens["tokens"])["prompt"] == "<|begin_of_text|>Once upon a time"
    assert server.post("/tokenize", prompt="x", add_special_tokens=False)["count"] == 1
    told = json.loads(server.ask("GET", "/tokenizer_info")[2])
    assert told.pop("chat_template") == (Path(fp4rt.__file__).parent / "demo/chat_template.jinja").read_text()
    assert told == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": None, "unk_token": None}


def test_the_page_is_one_file_and_its_policy_lets_it_run(server: Running):
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert not re.search(rb"(src|href)=|https?://|@import|url\(", page)
    script = re.search(rb"<script>(.*?)</script>", page, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script).digest()).decode() in headers["content-security-policy"]


def test_metrics_count(server: Running):
    from prometheus_client.parser import text_string_to_metric_families

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(server.ask("GET", "/metrics")[2].decode())
        return {f"{one.name}{sorted(one.labels.items())}": one.value for family in families for one in family.samples}

    before = read()
    server.post(TEXT, prompt="Once upon", max_tokens=7, ignore_eos=True)
    after = read()
    label = "[('model_name', 'demo')]"
    assert after[f"fp4rt:generation_tokens_total{label}"] - before[f"fp4rt:generation_tokens_total{label}"] == 7
    assert after[f"fp4rt:time_to_first_token_seconds_count{label}"] == before[
        f"fp4rt:time_to_first_token_seconds_count{label}"] + 1
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total",
                 "prefix_cache_queries_total", "num_preemptions_total", "e2e_request_latency_seconds_sum"):
        assert f"fp4rt:{name}{label}" in after
    assert after["process_cpu_seconds_total[]"] > before["process_cpu_seconds_total[]"]


def test_metrics_count_guesses():
    with serving("demo", device="cpu", max_model_len=256, speculate=3) as server:
        server.post(TEXT, prompt="a b c d " * 8, max_tokens=30, ignore_eos=True, temperature=0)
        text = server.ask("GET", "/metrics")[2].decode()
        drafted, accepted = (float(re.search(rf"fp4rt:spec_decode_num_{kind}_tokens_total{{.*}} (.*)", text)[1])
                             for kind in ("draft", "accepted"))
        assert 0 < accepted <= drafted


# -- Mistakes -------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
CHAT_MISTAKES = [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "x"}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [USER], "temperature": 3}, "temperature"), ({"messages": [USER], "temperature": 1e-9}, "temperature"),
    ({"messages": [USER], "n": 0}, "n"), ({"messages": [USER], "n": 10**6}, "n"),
    ({"messages": [USER], "max_tokens": 0}, "max_tokens"), ({"messages": [USER], "top_p": 0}, "top_p"),
    ({"messages": [USER], "seed": 2**64}, "seed"), ({"messages": [USER], "stop": [""]}, "stop[0]"),
    ({"messages": [USER], "frobnicate": 1}, "frobnicate"), ({"messages": [USER], "top_logprobs": 3}, "top_logprobs"),
    ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": [USER], "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": [USER], "logit_bias": {"999999": 1}}, "logit_bias"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"type": "file", "text": ""}]}]}, "messages[0].content[0].type"),
    ({"messages": [USER], "logit_bias": {"1": 101}}, "logit_bias[...]"),
    ({"messages": [USER], "tool_choice": "required"}, "tool_choice"),
    ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"messages": [USER], "reasoning_effort": "low"}, "reasoning_effort"),
    ({"messages": [USER], "response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "frog"}}}}, "response_format"),
    ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "string", "pattern": "(a|b"}}}}, "response_format"),
    ({"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "enum": ["x" * 999] * 999}}}}, "response_format"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {
        "name": "f", "arguments": "["}}]}]}, "messages[0].tool_calls[0].function.arguments"),
    *(({"messages": [USER], "chat_template_kwargs": {name: 1}}, "chat_template_kwargs")
      for name in ("think", "messages", "tools", "add_generation_prompt", "bos_token")),
    ({"messages": [USER], "reasoning_effort": "none"}, "reasoning_effort"),
]
TEXT_MISTAKES = [
    ({}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["x", 1]}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"), ({"prompt": [10**6]}, "prompt"), ({"prompt": 5}, "prompt"),
    ({"prompt": "x", "best_of": 2}, "best_of"), ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "suffix": "y"}, "suffix"), ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop"), ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
]


@pytest.mark.parametrize("path,body,param", [*((CHAT, *one) for one in CHAT_MISTAKES),
                                             *((TEXT, *one) for one in TEXT_MISTAKES)])
def test_mistakes_name_their_field(server: Running, path: str, body: dict, param: str):
    error = server.refused(path, 400, body)
    assert error["type"] == "invalid_request_error" and error["param"] == param, error
    assert "Text." not in error["message"] and "/demo/" not in error["message"]  # nothing of the server's insides
    if path == CHAT and param in ("tools", "chat_template_kwargs", "messages[0].content[0].type"):
        assert server.refused("/tokenize", 400, body)["param"] == param


def test_any_other_variable_may_be_a_templates(server: Running):
    for name in ("self", "text", "a b"):
        assert server.post("/tokenize", messages=HELLO, chat_template_kwargs={name: 1})["count"] > 3


def test_a_model_without_a_chat_template(tmp_path: Path):
    path = tmp_path / "base"
    shutil.copytree(Path(fp4rt.__file__).with_name("demo"), path, ignore=shutil.ignore_patterns("chat_template*"))
    with serving(str(path), device="cpu", max_model_len=64) as running:
        for where in (CHAT, "/tokenize"):
            assert "no chat template" in running.refused(where, 400, {"messages": HELLO})["message"]
        assert json.loads(running.ask("GET", "/tokenizer_info")[2])["chat_template"] is None
        assert running.post(TEXT, prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_what_the_context_cannot_hold(server: Running):
    long = "dog " * 1500
    for path, body in ((TEXT, {"prompt": long}), (CHAT, {"messages": [{"role": "user", "content": long}]})):
        error = server.refused(path, 400, body)
        assert error["code"] == "context_length_exceeded" and error["param"] == next(iter(body))
        assert "1024" in error["message"] and re.search(r"\b1[5-9]\d\d\b", error["message"])
    error = server.refused(TEXT, 400, {"prompt": "x", "max_tokens": 1024})
    assert error["code"] == "context_length_exceeded" and "1024" in error["message"] and "1026" in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"prompt": NaN}', b"[" * 200_000, b'{"prompt": "\\ud800"}',
                                  b'{"metadata": ' + b"[" * 200_000, b'{"prompt": "x"} x'])
def test_what_is_no_json(server: Running, body: bytes):
    server.refused(TEXT, 400, body, headers={"content-type": "application/json"})


def test_other_mistakes(server: Running):
    assert server.refused(TEXT, 404, {"prompt": "x", "model": "gpt"})["code"] == "model_not_found"
    server.refused(TEXT, 415, b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    server.refused("/nothing", 404, {})
    status, headers, _ = server.ask("GET", TEXT)
    assert status == 405 and headers["allow"] == "POST"
    assert server.ask("OPTIONS", CHAT, headers={"origin": "http://evil.example"})[0] == 405  # no CORS


def test_a_body_that_is_too_large(server: Running):
    server.refused(TEXT, 413, b"", headers={"content-type": "application/json", "content-length": str(1 << 30)})


def test_bodies_that_are_too_large_together(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fp4rt.serve.service.BODIES_BYTES", 1000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 2000\r\n\r\n" + b" " * 900)
        for _ in range(100):
            status, _, data = server.ask("POST", TEXT, {"prompt": "x" * 150, "max_tokens": 1})
            if status != 200:  # the slow body's beginning has come
                break
        assert status == 429 and b"overloaded" in data
    for _ in range(100):
        if server.ask("POST", TEXT, {"prompt": "x" * 150, "max_tokens": 1})[0] == 200:
            return
        time.sleep(0.05)
    pytest.fail("what the slow client had sent still counts")


def test_bad_http_gets_an_answer_in_json(server: Running):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        head, _, body = sock.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["message"]
    for size, end, status in ((50_000, b"", b"400"), (50_000, b"\r\n\r\n", b"400"), (20_000, b"\r\n\r\n", b"200")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * size + end)
            assert sock.recv(65536).startswith(b"HTTP/1.1 " + status)


def test_request_ids_come_back(server: Running):
    assert server.ask("GET", "/health", headers={"x-request-id": "my-id.1"})[1]["x-request-id"] == "my-id.1"
    made = server.ask("GET", "/health", headers={"x-request-id": "bad id\t"})[1]["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)


# -- Clients that are slow or go ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_not_worked_for(server: Running, stream: bool):
    idle(server)
    before = server.llm.stats()
    sock = server.begin(TEXT, {**LONG, "stream": stream})
    wait_until(lambda: server.llm.stats().generated_tokens > before.generated_tokens)
    sock.close()
    wait_until(lambda: server.llm.stats().finished.get("cancelled", 0) > before.finished.get("cancelled", 0))
    idle(server)
    assert server.llm.stats().generated_tokens - before.generated_tokens < LONG["max_tokens"]


def test_what_waits_for_a_thread_is_dropped_with_its_client(server: Running, monkeypatch: pytest.MonkeyPatch):
    held, rendered = threading.Event(), []
    encode_chat = Text.encode_chat

    def slow(text: Text, messages: list, **options) -> list[int]:
        rendered.append(messages)
        held.wait(60)
        return encode_chat(text, messages, **options)

    def gone() -> int:
        told = server.ask("GET", "/metrics")[2].decode()
        found = re.search(rf'http_responses_total{{path="{CHAT}",status="499"}} (\d+)', told)
        return int(found[1]) if found else 0

    monkeypatch.setattr(Text, "encode_chat", slow)
    before = gone()
    socks = [server.begin(CHAT, {"messages": HELLO, "max_tokens": 1}) for _ in range(THREADS + 6)]
    wait_until(lambda: len(rendered) == THREADS)
    for sock in socks:
        sock.close()
    wait_until(lambda: gone() == before + len(socks))
    held.set()
    assert server.post(CHAT, messages=HELLO, max_tokens=1)["usage"]["completion_tokens"] == 1
    assert len(rendered) == THREADS + 1
    idle(server)


def test_a_mistake_in_one_prompt_leaves_nothing_of_the_others(server: Running):
    server.refused(TEXT, 400, {"prompt": [[1, 2], [10**6]], "max_tokens": 500, "ignore_eos": True})
    idle(server)


def test_slow_clients_are_let_go(server: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fp4rt.serve.server.HEADER_SECONDS", 0.3)
    monkeypatch.setattr("fp4rt.serve.service.BODY_SECONDS", 0.3)
    for sent in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 100\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:  # answered, and sends on and on
        sock.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 404")
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(100):
                sock.sendall(b"x")
                time.sleep(0.05)


def test_a_huge_prompt_holds_up_nobody(server: Running, monkeypatch: pytest.MonkeyPatch):
    """While its tokens are counted, others are answered."""
    counting, encode = threading.Event(), Text.encode

    def watched(*given) -> list[int]:
        counting.set()
        try:
            return encode(*given)
        finally:
            counting.clear()

    monkeypatch.setattr(Text, "encode", watched)
    body = json.dumps({"prompt": "the quick brown dog " * 150_000}).encode()
    replies: list[tuple] = []
    thread = threading.Thread(target=lambda: replies.append(server.ask(
        "POST", TEXT, body, headers={"content-type": "application/json"})))
    thread.start()
    answered = 0
    while thread.is_alive():
        during = counting.is_set()
        answered += server.ask("GET", "/health")[0] == 200 and during and counting.is_set()
    assert replies[0][0] == 400 and b"context_length_exceeded" in replies[0][2] and answered >= 3


def test_a_full_queue_says_when_to_come_again():
    with serving("demo", device="cpu", max_model_len=1024, max_num_seqs=1, kv_tokens=2048, max_queue=1) as server:
        socks = [server.begin(TEXT, LONG)]
        wait_until(lambda: server.llm.stats().running == 1)
        socks.append(server.begin(TEXT, LONG))
        wait_until(lambda: server.llm.stats().waiting == 1)
        status, headers, body = server.ask("POST", TEXT, {"prompt": "x"})
        assert status == 429 and int(headers["retry-after"]) >= 1 and json.loads(body)["error"]["code"] == "overloaded"
        assert server.llm.stats().finished == {}  # what was never taken was not cancelled
        for sock in socks:
            sock.close()
        idle(server)


# -- Keys and hosts -------------------------------------------------------------------------------------------------


def test_keys():
    with serving("demo", ("secret-1", "secret-2"), device="cpu", max_model_len=256) as server:
        for key, status in (("secret-1", 200), ("secret-2", 200), ("secret-3", 401), ("", 401)):
            server.key = key
            assert server.ask("GET", "/v1/models")[0] == status
        server.key = None
        for path in ("/v1/models", "/metrics", "/nothing"):
            status, headers, body = server.ask("GET", path)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
        server.refused(CHAT, 401, {"messages": HELLO})
        assert all(server.ask("GET", path)[0] == 200 for path in ("/", "/health", "/openapi.json"))


def test_without_a_key_only_names_of_this_machine_are_answered():
    with serving("demo", own_hosts=True, device="cpu", max_model_len=256) as server:
        for host, status in (("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:1", 200), ("127.0.0.2:1", 200),
                             ("LocalHost:", 200), ("[0:0:0:0:0:0:0:1]", 200), ("evil.example", 421), ("10.0.0.1", 421),
                             ("[::1]evil", 421), ("127.0.0.1.evil.example", 421), ("", 421)):
            assert server.ask("GET", "/v1/models", headers={"host": host})[0] == status


# -- The OpenAPI file -----------------------------------------------------------------------------------------------


def test_the_description_is_that_of_the_server(server: Running):
    told = json.loads(server.ask("GET", "/openapi.json")[2])
    assert told == json.loads(make_openapi(False)) and told["openapi"].startswith("3.1")
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics",
            "/openapi.json", "/"} <= told["paths"].keys()
    assert "security" in json.loads(make_openapi(True))["paths"]["/v1/models"]["get"]


# -- The program ----------------------------------------------------------------------------------------------------


def test_sigterm_lets_what_runs_come_to_its_end():
    with program("demo", "--device", "cpu", "--max-model-len", "512") as (process, server):
        sock = server.begin(TEXT, {"prompt": "Once upon a time", "max_tokens": 100, "ignore_eos": True, "stream": True})
        data = sock.recv(4096)
        while b"data: " not in data:
            data += sock.recv(4096)
        process.send_signal(signal.SIGTERM)
        while part := sock.recv(65536):
            data += part
        assert b"data: [DONE]" in data and b'"error"' not in data
        assert process.wait(30) == 0
        log = process.stderr.read().decode().splitlines()
    lines = [json.loads(line) for line in log]
    assert {"draining", "ending", "request"} <= {line["event"] for line in lines}
    assert not any("Once upon" in line for line in log)


def test_what_does_not_end_in_time_is_told_so():
    with program("demo", "--device", "cpu", "--max-model-len", "1024", "--drain-seconds", "0.3") as (process, server):
        stream, whole = (server.begin(TEXT, {**LONG, "stream": stream}) for stream in (True, False))
        data = stream.recv(4096)
        while b"data: " not in data:
            data += stream.recv(4096)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.ask("GET", "/health")[0] == 503)
        status, headers, _ = server.ask("POST", TEXT, {"prompt": "x"})
        assert status == 503 and "retry-after" in headers
        while part := stream.recv(65536):
            data += part
        last = data.split(b"data: ")[-1].split(b"\n\n")[0]
        assert json.loads(last)["error"]["code"] == "overloaded" and b"[DONE]" not in data
        answer = b""
        while part := whole.recv(65536):
            answer += part
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after" in answer
        assert process.wait(30) == 0


def test_refusals_of_the_command(tmp_path):
    from click.testing import CliRunner

    from fp4rt.cli import main

    def error(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["serve", "demo", *arguments])
        assert result.exit_code == 1, result.output
        return result.stderr

    assert "--insecure-no-key" in error("--host", "0.0.0.0")
    empty = tmp_path / "keys"
    empty.write_text("\n")
    assert "0 keys" in error("--api-key-file", str(empty))
    assert "printable" in error("--api-key", "a b")
    assert "give one" in error("--gpu-memory-utilization", "0.5", "--gpu-memory", "1GiB")
    assert "needs a GPU" in error("--gpu-memory-utilization", "0.5", "--device", "cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in error("--port", str(taken.getsockname()[1]))


