"""The endpoint of text encoders: /v1/embeddings with texts or token ids, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from dash_export.core.facts import TextFacts
from dash_export.runtime.results import checked_tokens
from dash_export.serve.encoder_server import (
    HOLDS,
    EncoderQueue,
    EncoderServer,
    EncodingRequest,
    Group,
    encodings,
)
from dash_export.serve.openapi import Posts
from dash_export.serve.protocol import Prompts
from dash_export.text.tokenizer import of_each_length


class TextsRequest(EncodingRequest):
    """POST /v1/embeddings of a text encoder."""

    input: Prompts

    @property
    def inputs(self) -> list[str | list[int]]:
        return self.input


class TextQueue(EncoderQueue):
    """Requests to one text encoder."""

    def groups(self, inputs: Sequence[str | list[int]]) -> Iterator[Group]:
        """Yield the token ids of texts; those of one length together. Raises RequestError and ContextLengthError,
        before the first is computed.
        """
        ids = [self._ids(one, f"Text {place}") for place, one in enumerate(inputs)]
        for places, group in of_each_length(ids):
            for first in range(0, len(places), self.batch):
                some = slice(first, first + self.batch)
                yield places[some].tolist(), group[some], [{}] * len(group[some])

    def _ids(self, given: str | list[int], name: str) -> list[int]:
        if isinstance(given, str):
            found: list[int] = self.processor.ids(given, name)
            return found
        self.processor.check_length(len(given), name)
        model = self.encoder.engines.model
        assert isinstance(model, TextFacts)
        checked_tokens(given, model.vocab_size)
        return given


class TextServer(EncoderServer):
    """Server of text encoders."""

    posts: ClassVar[Posts] = {"/v1/embeddings": (encodings, TextsRequest, "Read texts into vectors.", HOLDS)}
