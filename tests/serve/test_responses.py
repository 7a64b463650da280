"""OpenAI's newer form, by its client."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.decode import BoundStep
from dash_export.errors import BackendError
from dash_export.serve import responses
from dash_export.serve.responses import ResponsesRequest
from dash_export.serve.tickets import MISTAKE
from tests.serve.test_app import DENSE, expected
from tests.serve.test_tools import SCHEMA, TOOL, check, with_tools  # noqa: F401  a fixture

TOOL_FLAT: Any = {"type": "function"} | TOOL["function"]
ASKED: dict[str, Any] = {"model": "tiny", "temperature": 0, "extra_body": DENSE}


def test_a_response(client: openai.OpenAI, runtime: DashRuntime) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello there"}]
    wanted = expected(runtime, 12, messages)
    reply = client.responses.create(
        input="hello there", instructions="be kind", max_output_tokens=12, metadata={"of": "me"}, **ASKED
    )
    assert reply.metadata == {"of": "me"}
    assert reply.output_text == wanted
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.usage is not None
    assert reply.usage.input_tokens == len(runtime.text.chat(messages))
    assert reply.usage.output_tokens == 12
    assert reply.usage.model_extra["dash"]["layers_per_token"] == 6.0  # type: ignore[index]
    assert reply.model_extra["dash"] == reply.usage.model_extra["dash"]  # type: ignore[index]
    pieces = [{"type": "input_text", "text": piece} for piece in ("hello ", "there")]
    parts: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": pieces}]
    assert client.responses.create(input=parts, max_output_tokens=12, **ASKED).output_text == wanted


def test_a_stream(client: openai.OpenAI, runtime: DashRuntime) -> None:
    wanted = expected(runtime, 12)
    with client.responses.stream(input="hello there", max_output_tokens=12, **ASKED) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[2:4] == ["response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.incomplete"]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == wanted
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(range(len(events)))
    last: Any = events[-1]
    assert last.response.output_text == wanted
    assert last.response.usage.output_tokens == 12


def test_a_schema(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "water", "schema": SCHEMA}}
    check(client.responses.create(model="tiny", input="x", text=form, max_output_tokens=200).output_text)


@pytest.mark.usefixtures("with_tools")
@pytest.mark.parametrize("stream", [False, True])
def test_a_call(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "input": "x", "tools": [TOOL_FLAT], "max_output_tokens": 180, "parallel_tool_calls": False,
        "tool_choice": {"type": "function", "name": "measure"},
    }  # fmt: skip
    if stream:
        with client.responses.stream(**asked) as events:
            kinds = [event.type for event in events]
            reply: Any = events.get_final_response()
        assert "response.function_call_arguments.done" in kinds
        assert "response.output_text.delta" not in kinds
    else:
        reply = client.responses.create(**asked)
    (call,) = reply.output
    assert (call.type, call.name, reply.status) == ("function_call", "measure", "completed")
    check(call.arguments)
    given: Any = [{"role": "user", "content": "x"}, call.model_dump(exclude_none=True),
                  {"type": "function_call_output", "call_id": call.call_id, "output": "12"}]  # fmt: skip
    again = client.responses.create(model="tiny", input=given, tools=[TOOL_FLAT], max_output_tokens=2)
    assert again.usage is not None
    assert reply.usage is not None
    assert again.usage.input_tokens > reply.usage.input_tokens


def test_a_turn_is_one_message() -> None:
    """Words and calls of one turn come as items of their own."""
    call = {"type": "function_call", "name": "measure", "arguments": "{}"}
    items = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Let me see."},
        call | {"call_id": "a"},
        call | {"call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "1"}]},
        call | {"call_id": "c"},
    ]
    messages = ResponsesRequest.model_validate({"input": items}).chat().messages
    assert [one.role for one in messages] == ["user", "assistant", "tool", "assistant"]
    assert [len(one.tool_calls or ()) for one in messages] == [0, 2, 0, 1]
    assert messages[1].content == "Let me see."
    assert messages[2].plain()["content"] == "1"


def test_words_after_a_call_are_streamed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'Sure. <tool_call>{"name": "f", "arguments": {}}</tool_call> I called it.'
    pieces = [text[at : at + 5] for at in range(0, len(text), 5)]

    async def merged(_: Any) -> AsyncIterator[list[tuple[int, Any]]]:
        for piece in pieces:
            yield [(0, SimpleNamespace(text=piece, finish_reason="stop" if piece is pieces[-1] else None))]

    async def told() -> list[dict[str, Any]]:
        return [json.loads(event.partition("data: ")[2]) async for event in responses._events(reply)]

    monkeypatch.setattr(responses, "answer_tokens", merged)
    monkeypatch.setattr(responses, "usage", lambda _: defaultdict(int))
    request = responses.ResponsesRequest.model_validate({"input": "x", "tools": [TOOL_FLAT]})
    answer = SimpleNamespace(text=text, finish_reason="stop")
    begun: Any = SimpleNamespace(common={"created": 1, "model": "m"}, answers=[answer])
    reply = responses._Reply(request, request.chat(), begun)
    events = asyncio.run(told())
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert said == "Sure. I called it."
    message, call = events[-1]["response"]["output"]
    assert message["content"][0]["text"] == said
    assert call["name"] == "f"
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.added"] == [0, 1]


def test_numbers_that_json_does_not_have(http: httpx.Client) -> None:
    """The answer tells the tools once more."""
    for number in ("NaN", "-Infinity", "1e999"):
        tool = f'{{"type": "function", "name": "f", "parameters": {{"x": {number}}}}}'
        body = f'{{"input": "hi", "max_output_tokens": 1, "tool_choice": "none", "tools": [{tool}]}}'
        reply = http.post("/v1/responses", content=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools.0.parameters")


def test_arguments_of_any_depth(http: httpx.Client) -> None:
    """Python's own parser goes as deep as its stack is free at that moment."""
    for depth in (*range(180, 210, 6), *range(900, 1000, 20)):
        arguments = '{"a": ' + "[" * depth + "]" * depth + "}"
        call = {"type": "function_call", "name": "f", "arguments": arguments, "call_id": "1"}
        body = {"input": [{"role": "user", "content": "x"}, call], "max_output_tokens": 1}
        assert http.post("/v1/responses", json=body).status_code in (200, 400)


def test_a_stream_that_fails(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BackendError("/secret/engine broke")

    monkeypatch.setattr(BoundStep, "decode_batch", fail)
    *_, last = client.responses.create(model="tiny", input="x", stream=True)
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert last.response.error.message == MISTAKE
