"""Requests in a scheduler: their data, and their state on the way to an answer."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dash_export.core.kinds import SessionRules, Setting
from dash_export.core.sampling import Prompt, Sampling, TokenIds
from dash_export.errors import RequestError
from dash_export.runtime import DashRuntime
from dash_export.runtime.results import Response, Turn
from dash_export.text.guidance import Guide

GUIDED = 16
"""Most answers with a grammar at a time: each may hold 24 MB from its request on, and 60 MB later."""
MISTAKE = "The server made a mistake: its log says more."


class BusyServerError(RequestError):
    """The queue is full, or the server is closing: ask again later."""


class DeadlineError(RequestError):
    """The request's deadline passed before its answer ended."""


class Queue(Protocol):
    """Requests to one bundle, as a server sees them: `Scheduler` of a causal LM, `EncoderQueue` of an encoder."""

    runtime: DashRuntime
    size: int
    most_waiting: int
    figures: Counter[str]

    @property
    def alive(self) -> bool: ...

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    def start(self) -> None: ...

    def close(self, seconds: float = 0.0) -> bool: ...


@dataclass(frozen=True)
class Reading:
    """Results wanted of a prompt itself, which is always dense. `logprobs`: the log-likelihood of each of its tokens
    and of so many of the most likely ones; `pooling`: its final states, of the last token or their mean. `only`: no
    answer (the room of one token is asked for all the same).
    """

    logprobs: int | None = None
    pooling: Literal["last", "mean"] | None = None
    only: bool = False


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it. `max_tokens` None: as many as there is room for. `setting` None: the scheduler
    chooses one at every step. `deadline`: seconds from `submit` on. `continues`: the answer goes on with the prompt's
    text, as that of a chat does not.
    """

    prompt: Prompt
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    setting: Setting | None = None
    deadline: float | None = None
    continues: bool = True
    reading: Reading | None = None


@dataclass(eq=False)
class Ticket:
    """A submitted request. The scheduler's thread calls `tell` with every response; the last has a `finish_reason`."""

    request: Request
    ids: TokenIds
    max_tokens: int
    rules: SessionRules | None
    tell: Callable[[Response], None]
    until: float
    guide: Guide | None = None
    cancelled: bool = False
    turn: Turn | None = None
    alone: SessionRules | None = None
    """Rules for steps in which this is the only row, where its request has no setting."""
    known: int = 0
    """Tokens of the prompt that were not computed again."""
    likely: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """For each token of the prompt but the first, where wanted: (token, nats) of it and of the most likely ones."""
    state: Any = 0.0
    """The pooled state float32 [hidden], where wanted."""

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until
