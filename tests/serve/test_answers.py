"""Responses on their way to the event loop."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export.runtime.results import Response, Statistics
from dash_export.serve.answers import WAKE_SECONDS, Inbox
from dash_export.serve.running import RunningAnswers

TOKEN = Response("a", 1, np.zeros(2, np.int8), 0.0, Statistics(), None)
LAST = replace(TOKEN, finish_reason="stop")


async def woken(inbox: Inbox, answer: Mock, *responses: Response) -> int:
    """For how many responses the loop is woken when these have come."""
    for response in responses:
        inbox.put(answer, response)
    await asyncio.sleep(0)
    return len(await inbox.get()) if inbox._ready.is_set() else 0


def test_fast_tokens_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    timers = list[Callable[[], None]]()

    def later(seconds: float, timer: Callable[[], None]) -> None:
        assert seconds == WAKE_SECONDS
        timers.append(timer)

    async def told() -> None:
        inbox, answer = Inbox(streamed=True), Mock()
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", later)
        assert await woken(inbox, answer, TOKEN) == 1, "the first token never waits"
        assert [await woken(inbox, answer, TOKEN) for _ in range(3)] == [0] * 3
        timers.pop()()
        assert await woken(inbox, answer) == 3, "none waits for the next one"
        timers.pop()()
        assert await woken(inbox, answer, TOKEN) == 1, "slow tokens come one by one"
        assert await woken(inbox, answer, TOKEN, LAST) == 2, "nor does the last one wait"
        assert answer.record.call_count == 7

    asyncio.run(told())


def test_an_answer_that_is_not_streamed() -> None:
    """One wake-up for all its tokens; those that came after it, whose client has left, count too."""

    async def told() -> None:
        inbox, answer, nothing = Inbox(streamed=False), Mock(), Mock()
        assert [await woken(inbox, answer, TOKEN) for _ in range(3)] == [0] * 3
        assert await woken(inbox, answer, LAST) == 4
        inbox.put(answer, TOKEN)
        answers: Any = [answer]
        RunningAnswers("tiny", nothing, answers, inbox, nothing).close()
        assert [call[0] for call in answer.method_calls] == ["record"] * 5 + ["close"]

    asyncio.run(told())
