"""The common part of encoders' endpoints: a queue whose batches take turns, and /v1/embeddings over it, in OpenAI's
form. Those of pictures and of texts are in picture_server.py and text_server.py.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dash_export.core.kinds import Setting
from dash_export.core.rule import Rule
from dash_export.core.units import unit_skips
from dash_export.errors import BackendError
from dash_export.runtime import DashRuntime
from dash_export.runtime.encoder import Encoded, in_order
from dash_export.runtime.rows import NO_MEMORY
from dash_export.serve.app import Endpoint
from dash_export.serve.pooled import listed_vectors
from dash_export.serve.protocol import Asked, Dash, model_and_setting
from dash_export.serve.running import left, parsed_request
from dash_export.serve.tickets import BusyServerError, DeadlineError

PASSES = 2
"""Batches at a time: one that is computed, and one that is read meanwhile."""
HOLDS = ("object", "data", "model", "usage", "dash")
"""Fields that an answer always has."""
Facts = dict[str, Any]
Group = tuple[Sequence[int], npt.NDArray[Any], Sequence[Facts]]
"""Places of some of a request's inputs, these as the encoder takes them, and what is told about each."""
MOST_CLASSES = 5
"""Classes that are told of an input, the most probable ones."""


class EncodingRequest(Asked):
    """POST /v1/embeddings of an encoder. Who inherits has the field of the inputs, and gives them."""

    undone: ClassVar[dict[str, Any]] = {"dimensions": None}
    encoding_format: Literal["float", "base64"] = "float"
    dash: Dash = Field(default_factory=Dash)

    @property
    @abstractmethod
    def inputs(self) -> Sequence[Any]:
        """Pictures or texts, one at least."""


class EncoderQueue(ABC):
    """Requests to one encoder. Their inputs are read and computed in batches, which take turns. One thread reads,
    another one computes: an encoder is bound by arithmetic, and takes all processors for a pass.
    """

    size = 1

    def __init__(self, runtime: DashRuntime, *, batch: int = 8, waiting: int = 64, setting: Setting | None = None):
        """`batch`: inputs of a request that are computed together; `waiting`: most requests that wait; `setting`: of
        requests that have none, by default the recommended one. Raises PolicyError, and BundleError for a causal LM.
        """
        self.runtime, self.most_waiting, self.batch = runtime, waiting, batch
        self.encoder = runtime.encoder_with(setting or runtime.recommended)
        self.takes = self.encoder.engines.model.takes
        self.processor = self.encoder.processor  # raises now, where it cannot be read
        self._reading, self._computing = ThreadPoolExecutor(1, "reading"), ThreadPoolExecutor(1, "encoder")
        self._passes = asyncio.Semaphore(PASSES)
        self._entered, self._closing = 0, False
        self.alive, self.figures = False, Counter[str]()

    @abstractmethod
    def groups(self, inputs: Sequence[Any]) -> Iterator[Group]:
        """Yield the inputs of a request, prepared, at most `batch` at a time. Raises RequestError for one that cannot
        be read.
        """

    def start(self) -> None:
        self.alive = True

    @property
    def running(self) -> int:
        return min(self.size, self._entered)

    @property
    def waiting(self) -> int:
        return self._entered - self.running

    def close(self, seconds: float = 0.0) -> bool:
        """Take no more requests, wait `seconds` for those under way, then fail the rest. Return whether none had to."""
        self._closing = True
        until = time.monotonic() + seconds
        while self._entered and time.monotonic() < until:
            time.sleep(0.02)
        self.alive = False
        return not self._entered

    def rule(self, setting: Setting | None) -> Rule:
        """Return the rule of a request. Raises PolicyError."""
        return self.encoder.rule if setting is None else self.runtime.encoder_with(setting).rule

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count a request until its answer ends. Raises BusyServerError."""
        if self._closing or self._entered >= self.size + self.most_waiting:
            self.figures["refused"] += 1
            why = "is closing" if self._closing else f"has {self.most_waiting} requests waiting"
            raise BusyServerError(f"The server {why}: ask again later.")
        self.figures["requests"] += 1
        self._entered += 1
        ended = "failed"
        try:
            yield
            ended = "finished"
        except (ClientDisconnect, asyncio.CancelledError):
            ended = "cancelled"
            raise
        finally:
            self.figures[ended] += 1
            self._entered -= 1

    async def encode(
        self, inputs: Sequence[Any], rule: Rule, http: HttpRequest, until: float
    ) -> tuple[Encoded, int, list[Facts]]:
        """Return the results of a request's inputs, how many tokens these were, and what is told about each. `until`:
        in seconds of `time.monotonic`. Raises RequestError for an input that cannot be read, DeadlineError, and
        ClientDisconnect.
        """
        places, found, tokens, loop = list[Any](), list[Encoded](), 0, asyncio.get_running_loop()
        encoder, groups, facts = self.encoder.under(rule), self.groups(inputs), dict[int, Facts]()
        while len(facts) < len(inputs):
            async with self._passes:
                if not self.alive or time.monotonic() > until:
                    raise DeadlineError("The time that this request had is over." if self.alive else
                                        "The server is closing.")  # fmt: skip
                if await http.is_disconnected():
                    raise ClientDisconnect
                some, array, about = await loop.run_in_executor(self._reading, _read, groups)
                found.append(await loop.run_in_executor(self._computing, encoder.encode, array))
            places.append(some)
            facts.update(zip(some, about, strict=True))
            tokens += len(array) * encoder.engines.model.length(array)
        return in_order(places, found), tokens, [facts[place] for place in range(len(inputs))]

    def told(self, found: Encoded, rule: Rule) -> dict[str, Any]:
        """Return what was run for the inputs of a request; `time_of_dense` is by the build's cost table."""
        cost, policy = self.runtime.cost, self.runtime.bundle.manifest.policy
        told = {
            f"layers_per_{self.takes[:-1]}": round(float((found.actions == 0).sum(1).mean()), 3),
            "guarded": int(found.guarded.sum()),
            "encode_seconds": round(found.seconds, 4),
        }
        if cost.segment_us:
            times = cost.token_time(unit_skips(found.actions, policy.units), rule.asks)
            told["time_of_dense"] = round(float(times.mean()), 4)
        return told


def _read(groups: Iterator[Group]) -> Group:
    try:
        return next(groups)
    except MemoryError as error:
        raise BackendError(NO_MEMORY) from error


def _each(found: Encoded) -> Iterator[Facts]:
    """Yield what was run for each input, and its most probable classes where the model has some."""
    for place, taken in enumerate(found.actions):
        told = {"skipped_layers": taken.nonzero()[0].tolist(), "layers": len(taken)}
        told["guarded"] = bool(found.guarded[place])
        if found.probabilities is not None:
            each = found.probabilities[place]
            told["classes"] = [
                {"name": found.classes[one], "probability": round(float(each[one]), 6)}
                for one in np.argsort(-each, kind="stable")[:MOST_CLASSES].tolist()
            ]
        yield told


async def encodings(server: EncoderServer, http: HttpRequest) -> Response:
    """Answer with a vector of length 1 for each picture or text, and with what was run for it."""
    async with parsed_request(server, server.posts[http.url.path][1], http) as (request, arrival):
        assert isinstance(request, EncodingRequest)
        base, setting = model_and_setting(request.model, request.dash)
        name, queue = server.scheduler(base)
        rule, inputs, seconds = queue.rule(setting), request.inputs, left(server, arrival)
        until = float("inf") if seconds is None else time.monotonic() + seconds
        with queue.entered():
            arrival.leave()  # others may be parsed meanwhile; the body still counts
            found, tokens, facts = await queue.encode(inputs, rule, http, until)
    told = queue.told(found, rule)
    server.metrics.encoded(name, queue.takes, time.perf_counter() - arrival.began, found.actions, told)
    data = listed_vectors([*found.pooled], request.encoding_format)
    for one, about, each in zip(data, facts, _each(found), strict=True):
        one["dash"] = each | about
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "dash": told}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage, "dash": told})


class EncoderServer(Endpoint[EncoderQueue]):
    """Server of encoders, all of pictures or all of texts."""
