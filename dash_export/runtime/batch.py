"""Several prompts answered together: when one sequence ends, the next prompt takes its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dash_export.core.sampling import Prompt, Sampling, TokenIds
from dash_export.errors import DashError, RequestError
from dash_export.runtime.results import MAX_TOKENS, Response, Turn, answer_length
from dash_export.runtime.rows import Rows
from dash_export.runtime.session import Session

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.host.decode import EngineSet

PAUSE = 1e-3
"""Seconds to wait before a generator of prompts is asked again, where there is no other work."""


@dataclass
class Batch:
    """At most `size` sequences that decode together, made by `DashRuntime.batch()`, for one thread and one stream at a
    time. When a sequence ends, the next prompt takes its place. The session `prompts` prefills one prompt after another
    and keeps the last one's KV cache: a prefix that the next prompt shares (a system prompt) is not computed again.
    """

    engines: EngineSet | DeviceEngines
    prompts: Session
    size: int

    def __post_init__(self) -> None:
        self.rows = Rows(self.engines, self.size, self.prompts.kv_step)
        """Its sequences, their cache, and counts of steps."""
        self._stream_now: object = None

    def checked(self, prompt: Prompt, max_tokens: int | None = MAX_TOKENS) -> TokenIds:
        """Return a prompt's token ids [n]. Raises RequestError, and ContextLengthError where the prompt and
        `max_tokens` do not fit together.
        """
        ids = self.prompts.checked_ids(prompt, fresh=True)
        answer_length(len(ids), max_tokens, self.engines.model.max_positions)
        return ids

    def stream(
        self,
        prompts: Iterable[Prompt | None],
        max_tokens: int | None = MAX_TOKENS,
        sampling: Sampling | None = None,
        continues: bool = True,
    ) -> Iterator[tuple[int, Response]]:
        """Yield (index of the prompt, its next response) as tokens are decoded.

        The next prompt is taken from `prompts` whenever there is room, so `prompts` may be a generator that waits for
        requests. It should yield None when no request has come: while it blocks, all sequences wait. An exception that
        it raises ends the stream unchanged. `max_tokens` None: 256, or what the context has left. `continues`: answers
        go on with the texts of their prompts, as those of chats do not.

        A prompt that cannot be answered (see `checked`), or whose answer fails, ends alone: its last response has
        `finish_reason` "error" and the `error`. Raises BackendError where a step for all sequences fails, PolicyError
        where a policy of the user's does, and RequestError where this stream is continued after another stream of this
        batch has begun.
        """
        refuse_one_text(prompts)
        if max_tokens is not None:  # refuse a bad value once, for all prompts
            answer_length(0, max_tokens, self.engines.model.max_positions)
        this = self._stream_now = object()
        self.rows.clear()
        admit = partial(self._admit, max_tokens=max_tokens, sampling=sampling or Sampling(), continues=continues)
        return self._stream(this, iter(prompts), admit)

    def _stream(
        self, this: object, prompts: Iterator[Prompt | None], admit: Callable[[int, Prompt], Response]
    ) -> Iterator[tuple[int, Response]]:
        rows, index, more = self.rows, 0, True
        while more or rows:
            while more and len(rows) < self.size:
                try:
                    prompt = next(prompts)
                except StopIteration:
                    more = False
                    break
                if prompt is not None:
                    self._check_newest(this)  # the generator of prompts may itself have begun another stream
                    yield index, admit(index, prompt)
                    index += 1
                elif rows:
                    break
                else:
                    time.sleep(PAUSE)
            if rows:
                self._check_newest(this)
                yield from rows.advance()

    def _check_newest(self, this: object) -> None:
        if self._stream_now is not this:
            raise RequestError("Another stream of this batch has begun: make a batch for each.")

    def _admit(
        self, index: int, prompt: Prompt, max_tokens: int | None, sampling: Sampling, continues: bool
    ) -> Response:
        session = self.prompts
        try:
            ids = self.checked(prompt, max_tokens)
            max_tokens = answer_length(len(ids), max_tokens, self.engines.model.max_positions)
            turn = Turn(session.text, sampling, max_tokens, len(ids), after=int(ids[-1]) if continues else None)
            logits = session.restart(ids)
            return self.rows.begin(session, logits, turn, deepcopy(session.rules), index, max_tokens)
        except (DashError, MemoryError) as error:
            return self.rows.failed(error)


def refuse_one_text(prompts: object) -> None:
    """Raise RequestError for a text in place of a list: each letter would be answered."""
    if isinstance(prompts, str):
        raise RequestError("prompts must be a list of prompts, not one text.")
