"""Answers of a request, however its response ends."""

import asyncio
import json
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from starlette.requests import ClientDisconnect

from dash_export import DashRuntime
from dash_export.serve.app import Server
from dash_export.serve.running import RunningAnswers
from dash_export.serve.scheduler import Scheduler
from tests.text.test_tokenizer import sentence_pieces


def answers_of_pieces() -> RunningAnswers:
    tokenizer = sentence_pieces()
    text = SimpleNamespace(tokenizer=tokenizer, eos_ids=(), encode=lambda *_, **__: [0], decode=tokenizer.decode)
    return RunningAnswers("x", Mock(runtime=Mock(text=text)), [], Mock(), Mock(stop=["a"]))


def test_pieces_of_logprobs_keep_their_space() -> None:
    said = answers_of_pieces().logprobs(Mock(token=1, logprobs=[(1, -0.5), (0, -1.0)]))
    assert [entry["token"] for entry in said] == [" it", "a"]


def test_a_stop_string_has_no_logprobs() -> None:
    """Where the answer continues the prompt, its first space is its text's."""
    ticket = Mock(ids=[0], request=Mock(continues=True))
    tokens: list[Any] = [Mock(token=token, logprobs=[(token, -0.5)]) for token in (1, 1, 0)]
    said = answers_of_pieces().likelihoods(Mock(text=" it it", finish_reason="stop", ticket=ticket), tokens)
    assert [entries[0]["token"] for entries in said] == [" it", " it"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("completions", {"prompt": "hi"}),
        ("responses", {"input": "hi"}),
    ],
)
def test_a_client_that_is_gone_before_the_first_event(path: str, body: dict[str, Any], runtime: DashRuntime) -> None:
    """The connection breaks as the response's head is sent, when nothing has asked for a token yet."""
    sent = json.dumps(body | {"model": "tiny", "stream": True}).encode()
    scheduler = Scheduler(runtime, rows=1)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent, "more_body": False}

    async def send(_: Any) -> None:
        raise OSError("broken pipe")

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST", "headers": []}
    scope |= {"path": f"/v1/{path}", "query_string": b"", "http_version": "1.1", "scheme": "http"}
    with suppress(ClientDisconnect, OSError):
        asyncio.run(Server({"tiny": scheduler}).app(scope, receive, send))  # type: ignore[arg-type]
    (ticket,) = scheduler._waiting  # nobody has started it
    assert ticket.cancelled
