"""Responses on their way to the event loop."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dash_export.runtime.results import Response, Statistics
from dash_export.serve.answers import WAKE_SECONDS, Answer, Inbox
from dash_export.serve.running import RunningAnswers

TOKEN = Response("a", 1, np.zeros(2, np.int8), 0.0, Statistics(), None)
LAST = replace(TOKEN, finish_reason="stop")


class Recorder(Answer):
    def __init__(self) -> None:
        self.recorded, self.closed_after = 0, -1

    def record(self, *_: Any) -> None:
        self.recorded += 1

    def close(self) -> None:
        self.closed_after = self.recorded


class Later:
    """An event loop's timers, which end when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timers: list[Callable[[], None]] = []
        monkeypatch.setattr(asyncio.get_running_loop(), "call_later", self._called)

    def _called(self, seconds: float, timer: Callable[[], None]) -> None:
        assert seconds == WAKE_SECONDS
        self.timers.append(timer)

    def end(self) -> None:
        for timer in self.timers:
            timer()
        self.timers.clear()


async def woken(inbox: Inbox) -> int:
    """How many responses the loop is woken for at this moment."""
    await asyncio.sleep(0)
    return len(await inbox.get()) if inbox._ready.is_set() else 0


def test_fast_tokens_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def told() -> None:
        inbox, answer, later = Inbox(streamed=True), Recorder(), Later(monkeypatch)
        inbox.put(answer, TOKEN)
        assert await woken(inbox) == 1, "the first token never waits"
        for _ in range(3):
            inbox.put(answer, TOKEN)
            assert await woken(inbox) == 0
        later.end()
        assert await woken(inbox) == 3, "none waits for the next one"
        later.end()
        inbox.put(answer, TOKEN)
        assert await woken(inbox) == 1, "slow tokens come one by one"
        inbox.put(answer, TOKEN)
        inbox.put(answer, LAST)
        assert await woken(inbox) == 2, "nor does the last one wait"
        assert answer.recorded == 7

    asyncio.run(told())


def test_an_answer_that_is_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wake-up for all its tokens; those that came after it, whose client has left, count too."""

    async def told() -> None:
        inbox, answer, later = Inbox(streamed=False), Recorder(), Later(monkeypatch)
        nothing: Any = None
        for _ in range(3):
            inbox.put(answer, TOKEN)
            assert await woken(inbox) == 0
        inbox.put(answer, LAST)
        assert await woken(inbox) == 4
        assert not later.timers
        inbox.put(answer, TOKEN)
        RunningAnswers("tiny", nothing, [answer], inbox, nothing).close()
        assert answer.closed_after == 5

    asyncio.run(told())
