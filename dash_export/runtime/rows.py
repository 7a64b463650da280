"""Sequences that decode together: a step reads the weights once for all of them. `Batch` and a server's scheduler
decide which sequence joins when.

On a CPU a row gets what it would get alone (in fp32; else up to rounding). A unit runs when any row runs it. Each row
then takes its own result on a CPU; on a device every row takes that of the run. Where each of n sequences skips a unit
with probability p, p^n of its runs are saved.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dash_export.core.kinds import SessionRules
from dash_export.core.rule import DENSE
from dash_export.core.sampling import Logits
from dash_export.core.units import DENSE_POSITIONS, layer_actions
from dash_export.errors import BackendError, DashError
from dash_export.runtime.results import NO_TOKEN, Response, Statistics, Turn
from dash_export.runtime.session import Session

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.cuda.step import DeviceStep
    from dash_export.backends.host.decode import BoundStep, EngineSet

NO_MEMORY = "The memory is not enough for this answer beside the others: ask again later, or for less."


@dataclass
class Row:
    """One sequence that is being decoded: row i of the cache belongs to `rows[i]`. `tag` is its owner's name for it."""

    tag: Any
    turn: Turn
    rules: SessionRules
    tokens: list[int]
    token: int


class Rows:
    """At most `size` rows that decode together, for one thread."""

    def __init__(self, engines: EngineSet | DeviceEngines, size: int, kv_step: int) -> None:
        self.engines, self.size, self._kv_step = engines, size, kv_step
        self.cache: Any = engines.cache(kv_step, size)
        self._steps: dict[int, BoundStep | DeviceStep] = {}
        self.rows: list[Row] = []
        self.skipped: np.ndarray[Any, np.dtype[np.bool_]] = np.zeros(len(engines.units), np.bool_)
        """Units that the last step skipped for all rows."""
        self.decode_steps = self.layers_run = 0
        """Steps of all sequences together, and layers that ran in them for at least one sequence."""

    def __len__(self) -> int:
        return len(self.rows)

    def clear(self) -> None:
        """Forget all rows."""
        self.cache.lengths[: len(self.rows)] = [0] * len(self.rows)
        self.rows.clear()

    def begin(
        self, prompt: Session, logits: Logits, turn: Turn, rules: SessionRules, tag: Any, max_tokens: int
    ) -> Response:
        """Add a row for what `prompt` has prefilled and return its first response. Add no row where this response is
        also the last. Raises DashError.
        """
        slot = len(self.rows)
        self._reserve(len(prompt.tokens) + min(max_tokens, self._kv_step))
        self.cache.take(slot, prompt.cache)
        response = turn.respond(logits, prompt.tokens, self.dense())
        if response.finish_reason is None:
            self.rows.append(Row(tag, turn, rules, list(prompt.tokens), response.token))
        return response

    def failed(self, error: DashError | MemoryError, statistics: Statistics | None = None) -> Response:
        """Return the last response of a row that cannot go on."""
        if isinstance(error, MemoryError):
            error = BackendError(NO_MEMORY)
        return Response("", NO_TOKEN, self.dense(), 0.0, statistics or Statistics(), "error", error)

    def advance(self, cancelled: Collection[Any] = ()) -> list[tuple[Any, Response]]:
        """Decode one token for every row; return (tag, response) of each. A row leaves after its last token, or when
        its tag is in `cancelled`. Without memory for rows that need more, only these are answered, with an error.
        Raises BackendError.
        """
        rows = self.rows
        for row in rows:
            row.turn.begin()
        lengths = self.cache.lengths
        try:
            self._reserve(max(lengths[: len(rows)]) + 1)
        except MemoryError as error:
            full = [slot for slot in range(len(rows)) if lengths[slot] == self.cache.capacity]
            told = [(rows[slot].tag, self.failed(error, rows[slot].turn.statistics)) for slot in full]
            for slot in reversed(full):
                self._leave(slot)
            return told
        step = self._bound(len(rows))
        rules = [
            DENSE if length < DENSE_POSITIONS else row.rules.rule for row, length in zip(rows, lengths, strict=False)
        ]
        step.decode_batch([row.token for row in rows], rules, [row.turn.draw for row in rows])
        self.skipped = np.logical_and.reduce(step.skipped, axis=1)
        actions_of_rows = layer_actions(step.skipped, self.engines.units, self.engines.model.num_layers)
        self.layers_run += int((~actions_of_rows.all(axis=0)).sum())
        self.decode_steps += 1
        responses = []
        for slot, (row, logits, actions) in enumerate(zip(rows, step.logits, actions_of_rows, strict=True)):
            row.rules.decoded(step.skipped[:, slot : slot + 1])
            row.tokens.append(row.token)
            try:
                response = row.turn.respond(logits[0], row.tokens, actions.copy(), row.tag in cancelled)
            except (DashError, MemoryError) as error:
                response = self.failed(error, row.turn.statistics)
            row.token = response.token
            responses.append((row.tag, response))
        for slot in reversed(range(len(rows))):
            if responses[slot][1].finish_reason is not None:
                self._leave(slot)
        return responses

    def dense(self) -> np.ndarray[Any, np.dtype[np.int8]]:
        return np.zeros(self.engines.model.num_layers, np.int8)

    def _bound(self, count: int) -> BoundStep | DeviceStep:
        """Return the step for `count` sequences. A step holds logits, so keep only the full one and the last other."""
        if count not in self._steps:
            self._steps = {other: step for other, step in self._steps.items() if other == self.size}
            self._steps[count] = self.engines.step(self.cache, 1, batch=count)
        return self._steps[count]

    def _leave(self, slot: int) -> None:
        """Remove a row that ended: the last row takes its place."""
        last = len(self.rows) - 1
        if slot < last:
            self.cache.take(slot, self.cache, last)  # do this first: it can raise, and then no row may have moved
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self.cache.lengths[last] = 0

    def _reserve(self, tokens: int) -> None:
        if tokens > self.cache.capacity:
            self._steps.clear()  # before the cache moves: see Session.reserve
        self.cache.reserve(tokens)
