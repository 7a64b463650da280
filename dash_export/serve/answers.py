"""One answer on its way to a client: the scheduler's responses on the event loop, and the usage that sums them up."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.core.units import unit_skips
from dash_export.runtime import DashRuntime
from dash_export.runtime.results import Response, Statistics
from dash_export.serve.scheduler import Scheduler
from dash_export.serve.tickets import Request
from dash_export.text.guidance import Guide

WAKE_SECONDS = 0.04
"""How long the event loop rests after tokens of a stream: those that come meanwhile are sent together, 25 times a
second. A wake-up takes 0.3 ms of the processors that decode.
"""


class Inbox:
    """Responses to one request, on their way from the scheduler's thread to the event loop."""

    def __init__(self, streamed: bool) -> None:
        """`streamed`: responses are wanted as they come; else the loop is woken only as answers end."""
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._streamed, self._rests = streamed, not streamed
        self._came = deque[tuple["Answer", Response, float]]()

    def put(self, answer: Answer, response: Response) -> None:
        """Add a response; from any thread."""
        self._came.append((answer, response, time.perf_counter()))
        if response.finish_reason is not None or not self._rests:
            with suppress(RuntimeError):  # the event loop is closed: nobody reads this
                self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self) -> list[tuple[Answer, Response]]:
        """Return the responses that came since the last call."""
        await self._ready.wait()
        self._ready.clear()
        if self._streamed:
            self._rests = True
            self._loop.call_later(WAKE_SECONDS, self._go_on)
        return self.drain()

    def drain(self) -> list[tuple[Answer, Response]]:
        """Record what has come with the answers, and return it."""
        came = [self._came.popleft() for _ in range(len(self._came))]
        for answer, response, seconds in came:
            answer.record(response, seconds)
        return [(answer, response) for answer, response, _ in came]

    def _go_on(self) -> None:
        self._rests = False  # first: what comes from now on wakes the loop itself
        if self._came:
            self._ready.set()


class Answer:
    """One choice of one request. `ended` is called by `close`: after the last token, on an error or early."""

    def __init__(
        self,
        scheduler: Scheduler,
        request: Request,
        inbox: Inbox,
        guide: Guide | None,
        ended: Callable[[Answer], None],
        began: float,
    ) -> None:
        """Submit the request, which came at `began` of `time.perf_counter`. Raises what `Scheduler.submit` raises."""
        self.scheduler, self._ended = scheduler, ended
        self.text, self.finish_reason, self.error_type, self.statistics = "", "", "", Statistics()
        self.actions = list[Any]()
        """Skip map of the decoded tokens. The first token is not in it: it comes from the prefill."""
        self.began = self.first = self.last = began
        self.ticket = scheduler.submit(request, partial(inbox.put, self), guide)

    def record(self, response: Response, seconds: float) -> None:
        """Add a response, which came at `seconds` of `time.perf_counter`."""
        self.statistics, self.last = response.statistics, seconds
        if response.error is not None:
            self.error_type = type(response.error).__name__
            return
        if response.statistics.tokens == 1:
            self.first = seconds
        elif response.statistics.tokens > 1:
            self.actions.append(response.actions)
        self.text += response.text
        self.finish_reason = response.finish_reason or ""

    def close(self) -> None:
        """Cancel what is left of the answer."""
        if not self.finish_reason and not self.error_type:
            self.error_type, self.last = "cancelled", time.perf_counter()
        self.scheduler.cancel(self.ticket)
        self._ended(self)


def usage(answers: Sequence[Answer], each: int = 1) -> dict[str, Any]:
    """Return OpenAI's usage of answers, `each` to a prompt, which counts once, and in `dash` what was skipped."""
    prompt = sum(answer.statistics.prompt_tokens for answer in answers[::each])
    known = sum(answer.ticket.known for answer in answers[::each])
    tokens = sum(answer.statistics.tokens for answer in answers)
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    return counts | {"prompt_tokens_details": {"cached_tokens": known}, "dash": dash(answers)}


def dash(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return layers and times of the answers; `time_of_dense` is a fraction of dense by the build's cost table. What is
    of decoded tokens is left out where there are none: the first token of an answer comes from its prompt.
    """
    runtime, said = answers[0].scheduler.runtime, [answer.statistics for answer in answers]
    steps = sum(each.decode_steps for each in said)
    # On the clock: answers wait for each other, and for prompts of others.
    seconds = max(answer.last for answer in answers) - min(answer.first for answer in answers)
    told: dict[str, Any] = {"prefill_seconds": round(max(each.prefill_seconds for each in said), 4)}
    if steps and seconds:
        told["layers_per_token"] = round(sum(each.layers for each in said) / steps, 3)
        told["tokens_per_second"] = round(steps / seconds, 2)
    times = [_times(runtime, answer) for answer in answers if answer.actions]
    if times and runtime.cost.segment_us:
        told["time_of_dense"] = round(float(np.concatenate(times).mean()), 4)
    return told


def _times(runtime: DashRuntime, answer: Answer) -> npt.NDArray[np.float64]:
    skips = unit_skips(np.array(answer.actions), runtime.bundle.manifest.policy.units)
    rules = answer.ticket.alone
    return runtime.cost.token_time(skips, asked=rules is not None and rules.calibrated.asks)
