"""The endpoint of image encoders: /v1/embeddings with pictures as data URLs, in the forms that vLLM (`messages`) and
Infinity (`input` with `modality`) take. No URL is fetched and no file is opened.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dash_export.core.kinds import Setting
from dash_export.core.rule import Rule
from dash_export.core.units import unit_skips
from dash_export.errors import BackendError, RequestError
from dash_export.images.sources import read_image
from dash_export.runtime import DashRuntime
from dash_export.runtime.encoder import Encoded
from dash_export.runtime.rows import NO_MEMORY
from dash_export.serve.app import Endpoint
from dash_export.serve.fields import Few, Fields, refuse
from dash_export.serve.openapi import Posts
from dash_export.serve.pooled import listed_vectors
from dash_export.serve.protocol import Asked, Dash, model_and_setting
from dash_export.serve.running import left, parsed_request
from dash_export.serve.tickets import BusyServerError, DeadlineError

PICTURE_PIXELS, REQUEST_PIXELS = 1 << 24, 1 << 26
"""Most pixels of a picture, and of all in a request: 50 kB can hold so many, and reading one takes 0.7 s and 400 MB."""
PASSES = 2
"""Batches at a time: one that is computed, and one that is read meanwhile."""


def _data_url(given: Any) -> str:
    """Return a data URL. Raises ValueError for anything else: a path would be opened."""
    if not isinstance(given, str) or given[:11].lower() != "data:image/":
        raise ValueError("expected a picture as a data URL, data:image/...;base64,... (URLs are not fetched: send the "
                         "picture itself)")  # fmt: skip
    return given


def _one(given: Any) -> Any:
    if not isinstance(given, list) or len(given) != 1:
        raise ValueError("expected a list of one message with one picture and no text (several pictures: in input)")
    return given


_URL: dict[str, Any] = {"type": "string", "pattern": "^data:image/"}
_URLS = {"anyOf": [_URL, {"type": "array", "items": _URL, "minItems": 1, "maxItems": 1024}]}
_Picture = Annotated[str, BeforeValidator(_data_url), WithJsonSchema(_URL)]
_Several = BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
_Pictures = Annotated[list[_Picture], Few, Field(min_length=1), _Several, WithJsonSchema(_URLS)]


class ImageUrl(Fields):
    idle = frozenset({"detail"})
    url: _Picture


class PicturePart(Fields):
    type: Literal["image_url"]
    image_url: ImageUrl


class PictureMessage(Fields):
    role: Literal["user"]
    content: Annotated[list[PicturePart], BeforeValidator(_one)]


class PicturesRequest(Asked):
    """POST /v1/embeddings of an image encoder: pictures in `input`, or one in `messages`."""

    undone: ClassVar[dict[str, Any]] = {"dimensions": None}
    input: _Pictures | None = None
    messages: Annotated[list[PictureMessage], BeforeValidator(_one)] | None = None
    modality: Literal["image"] = "image"
    encoding_format: Literal["float", "base64"] = "float"
    dash: Dash = Field(default_factory=Dash)

    @model_validator(mode="after")
    def _either(self) -> PicturesRequest:
        if (self.input is None) == (self.messages is None):
            refuse("input", "give pictures in input, or a picture in messages, one of them")
        return self

    @property
    def pictures(self) -> list[str]:
        return self.input or [part.image_url.url for message in self.messages or () for part in message.content]


class PictureQueue:
    """Requests to one encoder. Their pictures are read and computed in batches, which take turns. One thread reads,
    another one computes: an encoder is bound by arithmetic, and takes all processors for a pass.
    """

    size = 1

    def __init__(self, runtime: DashRuntime, *, batch: int = 8, waiting: int = 64, setting: Setting | None = None):
        """`batch`: pictures of a request that are computed together; `waiting`: most requests that wait; `setting`: of
        requests that have none, by default the recommended one. Raises PolicyError, and BundleError for a causal LM.
        """
        self.runtime, self.most_waiting, self.batch = runtime, waiting, batch
        self._encoder = runtime.encoder_with(setting or runtime.recommended)
        self._processor = self._encoder.processor  # raises now, where it cannot be read
        self._reading, self._computing = ThreadPoolExecutor(1, "pictures"), ThreadPoolExecutor(1, "encoder")
        self._passes = asyncio.Semaphore(PASSES)
        self._entered, self._closing = 0, False
        self.alive, self.figures = False, Counter[str]()

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
        return self._encoder.rule if setting is None else self.runtime.encoder_with(setting).rule

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

    async def encode(self, urls: Sequence[str], rule: Rule, http: HttpRequest, until: float) -> list[Encoded]:
        """Encode the pictures of a request. Raises RequestError for one that cannot be read, DeadlineError, and
        ClientDisconnect.
        """
        found, room, loop = list[Encoded](), REQUEST_PIXELS, asyncio.get_running_loop()
        encoder = self._encoder.under(rule)
        for first in range(0, len(urls), self.batch):
            async with self._passes:
                if not self.alive or time.monotonic() > until:
                    raise DeadlineError("The time that this request had is over." if self.alive else
                                        "The server is closing.")  # fmt: skip
                if await http.is_disconnected():
                    raise ClientDisconnect
                some = urls[first : first + self.batch]
                pixels, room = await loop.run_in_executor(self._reading, self._read, some, first, room)
                found.append(await loop.run_in_executor(self._computing, encoder.encode, pixels))
        return found

    def _read(self, urls: Sequence[str], first: int, room: int) -> tuple[npt.NDArray[np.float32], int]:
        """Return prepared pictures, and what is left of `room` pixels."""
        made = np.empty((len(urls), 3, *self._processor.size), np.float32)
        try:
            for place, url in enumerate(urls):
                name = f"Picture {first + place}"
                image = read_image(url, name, PICTURE_PIXELS)
                if (room := room - image.width * image.height) < 0:
                    raise RequestError(f"Up to {name.lower()} there are over {REQUEST_PIXELS} pixels in this request: "
                                       "send fewer pictures at a time, or smaller ones.")  # fmt: skip
                made[place] = self._processor(image, name)
        except MemoryError as error:
            raise BackendError(NO_MEMORY) from error
        return made, room

    def told(self, found: Sequence[Encoded], rule: Rule) -> dict[str, Any]:
        """Return what was run for the pictures of a request; `time_of_dense` is by the build's cost table."""
        actions, cost = np.concatenate([one.actions for one in found]), self.runtime.cost
        told = {
            "layers_per_picture": round(float((actions == 0).sum(axis=1).mean()), 3),
            "guarded": int(sum(one.guarded.sum() for one in found)),
            "encode_seconds": round(sum(one.seconds for one in found), 4),
        }
        if cost.segment_us:
            times = cost.token_time(unit_skips(actions, self.runtime.bundle.manifest.policy.units), rule.asks)
            told["time_of_dense"] = round(float(times.mean()), 4)
        return told


async def picture_embeddings(server: PictureServer, http: HttpRequest) -> Response:
    """Answer with a vector of length 1 for each picture, and with what was run for it."""
    async with parsed_request(server, PicturesRequest, http) as (request, arrival):
        base, setting = model_and_setting(request.model, request.dash)
        name, queue = server.scheduler(base)
        rule, urls, seconds = queue.rule(setting), request.pictures, left(server, arrival)
        until = float("inf") if seconds is None else time.monotonic() + seconds
        with queue.entered():
            arrival.leave()  # others may be parsed meanwhile; the body still counts
            found = await queue.encode(urls, rule, http, until)
    actions, told = np.concatenate([one.actions for one in found]), queue.told(found, rule)
    server.metrics.encoded(name, time.perf_counter() - arrival.began, actions, told)
    vectors = np.concatenate([one.pooled for one in found]).astype(np.float64)
    data = listed_vectors([*(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))], request.encoding_format)
    for one, taken, guarded in zip(data, actions, np.concatenate([one.guarded for one in found]), strict=True):
        skipped = taken.nonzero()[0].tolist()
        one["dash"] = {"skipped_layers": skipped, "layers": len(taken), "guarded": bool(guarded)}
    tokens = len(urls) * queue.runtime.bundle.manifest.encoder.tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "dash": told}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage, "dash": told})


_HOLDS = ("object", "data", "model", "usage", "dash")


class PictureServer(Endpoint[PictureQueue]):
    """Server of image encoders."""

    posts: ClassVar[Posts] = {
        "/v1/embeddings": (picture_embeddings, PicturesRequest, "Read pictures into vectors.", _HOLDS)
    }
