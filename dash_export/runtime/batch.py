"""Several sequences decoded together: a step reads the weights once for all of them.

Each sequence has its own cache rows, rules, sampling and end, and gets what it would get alone. A layer runs when any
sequence runs it, and each takes its own result, so skipping saves less the more decode together: where every one skips
a layer with probability p, p^n of its runs are saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np

from dash_export.decision import DENSE_POSITIONS
from dash_export.errors import ContextLengthError, RequestError
from dash_export.runtime.dispatch import BoundStep, EngineSet
from dash_export.runtime.results import Counters, Response, TokenIds
from dash_export.runtime.rules import DENSE, SessionRules
from dash_export.runtime.sampling import Sampling
from dash_export.runtime.session import Session
from dash_export.runtime.turn import Turn


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
    ended. It belongs to one thread.

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

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes + self.prompts.cache_bytes

    def stream(
        self,
        prompts: Iterable[str | Sequence[int] | TokenIds],
        max_tokens: int = 256,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, Response]]:
        """(index of the prompt, its next response), as they come. Prompts are taken one at a time when there is room,
        so they may be a generator that waits for work.

        Raises RequestError for an empty prompt and ContextLengthError for one that does not fit, when its turn comes.
        """
        if max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, not {max_tokens}.")
        return self._stream(prompts, max_tokens, sampling or Sampling())

    def _stream(
        self, prompts: Iterable[str | Sequence[int] | TokenIds], max_tokens: int, sampling: Sampling
    ) -> Iterator[tuple[int, Response]]:
        waiting = enumerate(prompts)
        rows: list[Row] = []
        while True:
            while len(rows) < self.size and (following := next(waiting, None)) is not None:
                row, response = self._admitted(*following, max_tokens, sampling, len(rows))
                if response.finish_reason is None:
                    rows.append(row)
                yield row.index, response
            if not rows:
                return
            yield from self._advance(rows)

    def _admitted(
        self, index: int, prompt: str | Sequence[int] | TokenIds, max_tokens: int, sampling: Sampling, slot: int
    ) -> tuple[Row, Response]:
        """Prefill a prompt and put it into row `slot` of the cache."""
        session = self.prompts
        ids = session.text.encode(prompt) if isinstance(prompt, str) else prompt
        limit = session.engines.model.max_positions
        if len(ids) + max_tokens > limit:
            raise ContextLengthError(
                f"Prompt {index} does not fit: {len(ids)} tokens and {max_tokens} new ones, but the model has {limit} "
                "positions. Shorten it or ask for fewer tokens."
            )
        turn = Turn(session.text, sampling, max_tokens, len(ids))
        logits = session.restart(ids)
        self._reserve(len(ids) + min(max_tokens, session.kv_step))
        session.copy_cache(self._cache, slot)
        tokens = list(session.tokens)
        response = turn.respond(logits, tokens, np.zeros(self.engines.model.num_layers, np.int8))
        return Row(index, turn, deepcopy(session.rules), tokens, response.token), response

    def _advance(self, rows: list[Row]) -> Iterator[tuple[int, Response]]:
        """One step for all `rows`; those that end leave the list."""
        for row in rows:
            row.turn.begin()
        lengths = self._cache.lengths
        self._reserve(max(lengths[: len(rows)]) + 1)
        if len(rows) not in self._steps:
            self._steps[len(rows)] = self.engines.step(self._cache, 1, batch=len(rows))
        step = self._steps[len(rows)]
        rules = [
            DENSE if length < DENSE_POSITIONS else row.rules.at(length, 1)
            for row, length in zip(rows, lengths, strict=False)
        ]
        self.counters.layers_run += step.decode_batch([row.token for row in rows], rules)
        self.counters.decode_steps += 1
        responses = []
        for row, logits, actions in zip(rows, step.logits, step.actions, strict=True):
            row.rules.decoded(actions)
            row.tokens.append(row.token)
            response = row.turn.respond(logits[0], row.tokens, actions.copy())
            row.token = response.token
            responses.append((row.index, response))
        for slot in reversed(range(len(rows))):
            if responses[slot][1].finish_reason is not None:
                self._leave(rows, slot)
        yield from responses

    def _leave(self, rows: list[Row], slot: int) -> None:
        """The last row takes the place of one that ended."""
        last = rows.pop()
        if slot < len(rows):
            rows[slot] = last
            self._cache.take(slot, self._cache, len(rows))

    def _reserve(self, tokens: int) -> None:
        if self._cache.reserve(tokens):
            self._steps.clear()
            self.counters.cache_growths += 1
