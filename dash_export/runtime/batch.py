"""Several sequences decoded together: a step reads the weights once for all of them.

Each sequence has its own cache rows, rules, sampling and end, and gets what it would get alone (nearly, where prompts
go through an engine of their own: what one shares with that before it is not computed again). A unit runs when any
sequence runs it, and each takes its own result, so skipping saves less the more decode together: where every one skips
a unit with probability p, p^n of its runs are saved.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from dash_export.arguments import Prompt, check_arguments
from dash_export.decision import DENSE_POSITIONS, layer_actions
from dash_export.errors import ContextLengthError, DashError, RequestError
from dash_export.runtime.decode import BoundStep
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.results import Counters, Response, Statistics, TokenIds
from dash_export.runtime.rules import DENSE, SessionRules
from dash_export.runtime.sampling import Sampling
from dash_export.runtime.session import Session
from dash_export.runtime.turn import MAX_TOKENS, Turn, room

_END = object()
MAX_SIZE = 1024
PAUSE = 1e-3
"""Seconds until a generator of prompts is asked again, where nothing else is to be done."""


@dataclass
class Row:
    """One sequence on its way: row i of the batch's cache is its own."""

    index: int
    turn: Turn
    rules: SessionRules
    tokens: list[int]
    token: int


@dataclass
class Batch:
    """Made by `DashRuntime.batch()`: at most `size` sequences at a time; the next prompt takes the place of one that
    ended. It belongs to one thread and serves one stream at a time.

    Prompts are prefilled one by one, in `prompts`, a session that keeps the last one: what the next has in common with
    it (a system prompt) is not computed again.
    """

    engines: EngineSet
    prompts: Session
    size: int
    counters: Counters = field(default_factory=Counters)
    """Of the steps for all sequences together: `layers_run` counts a layer that ran for any of them."""

    def __post_init__(self) -> None:
        self._cache = self.engines.cache(self.prompts.kv_step, self.size)
        self._steps: dict[int, BoundStep] = {}
        self._cancelled: set[int] = set()
        self._stream_now: object = None

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes + self.prompts.cache_bytes

    @check_arguments
    def cancel(self, index: int) -> None:
        """End the answer to that prompt with its next token; safe to call from another thread."""
        self._cancelled.add(index)

    @check_arguments
    def checked(self, prompt: Prompt, max_tokens: int | None = MAX_TOKENS) -> TokenIds:
        """A prompt's token ids. Raises RequestError where it is none, and ContextLengthError where it and `max_tokens`
        do not fit the context.
        """
        text, limit = self.prompts.text, self.engines.model.max_positions
        ids = self.prompts.checked_ids(text.encode(prompt, limit=limit) if isinstance(prompt, str) else prompt)
        more = room(max_tokens, limit - len(ids))
        if len(ids) + more > limit:
            raise ContextLengthError(
                f"The context does not hold this: {len(ids)} prompt tokens and {more} new ones, but the model has "
                f"{limit} positions. Shorten the prompt or ask for fewer tokens."
            )
        return ids

    @check_arguments
    def stream(
        self,
        prompts: Iterable[Prompt | None],
        max_tokens: int | None = MAX_TOKENS,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, Response]]:
        """(index of the prompt, its next response), as they come.

        `prompts` is asked whenever there is room, so it may be a generator that takes them from somewhere. While it
        waits the sequences under way wait too: let it yield None when nothing has come (when none is under way it is
        asked again after a millisecond). What it raises ends the stream as it is. `max_tokens` None: 256, or what the
        context has left.

        A prompt that cannot be answered (see `checked`), or whose answer fails, ends alone: its last response has
        `finish_reason` "error" and the `error`. Raises BackendError where a step for all of them fails, and
        RequestError for arguments, or in a stream that goes on after another one of this batch has begun.
        """
        room(max_tokens, 1)  # refused for all prompts at once
        this = self._stream_now = object()
        self._cancelled.clear()
        return self._alone(this, self._stream(prompts, max_tokens, sampling or Sampling()))

    def _alone(self, this: object, stream: Iterator[tuple[int, Response]]) -> Iterator[tuple[int, Response]]:
        for item in stream:
            yield item
            if self._stream_now is not this:
                raise RequestError("Another stream of this batch has begun: make a batch for each.")

    def _stream(
        self, prompts: Iterable[Prompt | None], max_tokens: int | None, sampling: Sampling
    ) -> Iterator[tuple[int, Response]]:
        waiting = iter(prompts)
        index = 0
        rows: list[Row] = []
        while True:
            while len(rows) < self.size:
                following = next(waiting, _END)
                if following is None and not rows:
                    time.sleep(PAUSE)
                    continue
                if following is None or following is _END:
                    break
                try:
                    row, response = self._admitted(index, following, max_tokens, sampling, len(rows))  # type: ignore[arg-type]
                    if response.finish_reason is None:
                        rows.append(row)
                except DashError as error:
                    response = Response.failed(error, self.engines.model.num_layers, Statistics())
                yield index, response
                index += 1
            if not rows:
                return
            yield from self._advance(rows)

    def _admitted(
        self, index: int, prompt: Prompt, max_tokens: int | None, sampling: Sampling, slot: int
    ) -> tuple[Row, Response]:
        """Prefill a prompt and put it into row `slot` of the cache."""
        session, ids = self.prompts, self.checked(prompt, max_tokens)
        max_tokens = room(max_tokens, self.engines.model.max_positions - len(ids))
        turn = Turn(session.text, sampling, max_tokens, len(ids))
        logits = session.restart(ids)
        self._reserve(len(ids) + min(max_tokens, session.kv_step))
        session.copy_cache(self._cache, slot)
        tokens = list(session.tokens)
        actions = np.zeros(self.engines.model.num_layers, np.int8)
        response = turn.respond(logits, tokens, actions, index in self._cancelled)
        return Row(index, turn, deepcopy(session.rules), tokens, response.token), response

    def _advance(self, rows: list[Row]) -> Iterator[tuple[int, Response]]:
        """One step for all `rows`; those that end leave the list."""
        for row in rows:
            row.turn.begin()
        lengths = self._cache.lengths
        self._reserve(max(lengths[: len(rows)]) + 1)
        step = self._bound(len(rows))
        rules = [
            DENSE if length < DENSE_POSITIONS else row.rules.rule for row, length in zip(rows, lengths, strict=False)
        ]
        step.decode_batch([row.token for row in rows], rules)
        actions_of_rows = layer_actions(step.skipped, self.engines.units, self.engines.model.num_layers)
        self.counters.layers_run += int((~actions_of_rows.all(axis=0)).sum())
        self.counters.decode_steps += 1
        responses = []
        for slot, (row, logits, actions) in enumerate(zip(rows, step.logits, actions_of_rows, strict=True)):
            row.rules.decoded(step.skipped[:, slot : slot + 1])
            row.tokens.append(row.token)
            try:
                response = row.turn.respond(logits[0], row.tokens, actions.copy(), row.index in self._cancelled)
            except DashError as error:
                response = Response.failed(error, len(actions), row.turn.statistics)
            row.token = response.token
            responses.append((row.index, response))
        for slot in reversed(range(len(rows))):
            if responses[slot][1].finish_reason is not None:
                self._leave(rows, slot)
        yield from responses

    def _bound(self, count: int) -> BoundStep:
        """The step for `count` sequences. A step holds their logits, so the full one and the last other are kept."""
        if count not in self._steps:
            for other in [other for other in self._steps if other != self.size]:
                del self._steps[other]
            self._steps[count] = self.engines.step(self._cache, 1, batch=count)
        return self._steps[count]

    def _leave(self, rows: list[Row], slot: int) -> None:
        """The last row takes the place of one that ended."""
        last = rows.pop()
        if slot < len(rows):
            rows[slot] = last
            self._cache.take(slot, self._cache, len(rows))
        self._cache.lengths[len(rows)] = 0

    def _reserve(self, tokens: int) -> None:
        if self._cache.reserve(tokens):
            self._steps.clear()
            self.counters.cache_growths += 1
