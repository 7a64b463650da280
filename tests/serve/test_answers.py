"""Responses on their way to the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dash_export.runtime.results import Response, Statistics
from dash_export.serve import answers
from dash_export.serve.answers import WAKE_SECONDS, Answer, Inbox

TOKEN = Response("a", 1, np.zeros(2, np.int8), 0.0, Statistics(), None)


class Recorder(Answer):
    def __init__(self) -> None:
        self.seconds = list[float]()

    def record(self, _: Response, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.mark.parametrize(
    ("streamed", "groups"),
    [(True, [[0.0], [0.4, 0.7, 1.0], [1.4, 1.5]]), (False, [[0.0, 0.4, 0.7, 1.0, 1.4, 1.5]])],
)
def test_fast_tokens_come_together(streamed: bool, groups: list[list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are multiples of WAKE_SECONDS. The first streamed token and the last one, at 1.5, never wait."""

    async def told() -> list[list[float]]:
        inbox, answer, found = Inbox(streamed), Recorder(), list[list[float]]()
        for time in (0.0, 0.4, 0.7, 1.0, 1.4, 1.5):
            clock: Any = type("Clock", (), {"perf_counter": lambda time=time: time * WAKE_SECONDS})
            monkeypatch.setattr(answers, "time", clock)
            inbox.put(answer, replace(TOKEN, finish_reason="stop" if time == 1.5 else None))
            await asyncio.sleep(0)
            if inbox._ready.is_set():
                assert len(await inbox.get()) == len(answer.seconds)
                found.append([round(seconds / WAKE_SECONDS, 3) for seconds in answer.seconds])
                answer.seconds.clear()
        return found

    assert asyncio.run(told()) == groups
