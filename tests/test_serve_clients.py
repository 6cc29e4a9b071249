"""The server as others use it: the openai client as documented, tools, and schemathesis over the OpenAPI file."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")

import fp4rt  # noqa: E402
from serving import Running, serving, wait_until  # noqa: E402

TEMPLATE = """{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>

{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with {"name": function name, "parameters": {...}}.<|eot_id|>{% endif %}
{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.tool_calls[0].function | tojson if message.tool_calls else message.content }}<|eot_id|>
{%- endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather in a place.",
    "parameters": {"type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"type": "integer"}},
                   "required": ["place", "days"], "additionalProperties": False,
                   "$defs": {"Place": {"enum": ["Paris", "Rome"]}}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {},
                                                                          "additionalProperties": False}}}
USER = {"role": "user", "content": "What is 2+3?"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    """The demo with a chat template that knows of tools, in Llama's form."""
    path = tmp_path_factory.mktemp("model") / "demo-tools"
    shutil.copytree(Path(fp4rt.__file__).with_name("demo"), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with serving(str(path), ("key",), device="cpu", max_model_len=1024, max_num_seqs=8, kv_tokens=8192) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client) -> str:
    return client.models.list().data[0].id


def test_completions(client, model: str):
    done = client.completions.create(model=model, prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=1)
    assert done.choices[0].finish_reason == "length" and done.usage.completion_tokens == 6
    stream = client.completions.create(model=model, prompt="Once upon a time", max_tokens=6, temperature=0, stream=True)
    assert "".join(one.choices[0].text for one in stream) == done.choices[0].text
    assert client.models.retrieve(model).id == model


def test_chat_and_streams(client, model: str):
    done = client.chat.completions.create(model=model, messages=[USER], temperature=0, max_completion_tokens=24,
                                          logprobs=True, top_logprobs=1)
    assert done.choices[0].message.content and done.choices[0].logprobs.content[0].token
    stream = client.chat.completions.create(model=model, messages=[USER], temperature=0, max_completion_tokens=24,
                                            stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert said == done.choices[0].message.content and chunks[-1].usage == done.usage
    with client.chat.completions.stream(model=model, messages=[USER], temperature=0,
                                        max_completion_tokens=24) as events:
        assert events.get_final_completion().choices[0].message.content == said


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_tools(client, model: str, choice):
    asked = dict(model=model, messages=[USER], tools=[WEATHER, CLOCK], tool_choice=choice, temperature=1, seed=4,
                 parallel_tool_calls=False)
    done = client.chat.completions.create(**asked).choices[0]
    call, = done.message.tool_calls
    assert done.finish_reason == "tool_calls" and done.message.content is None and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["place"] in ("Paris", "Rome") and isinstance(arguments["days"], int)
    else:
        assert choice == "required" and arguments == {}
    streamed = [one.choices[0] for one in client.chat.completions.create(**asked, stream=True)]
    calls = [call for one in streamed for call in one.delta.tool_calls or []]
    assert [(one.index, one.function.name, one.function.arguments) for one in calls] == [
        (0, call.function.name, call.function.arguments)]
    assert streamed[-1].finish_reason == "tool_calls"
    # The conversation goes on with what the tool said.
    reply = client.chat.completions.create(model=model, max_tokens=4, tools=[WEATHER, CLOCK], messages=[
        USER, done.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}])
    assert reply.usage.prompt_tokens > 30


def test_a_function_without_parameters_takes_none(client, model: str):
    done = client.chat.completions.create(
        model=model, messages=[USER], tools=[{"type": "function", "function": {"name": "now"}}], tool_choice="required",
        parallel_tool_calls=False, temperature=2, seed=3, max_tokens=200).choices[0]
    assert done.finish_reason == "tool_calls" and done.message.tool_calls[0].function.arguments == "{}"


def test_tools_that_are_not_wanted(client, model: str):
    asked = dict(model=model, messages=[USER], temperature=0, max_tokens=24)
    without = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tools=[WEATHER], tool_choice="none")
    assert none.choices[0].message.content == without.choices[0].message.content
    assert none.usage.prompt_tokens == without.usage.prompt_tokens
    auto = client.chat.completions.create(**asked, tools=[WEATHER])
    assert auto.usage.prompt_tokens > without.usage.prompt_tokens
    for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked, tools=[WEATHER] if choice != "required" else [], tool_choice=choice)
        assert caught.value.param == "tool_choice"


def test_structured_output(client, model: str):
    from pydantic import BaseModel, Field

    class Pet(BaseModel):
        name: str = Field(max_length=6)
        legs: int = Field(ge=0, le=9)

    done = client.chat.completions.parse(model=model, messages=[USER], response_format=Pet, temperature=1, seed=1)
    pet = done.choices[0].message.parsed
    assert isinstance(pet, Pet) and 0 <= pet.legs <= 9
    with client.chat.completions.stream(model=model, messages=[USER], response_format=Pet, temperature=1,
                                        seed=1) as events:
        kinds = [one.type for one in events]
        assert events.get_final_completion().choices[0].message.parsed == pet
    assert kinds.count("content.done") == 1 and "content.delta" in kinds
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=model, messages=[USER], response_format=Pet, max_tokens=2)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[USER], response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frog"}}})
    assert "frog" in caught.value.message and "%json" not in caught.value.message  # what is wrong, not our grammar


def test_tools_from_functions(client, model: str):
    """pydantic_function_tool: strict schemas, arguments parsed, and the events of a streamed call."""
    from pydantic import BaseModel, Field

    class Order(BaseModel):
        item: str = Field(max_length=5)
        count: int = Field(ge=1, le=3)

    asked = dict(model=model, messages=[USER], tools=[openai.pydantic_function_tool(Order)], tool_choice="required",
                 parallel_tool_calls=False, temperature=1, seed=3)
    call, = client.chat.completions.parse(**asked).choices[0].message.tool_calls
    order = call.function.parsed_arguments
    assert isinstance(order, Order) and 1 <= order.count <= 3
    with client.chat.completions.stream(**asked) as events:
        done = [one for one in events if one.type == "tool_calls.function.arguments.done"]
    assert [(one.name, one.parsed_arguments) for one in done] == [("Order", order)]


def test_raw_and_streaming_responses(client, model: str):
    asked = dict(model=model, messages=[USER], temperature=0, max_tokens=4)
    raw = client.chat.completions.with_raw_response.create(**asked, extra_headers={"X-Request-Id": "mine-1"})
    assert raw.headers["x-request-id"] == "mine-1" and raw.parse()._request_id == "mine-1"
    with client.chat.completions.with_streaming_response.create(**asked) as response:
        assert response.status_code == 200
        assert json.loads(response.read())["choices"][0]["message"]["content"] == raw.parse().choices[0].message.content
    with client.chat.completions.with_streaming_response.create(**asked, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])


def test_errors(client, server: Running, model: str):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=[USER])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="dog " * 2000)
    assert caught.value.code == "context_length_exceeded"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger, \
            pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    for ask in (lambda: client.models.retrieve("other"), lambda: client.embeddings.create(model=model, input="x"),
                lambda: client.responses.create(model=model, input="x")):
        with pytest.raises(openai.NotFoundError):
            ask()
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[USER], modalities=["text", "audio"])
    assert caught.value.param == "modalities[1]" and caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(model=model, prompt="x", max_tokens=900,
                                                             extra_body={"ignore_eos": True})
    wait_until(lambda: server.llm.stats().kv_pages_in_use == 0 and server.llm.stats().running == 0)


def test_async_calls_side_by_side(server: Running, model: str):
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            assert [one.id async for one in client.models.list()] == [model]
            asked = dict(model=model, messages=[USER], temperature=0, max_tokens=24)
            whole, stream = await asyncio.gather(client.chat.completions.create(**asked),
                                                 client.chat.completions.create(**asked, stream=True))
            said = [one.choices[0].delta.content or "" async for one in stream]
            assert "".join(said) == whole.choices[0].message.content
            async with client.chat.completions.stream(**asked) as events:
                final = await events.get_final_completion()
            assert final.choices[0].message.content == whole.choices[0].message.content
            async with client.chat.completions.with_streaming_response.create(**asked) as response:
                assert (await response.json())["usage"]["completion_tokens"] == whole.usage.completion_tokens
            replies = await asyncio.gather(*(client.completions.create(
                model=model, prompt="Once upon a time", max_tokens=1 + i % 5, temperature=0) for i in range(24)))
            assert [one.usage.completion_tokens for one in replies] == [1 + i % 5 for i in range(24)]

    asyncio.run(run())


def test_async_streams_and_cancelling(server: Running, model: str):
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client:
            asked = dict(model=model, prompt="Once upon a time", max_tokens=900, extra_body={"ignore_eos": True})
            stream = await client.completions.create(**asked, stream=True)
            async for _ in stream:
                break
            await stream.close()
            task = asyncio.create_task(client.completions.create(**asked))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = server.llm.stats().finished.get("cancelled", 0)
    asyncio.run(run())
    wait_until(lambda: server.llm.stats().finished.get("cancelled", 0) == before + 2)
    wait_until(lambda: server.llm.stats().kv_pages_in_use == 0)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_openapi_file_is_true(server: Running, mode: str):
    """schemathesis: whatever the description allows or forbids, no 5xx, and only answers that it describes."""
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checks = schemathesis.checks
    schemathesis.checks.load_all_checks()
    wanted = [checks.CHECKS.get_one(name) for name in (
        "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
        "negative_data_rejection")]
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "negative" and operation.method == "get":
            continue  # nothing about them can be wrong

        @hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        def check(case) -> None:
            if isinstance(case.body, dict) and mode == "positive" and case.path.startswith("/v1/"):
                case.body["max_tokens"] = 2  # a reply may take as long as the context allows
            response = case.call(headers={"authorization": "Bearer key"}, timeout=60)
            case.validate_response(response, checks=wanted)
            statuses.setdefault(case.path, set()).add(response.status_code)

        check()
    if mode == "positive":
        answered = {path for path, found in statuses.items() if 200 in found}
        assert answered >= {"/v1/completions", "/tokenize", "/", "/v1/models"}
    assert server.ask("GET", "/health")[0] == 200
    wait_until(lambda: server.llm.stats().kv_pages_in_use == 0)
