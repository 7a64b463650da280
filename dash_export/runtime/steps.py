"""Steps over one KV cache: engines bound to it, and how the text of its rows goes on, by a token of each or by a pass
over one row's newest token and its drafts.

Every token is chosen from the full model's logits at its place, one after the other, each when it is asked for: who
stops within a pass finds the text, the sampler and the figures as if no more had been computed. Rows of the cache
behind a text's end are free, so a refused draft is cut off by not being noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from dash_export.backends.host.drafting import BoundDrafter
from dash_export.core.drafts import MOST_LOOKED_UP, Drafts
from dash_export.core.kinds import SessionRules
from dash_export.core.rule import DENSE
from dash_export.core.sampling import Logits
from dash_export.core.units import DENSE_POSITIONS, Actions, layer_actions
from dash_export.runtime.results import Response, Turn

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.backends.cuda.step import DeviceStep
    from dash_export.backends.host.decode import BoundStep, EngineSet


@dataclass
class Row:
    """One sequence that is being decoded. `tokens` are in the cache; `pending` is chosen, and not in it yet: one token,
    none while a step notes it. `drafts`: what guesses the tokens after it, None where nothing does. `state`: the final,
    normed state [hidden] of the newest token in the cache, where the build gives it. `tag` is its owner's name for it.
    """

    tag: Any
    turn: Turn
    rules: SessionRules
    tokens: list[int]
    pending: list[int]
    drafts: Drafts | None = None
    state: npt.NDArray[np.float32] | None = None

    def note(self) -> None:
        """Note that the pending token is in the cache."""
        (token,) = self.pending
        self.pending.clear()  # before append: an interrupt may come after that call, and then both must be done
        self.tokens.append(token)


Choose = Callable[[Row, Logits, Actions, "int | None"], Response]
"""Choose a row's next token, given logits [vocab], actions [layers], and the draft at its place."""


class Steps:
    """Engines bound to a cache of `sequences`, for one thread."""

    def __init__(self, engines: EngineSet | DeviceEngines, kv_step: int, sequences: int = 1) -> None:
        self.engines = engines
        self.cache: Any = engines.cache(kv_step, sequences)
        self._bound: dict[tuple[int, bool, int], BoundStep | DeviceStep] = {}
        self._checking: dict[int, BoundStep] = {}
        """Steps that check drafts, by their rows."""
        self._drafter: BoundDrafter | None = None
        self.skipped: npt.NDArray[np.bool_] = np.zeros((len(engines.units), 1), np.bool_)
        """Units that the last step skipped, for each of its rows."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` of every sequence. Raises MemoryError, and then nothing has changed."""
        if tokens > self.cache.capacity:
            self.unbind()  # before the cache moves: an interrupt in between would leave steps on the old memory
        self.cache.reserve(tokens)

    def make_room(self, length: int, drafts: bool) -> None:
        """Make room for a token behind `length` cached ones, and for `drafts` behind it where memory has some."""
        if drafts:
            with suppress(MemoryError):
                self.reserve(min(length + 2 + MOST_LOOKED_UP, self.engines.model.max_positions))
        self.reserve(length + 1)

    def unbind(self) -> None:
        """Let go of all steps and their memory."""
        self._bound, self._checking, self._drafter = {}, {}, None

    def bound(self, sequence: int, teacher_forced: bool = False, batch: int = 1) -> BoundStep | DeviceStep:
        """Return a step. A long step's buffers and many rows' logits are large: of those that are not for one token of
        one sequence or of all, the last one is kept.
        """
        key = (sequence, teacher_forced, batch)
        if key not in self._bound:
            kept = {(1, False, 1), (1, False, len(self.cache.lengths))}
            self._bound = {other: step for other, step in self._bound.items() if other in kept}
            self._bound[key] = self.engines.step(self.cache, sequence, teacher_forced, batch)
        return self._bound[key]

    def advance(self, rows: Sequence[Row], choose: Choose) -> Iterator[Response]:
        """Run one step: yield the response of every row or, of a single row with drafts, all that a pass gives."""
        if len(rows) == 1 and (guesses := self._guesses(rows[0])):
            yield from self._checked(rows[0], guesses, choose)
            return
        lengths, step = self.cache.lengths, self.bound(1, batch=len(rows))
        rules = [
            DENSE if length < DENSE_POSITIONS else row.rules.rule for row, length in zip(rows, lengths, strict=False)
        ]
        step.decode_batch([row.pending[0] for row in rows], rules, [row.turn.draw for row in rows])
        self.skipped = step.skipped
        actions = layer_actions(step.skipped, self.engines.units, self.engines.model.num_layers)
        for slot, row in enumerate(rows):
            row.turn.note_pass(0)
            row.rules.decoded(step.skipped[:, slot : slot + 1])
            row.note()
            row.state = None if step.final_state is None else step.final_state[slot, 0]
            yield self._chosen(row, choose(row, step.logits[slot, 0], actions[slot], None))

    def _several(self, row: Row) -> bool:
        """Return whether the row's newest token runs in a pass of several rows, which takes a place behind it, too."""
        length = len(row.tokens)
        given = row.drafts is not None and row.rules.rule == DENSE and length + 1 < self.engines.model.max_positions
        return given and row.drafts.several(length)  # type: ignore[union-attr]

    def _guesses(self, row: Row) -> list[int]:
        """Return the drafts that the row's next pass checks; none where a token is decoded by itself."""
        if not self._several(row):
            return []
        drafts, length = cast("Drafts", row.drafts), len(row.tokens)
        most = max(1, min(self.cache.capacity - length - 1, row.turn.left - 1))
        if forced := row.turn.forced(most):
            return forced
        ask = None
        if drafts.trained and row.state is not None:
            self._drafter = self._drafter or BoundDrafter(cast("EngineSet", self.engines), self.cache)
            ask = self._drafter.asked(row.state, length)
        return row.turn.allowed(drafts.guesses(ask, length, most))

    def _checked(self, row: Row, guesses: list[int], choose: Choose) -> Iterator[Response]:
        """Run the row's newest token and the drafts; yield responses up to the first draft that is not the choice."""
        ids, length = [*row.pending, *guesses], len(row.tokens)
        if len(ids) not in self._checking:
            make = partial(cast("EngineSet", self.engines).step, self.cache, len(ids), teacher_forced=True)
            self._checking[len(ids)] = make(mixes=False)
        step = self._checking[len(ids)]
        step.prefill(np.array(ids))
        self.skipped = step.skipped[:, :1]
        row.turn.note_pass(len(guesses))
        drafts, dense = cast("Drafts", row.drafts), np.zeros(self.engines.model.num_layers, np.int8)
        for place, draft in enumerate((*guesses, None)):
            row.note()
            self.cache.length = length + place + 1
            row.state = step.final_state[0, place]
            response = self._chosen(row, choose(row, step.logits[0, place], dense, draft))
            accepted = response.token == draft
            ends = not accepted or response.finish_reason is not None or not self._several(row)
            if ends:
                drafts.judge(place + accepted, len(guesses))
            yield response
            if ends:
                return
            row.turn.begin()

    def _chosen(self, row: Row, response: Response) -> Response:
        row.pending[:] = [response.token]
        if row.drafts is not None and response.error is None:
            row.drafts.add(response.token)
        return response
