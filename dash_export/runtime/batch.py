"""Several sequences decoded together: a step reads the weights once for all of them.

Each sequence has its own cache rows, rules, sampling and end, and gets what it would get alone (in fp32; else up to
rounding). A unit runs when any
sequence runs it, and each takes its own result, so skipping saves less the more decode together: where every one skips
a unit with probability p, p^n of its runs are saved.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np

from dash_export.arguments import Prompt, check_arguments
from dash_export.decision import DENSE_POSITIONS, layer_actions
from dash_export.errors import DashError, RequestError
from dash_export.runtime.decode import BoundStep, EngineSet
from dash_export.runtime.results import (
    MAX_TOKENS,
    NO_TOKEN,
    Response,
    Statistics,
    TokenIds,
    Turn,
    answer_length,
)
from dash_export.runtime.rules import DENSE, SessionRules
from dash_export.runtime.sampling import Sampling
from dash_export.runtime.session import Session

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
class Counters:
    """Steps of all sequences together, and layers that ran in them for any."""

    decode_steps: int = 0
    layers_run: int = 0


@dataclass
class Batch:
    """Made by `DashRuntime.batch()`, for one thread and one stream at a time: at most `size` sequences; the next prompt
    takes the place of one that ended. Prompts are prefilled one by one, in `prompts`, a session that keeps the last
    one: what the next has in common with it (a system prompt) is not computed again.
    """

    engines: EngineSet
    prompts: Session
    size: int

    def __post_init__(self) -> None:
        self.cache = self.engines.cache(self.prompts.kv_step, self.size)
        self._steps: dict[int, BoundStep] = {}
        self._stream_now: object = None
        self.counters = Counters()

    @check_arguments
    def checked(self, prompt: Prompt, max_tokens: int | None = MAX_TOKENS) -> TokenIds:
        """A prompt's token ids. Raises RequestError, and ContextLengthError where it and `max_tokens` do not fit."""
        ids = self.prompts.checked_ids(prompt, fresh=True)
        answer_length(len(ids), max_tokens, self.engines.model.max_positions)
        return ids

    @check_arguments
    def stream(
        self,
        prompts: Iterable[Prompt | None],
        max_tokens: int | None = MAX_TOKENS,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, Response]]:
        """(index of the prompt, its next response), as they come.

        `prompts` is asked whenever there is room, so it may be a generator that takes them from somewhere; let it yield
        None when nothing has come, for while it waits the sequences under way wait too. What it raises ends the stream
        as it is. `max_tokens` None: 256, or what the context has left.

        A prompt that cannot be answered (see `checked`), or whose answer fails, ends alone: its last response has
        `finish_reason` "error" and the `error`. Raises BackendError where a step for all of them fails, and
        RequestError in a stream that goes on after another one of this batch has begun.
        """
        if max_tokens is not None:  # refused for all prompts at once
            answer_length(0, max_tokens, self.engines.model.max_positions)
        this = self._stream_now = object()
        return self._stream(this, iter(prompts), max_tokens, sampling or Sampling())

    def _stream(
        self, this: object, prompts: Iterator[Prompt | None], max_tokens: int | None, sampling: Sampling
    ) -> Iterator[tuple[int, Response]]:
        rows: list[Row] = []
        index, more = 0, True
        while more or rows:
            while more and len(rows) < self.size:
                try:
                    prompt = next(prompts)
                except StopIteration:
                    more = False
                    break
                if prompt is not None:
                    self._check_newest(this)  # the generator of prompts, too, may have begun another
                    yield index, self._admit(rows, index, prompt, max_tokens, sampling)
                    index += 1
                elif rows:
                    break
                else:
                    time.sleep(PAUSE)
            if rows:
                self._check_newest(this)
                yield from self._advance(rows)

    def _check_newest(self, this: object) -> None:
        if self._stream_now is not this:
            raise RequestError("Another stream of this batch has begun: make a batch for each.")

    def _admit(
        self, rows: list[Row], index: int, prompt: Prompt, max_tokens: int | None, sampling: Sampling
    ) -> Response:
        """Prefill a prompt, and make it the last of the rows unless its first token is its last."""
        session, slot = self.prompts, len(rows)
        try:
            ids = self.checked(prompt, max_tokens)
            max_tokens = answer_length(len(ids), max_tokens, self.engines.model.max_positions)
            turn = Turn(session.text, sampling, max_tokens, len(ids))
            logits = session.restart(ids)
            self._reserve(len(ids) + min(max_tokens, session.kv_step))
            self.cache.take(slot, session.cache)
            actions = np.zeros(self.engines.model.num_layers, np.int8)
            response = turn.respond(logits, session.tokens, actions)
        except DashError as error:
            return self._failed(error, Statistics())
        if response.finish_reason is None:
            rows.append(Row(index, turn, deepcopy(session.rules), list(session.tokens), response.token))
        return response

    def _failed(self, error: DashError, statistics: Statistics) -> Response:
        actions = np.zeros(self.engines.model.num_layers, np.int8)
        return Response("", NO_TOKEN, actions, 0.0, statistics, "error", error)

    def _advance(self, rows: list[Row]) -> Iterator[tuple[int, Response]]:
        """One step for all `rows`; those that end leave the list."""
        for row in rows:
            row.turn.begin()
        lengths = self.cache.lengths
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
                response = row.turn.respond(logits[0], row.tokens, actions.copy())
            except DashError as error:
                response = self._failed(error, row.turn.statistics)
            row.token = response.token
            responses.append((row.index, response))
        for slot in reversed(range(len(rows))):
            if responses[slot][1].finish_reason is not None:
                self._leave(rows, slot)
        yield from responses

    def _bound(self, count: int) -> BoundStep:
        """The step for `count` sequences. A step holds their logits, so the full one and the last other are kept."""
        if count not in self._steps:
            self._steps = {other: step for other, step in self._steps.items() if other == self.size}
            self._steps[count] = self.engines.step(self.cache, 1, batch=count)
        return self._steps[count]

    def _leave(self, rows: list[Row], slot: int) -> None:
        """The last row takes the place of one that ended."""
        last = rows.pop()
        if slot < len(rows):
            rows[slot] = last
            self.cache.take(slot, self.cache, len(rows))
        self.cache.lengths[len(rows)] = 0

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self._steps.clear()  # before: see Session._reserve
        self.cache.reserve(tokens)
