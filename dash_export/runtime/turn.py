"""One answer in the making: logits in, responses out, until something ends it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dash_export.errors import RequestError
from dash_export.runtime.results import Response, Statistics
from dash_export.runtime.sampling import Logits, Sampler, Sampling
from dash_export.runtime.text import Text, TextStream

MAX_TOKENS = 256
"""How many tokens an answer has at most where nobody says it."""


def room(max_tokens: int | None, free: int) -> int:
    """`max_tokens`; or, for None, as many as MAX_TOKENS and the `free` positions of the context allow. What does not
    fit at all is left to whoever checks it. Raises RequestError where it is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"max_tokens must be at least 1, not {max_tokens}.")
    return max(1, min(MAX_TOKENS, free)) if max_tokens is None else max_tokens


class Turn:
    """The sampler, the text and the figures of one answer of up to `max_tokens` tokens; its clock starts now."""

    def __init__(self, text: Text, sampling: Sampling, max_tokens: int, prompt_tokens: int) -> None:
        self._text, self._max_tokens = text, max_tokens
        self._sampler, self._stream = Sampler(sampling), TextStream(text.tokenizer, sampling.stop)
        self.statistics = Statistics(prompt_tokens=prompt_tokens)
        self.begin()

    def begin(self) -> None:
        """A step starts: its time is counted from here."""
        self._began = time.perf_counter()

    def respond(
        self, logits: Logits, context: Sequence[int], actions: npt.NDArray[np.int8], cancelled: bool = False
    ) -> Response:
        """The next token, from the logits [vocab] that a step with `actions` [layers] gave, and the tokens so far."""
        token = self._sampler(logits, context)
        piece = self._stream.push(token)
        seconds = time.perf_counter() - self._began
        if self.statistics.tokens:
            self.statistics = replace(
                self.statistics,
                decode_steps=self.statistics.decode_steps + 1,
                layers=self.statistics.layers + len(actions) - int(actions.sum()),
            )
        self.statistics = self.statistics.counted(seconds)
        reason = None
        if token in self._text.eos_ids or self._stream.stopped:
            reason = "stop"
        elif self.statistics.tokens == self._max_tokens:
            reason = "length"
        elif cancelled:
            reason = "cancelled"
        if reason is not None and not self._stream.stopped:
            piece += self._stream.finish()
        return Response(piece, token, actions, seconds, self.statistics, reason)
