"""Answers of a request, however its response ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
from starlette.requests import ClientDisconnect

from dash_export import DashRuntime
from dash_export.runtime.results import Response, Statistics
from dash_export.serve.answers import Answer, Inbox
from dash_export.serve.app import Server
from dash_export.serve.running import RunningAnswers
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Ticket


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_a_client_that_is_gone_before_the_first_event(path: str, tiny_runtime: Callable[..., DashRuntime]) -> None:
    """The connection breaks as the response's head is sent, when nothing has asked for a token yet."""
    body = (
        {"input": "hi"}
        if path == "responses"
        else {"messages": [{"role": "user", "content": "hi"}]}
        if "chat" in path
        else {"prompt": "hi"}
    )
    sent = json.dumps(body | {"model": "tiny", "stream": True}).encode()
    submitted: list[Ticket] = []
    scheduler = Scheduler(tiny_runtime(), rows=1)
    server = Server({"tiny": scheduler})
    sound = scheduler.submit

    def submit(*arguments: Any) -> Ticket:
        submitted.append(sound(*arguments))
        return submitted[-1]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": sent, "more_body": False}

    async def send(_: Any) -> None:
        raise OSError("broken pipe")

    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST", "headers": []}
    scope |= {"path": f"/v1/{path}", "query_string": b"", "http_version": "1.1", "scheme": "http"}
    with patch.object(scheduler, "submit", submit), suppress(ClientDisconnect, OSError):
        asyncio.run(server.app(scope, receive, send))  # type: ignore[arg-type]
    (ticket,) = submitted
    assert ticket.cancelled


def test_tokens_that_nobody_waits_for_are_counted() -> None:
    """A client leaves before the loop is woken for what has been decoded."""
    done: list[str] = []

    class Recorder(Answer):
        def __init__(self) -> None:
            pass

        def record(self, response: Response, _: float) -> None:
            done.append(response.text)

        def close(self) -> None:
            done.append("closed")

    async def left() -> None:
        inbox, answer = Inbox(streamed=False), Recorder()
        running = RunningAnswers("tiny", cast(Any, None), [answer], inbox, cast(Any, None))
        inbox.put(answer, Response("a", 1, np.zeros(2, np.int8), 0.0, Statistics()))
        running.close()

    asyncio.run(left())
    assert done == ["a", "closed"]
