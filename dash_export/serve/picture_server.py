"""The endpoint of image encoders: /v1/embeddings with pictures as data URLs, in the forms that vLLM (`messages`) and
Infinity (`input` with `modality`) take. No URL is fetched and no file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from dash_export.errors import RequestError
from dash_export.images.sources import read_image
from dash_export.serve.app import PAGE_PARTS
from dash_export.serve.encoder_server import (
    HOLDS,
    EncoderQueue,
    EncoderServer,
    EncodingRequest,
    Facts,
    Group,
    encodings,
)
from dash_export.serve.fields import Few, Fields, refuse
from dash_export.serve.openapi import Posts

PICTURE_PIXELS, REQUEST_PIXELS = 1 << 24, 1 << 26
"""Most pixels of a picture, and of all in a request: 50 kB can hold so many, and reading one takes 0.7 s and 400 MB."""


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


class PicturesRequest(EncodingRequest):
    """POST /v1/embeddings of an image encoder: pictures in `input`, or one in `messages`."""

    input: _Pictures | None = None
    messages: Annotated[list[PictureMessage], BeforeValidator(_one)] | None = None
    modality: Literal["image"] = "image"

    @model_validator(mode="after")
    def _either(self) -> PicturesRequest:
        if (self.input is None) == (self.messages is None):
            refuse("input", "give pictures in input, or a picture in messages, one of them")
        return self

    @property
    def inputs(self) -> list[str]:
        return self.input or [part.image_url.url for message in self.messages or () for part in message.content]


class PictureQueue(EncoderQueue):
    """Requests to one image encoder."""

    def groups(self, inputs: Sequence[str]) -> Iterator[Group]:
        """Yield the pictures of data URLs. Raises RequestError for one that cannot be read, and over REQUEST_PIXELS."""
        room, model = REQUEST_PIXELS, self.encoder.engines.model
        patches = [side // model.patch_size for side in model.image_size]
        for first in range(0, len(inputs), self.batch):
            places = range(first, min(first + self.batch, len(inputs)))
            made, facts = np.empty((len(places), 3, *self.processor.size), np.float32), list[Facts]()
            for row, place in zip(made, places, strict=True):
                name = f"Picture {place}"
                image = read_image(inputs[place], name, PICTURE_PIXELS)
                if (room := room - image.width * image.height) < 0:
                    raise RequestError(f"Up to {name.lower()} there are over {REQUEST_PIXELS} pixels in this request: "
                                       "send fewer pictures at a time, or smaller ones.")  # fmt: skip
                row[...] = self.processor(image, name)
                seen = [round(one, 4) for one in self.processor.seen(image.width, image.height)]
                facts.append({"patches": patches, "seen": seen})
            yield places, made, facts


class PictureServer(EncoderServer):
    """Server of image encoders."""

    page: ClassVar[Mapping[str, str]] = {"/": "picture_page.html", "/picture_page.js": "picture_page.js", **PAGE_PARTS}
    posts: ClassVar[Posts] = {"/v1/embeddings": (encodings, PicturesRequest, "Read pictures into vectors.", HOLDS)}
