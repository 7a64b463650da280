"""Sequences that decode together: a step reads the weights once for all of them. `Batch` and a server's scheduler
decide which sequence joins when.

On a CPU a row gets what it would get alone (in fp32; else up to rounding). A unit runs when any row runs it. Each row
then takes its own result on a CPU; on a device every row takes that of the run. Where each of n sequences skips a unit
with probability p, p^n of its runs are saved.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from dash_export.core.kinds import SessionRules
from dash_export.core.sampling import Logits
from dash_export.core.units import Actions
from dash_export.errors import BackendError, DashError
from dash_export.runtime.results import NO_TOKEN, Response, Statistics, Turn
from dash_export.runtime.session import Session
from dash_export.runtime.steps import Row, Steps

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.host.decode import EngineSet

NO_MEMORY = "The memory is not enough for this answer beside the others: ask again later, or for less."


class Rows:
    """At most `size` rows that decode together, for one thread."""

    def __init__(self, engines: EngineSet | DeviceEngines, size: int, kv_step: int) -> None:
        self.engines, self.size, self._kv_step = engines, size, kv_step
        self.steps = Steps(engines, kv_step, size)
        self.cache = self.steps.cache
        self.rows: list[Row] = []
        self.decode_steps = self.layers_run = 0
        """Steps of all sequences together, and layers that ran in them for at least one sequence."""

    def __len__(self) -> int:
        return len(self.rows)

    def clear(self) -> None:
        """Forget all rows."""
        self.cache.lengths[: len(self.rows)] = [0] * len(self.rows)
        self.rows.clear()

    @property
    def skipped(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Units that the last step skipped for all rows."""
        found: np.ndarray[Any, np.dtype[np.bool_]] = np.logical_and.reduce(self.steps.skipped, axis=1)
        return found

    def begin(
        self, prompt: Session, logits: Logits, turn: Turn, rules: SessionRules, tag: Any, max_tokens: int
    ) -> Response:
        """Add a row for what `prompt` has prefilled and return its first response. Add no row where this response is
        also the last. Raises DashError.
        """
        slot = len(self.rows)
        self.steps.reserve(len(prompt.tokens) + min(max_tokens, self._kv_step))
        self.cache.take(slot, prompt.cache)
        response = turn.respond(logits, prompt.tokens, self.dense())
        if response.finish_reason is None:
            drafts, tokens = prompt.new_drafts(), list(prompt.tokens)
            if drafts is not None:
                drafts.read([*tokens, response.token])
            self.rows.append(Row(tag, turn, rules, tokens, [response.token], drafts, prompt.state))
        return response

    def failed(self, error: DashError | MemoryError, statistics: Statistics | None = None) -> Response:
        """Return the last response of a row that cannot go on."""
        if isinstance(error, MemoryError):
            error = BackendError(NO_MEMORY)
        return Response("", NO_TOKEN, self.dense(), 0.0, statistics or Statistics(), "error", error)

    def advance(self, cancelled: Collection[Any] = ()) -> list[tuple[Any, Response]]:
        """Decode one token for every row, or of a single row with drafts all that a pass gives; return (tag, response)
        of each. A row leaves after its last token, or when its tag is in `cancelled`. Without memory for rows that need
        more, only these are answered, with an error. Raises BackendError.
        """
        rows = self.rows
        for row in rows:
            row.turn.begin()
        lengths = self.cache.lengths
        try:
            self.steps.make_room(max(lengths[: len(rows)]), len(rows) == 1 and rows[0].drafts is not None)
        except MemoryError as error:
            full = [slot for slot in range(len(rows)) if lengths[slot] == self.cache.capacity]
            told = [(rows[slot].tag, self.failed(error, rows[slot].turn.statistics)) for slot in full]
            for slot in reversed(full):
                self._leave(slot)
            return told

        def choose(row: Row, logits: Logits, actions: Actions, draft: int | None) -> Response:
            try:
                return row.turn.respond(logits, row.tokens, actions.copy(), row.tag in cancelled, draft)
            except (DashError, MemoryError) as error:
                return self.failed(error, row.turn.statistics)

        responses = list(self.steps.advance(rows, choose))
        gone = (unit for unit, skipped in zip(self.engines.units, self.skipped, strict=True) if skipped)
        self.layers_run += self.engines.model.num_layers - sum(len(unit.layers) for unit in gone)
        self.decode_steps += 1
        tags = [row.tag for row in rows]
        for slot, response in zip(reversed(range(len(tags))), reversed(responses), strict=False):
            if response.finish_reason is not None:  # the last one of its row
                self._leave(slot)
        return list(zip(cycle(tags), responses, strict=False))

    def dense(self) -> np.ndarray[Any, np.dtype[np.int8]]:
        return np.zeros(self.engines.model.num_layers, np.int8)

    def _leave(self, slot: int) -> None:
        """Remove a row that ended: the last row takes its place."""
        last = len(self.rows) - 1
        if slot < last:
            self.cache.take(slot, self.cache, last)  # do this first: it can raise, and then no row may have moved
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self.cache.lengths[last] = 0
