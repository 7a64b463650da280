"""Chats and completions beside `test_app.py`: what their answers say, and when their time begins."""

import time
from typing import Any

import httpx
import openai
import pytest

from dash_export.runtime.text import Text
from tests.serve.conftest import Serve
from tests.serve.test_app import DENSE, GREEDY, MESSAGES


def test_usage_says_what_was_known(client: openai.OpenAI) -> None:
    """Whole tiles of 16 tokens of an earlier prompt are not computed again, in any form of the API."""
    asked: dict[str, Any] = {"prompt": [*range(90, 30, -1)], "max_tokens": 2, "extra_body": DENSE} | GREEDY
    for known in (0, 48):
        usage = client.completions.create(**asked).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == known
    said = [
        client.responses.create(input="so it goes, " * 6, model="tiny", max_output_tokens=2, extra_body=DENSE).usage
        for _ in range(2)
    ]
    cached, tokens = said[1].input_tokens_details.cached_tokens, said[1].input_tokens  # type: ignore[union-attr]
    assert said[0].input_tokens_details.cached_tokens < cached == (tokens - 1) // 16 * 16  # type: ignore[union-attr]


def test_logprobs_are_of_the_answer(client: openai.OpenAI) -> None:
    """Not of the stop string after it."""
    asked: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 12, "logprobs": True, "extra_body": DENSE} | GREEDY

    def said(**more: Any) -> tuple[list[str], str]:
        (choice,) = client.chat.completions.create(**asked, **more).choices
        assert choice.logprobs is not None
        return [entry.token for entry in choice.logprobs.content or []], choice.message.content or ""

    pieces, text = said()
    place = next(at for at, piece in enumerate(pieces) if at and piece.isascii() and piece not in pieces[:at])
    assert said(stop=[pieces[place]]) == (pieces[:place], text[: text.index(pieces[place])])


@pytest.mark.parametrize(
    ("path", "field", "names"),
    [
        (
            "chat/completions",
            "messages",
            ("n", "stream", "logprobs", "parallel_tool_calls", "tools", "tool_choice", "dash"),
        ),
        ("completions", "prompt", ("n", "stream", "best_of", "echo", "stream_options", "dash")),
        ("responses", "input", ("stream", "parallel_tool_calls", "background", "top_logprobs", "text", "dash")),
    ],
)
def test_null_is_nothing(path: str, field: str, names: tuple[str, ...], http: httpx.Client) -> None:
    """As some clients send what they leave open. What is too long is in the field that has the prompt."""
    limit = {"max_output_tokens" if path == "responses" else "max_tokens": 3}
    for prompt, status in (("x", 200), ("x" * 600, 400)):
        given = [{"role": "user", "content": prompt}] if field == "messages" else prompt
        reply = http.post(f"/v1/{path}", json=dict.fromkeys(names) | limit | {field: given})
        assert reply.status_code == status, reply.text
    assert reply.json()["error"]["param"] == field


def test_a_limit_that_is_null_is_the_default(http: httpx.Client) -> None:
    body = {"prompt": "hello", "max_tokens": None, "temperature": 0} | DENSE
    assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("path", "body", "field", "why"),
    [
        ("completions", {"prompt": "x", "stop": 5}, "stop", "valid string; or Input should be a valid array"),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": 5}, "tool_choice", "Input should be 'none', 'auto'"),
        ("responses", {"input": [*MESSAGES, {"type": "reasoning"}]}, "input.1.type", "Input should be 'message'"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role", "Field required"),
    ],
)
def test_the_wrong_field_is_named(path: str, body: dict[str, Any], field: str, why: str, http: httpx.Client) -> None:
    """As it is in the body, without the kinds that it may have."""
    said = http.post(f"/v1/{path}", json=body).json()["error"]
    assert said["param"] == field
    assert said["message"].startswith(f"{field}: ")
    assert why in said["message"]


def test_time_begins_as_a_request_comes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is encoded within its deadline."""
    sound, address, body = Text.encode, serve(deadline=0.5), {"prompt": "hello", "max_tokens": 2}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200
    monkeypatch.setattr(Text, "encode", lambda *given, **more: (time.sleep(0.6), sound(*given, **more))[1])
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 504
