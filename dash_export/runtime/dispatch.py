"""The dispatcher: engines bound to fixed memory, launched conditionally, one token at a time or many.

`EngineSet` is what sessions share, `BoundStep` that bound to one cache and one number of tokens (`memory.py`). A row is
one token of one sequence: many tokens of one, or one token of each of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dash_export.decision import Skips
from dash_export.runtime.backends.base import Launch, backend_errors
from dash_export.runtime.cache import KVCache
from dash_export.runtime.memory import ALWAYS_RUN, BoundSegment, StepMemory
from dash_export.runtime.rules import Rule

if TYPE_CHECKING:
    from dash_export.runtime.engine_set import EngineSet


class _Answers(dict[bytes, tuple[Launch, ...]]):
    """Skipped units, as the bytes of their row -> what is launched once that is known. Between engines the caches are
    cold, and there a loop that chooses costs several times what one that launches costs.
    """

    KEPT = 1024

    def __init__(self, segments: Sequence[BoundSegment]) -> None:
        super().__init__()
        self._segments = segments

    def __missing__(self, skipped: bytes) -> tuple[Launch, ...]:
        launches = tuple(
            item.bypass if item.bypass is not None and skipped[item.unit] else item.run for item in self._segments
        )
        if len(self) >= self.KEPT:
            del self[next(iter(self))]
        self[skipped] = launches
        return launches


class Arrangement:
    """What a step launches: `before` damage is known, for the policy reads a state that comes before the first unit;
    and `after`, which `answers` has by the units that are skipped.
    """

    def __init__(self, segments: Sequence[BoundSegment]) -> None:
        first = next((at for at, item in enumerate(segments) if item.unit != ALWAYS_RUN), len(segments))
        self.before = tuple(item.run for item in segments[:first])
        self.after = segments[first:]
        self.answers = _Answers(self.after)


class BoundStep:
    """Engines bound to memory for steps of `sequence` tokens of each of the cache's first `batch` sequences. `logits`
    [batch, rows, vocab], `damage` and `skipped` [units, rows] are this object's arrays. Who times launches gives it
    another `arrangement`.
    """

    def __init__(
        self,
        engines: EngineSet,
        cache: KVCache,
        sequence: int,
        teacher_forced: bool = False,
        batch: int = 1,
    ) -> None:
        """`teacher_forced` steps give the logits of all their tokens, others those of the last one."""
        self.sequence, self.batch = sequence, batch
        self._cache = cache
        self._memory = memory = StepMemory(engines, cache, sequence, batch, teacher_forced)
        self.input_ids, self.logits = memory.input_ids, memory.logits
        self.damage: npt.NDArray[np.float32] = memory.damage.reshape(batch * sequence, len(engines.units)).T
        self.skipped: Skips = np.zeros(self.damage.shape, np.bool_)
        mixed = engines.mixed() if teacher_forced or batch > 1 else ()
        self.segments = memory.bind(engines.segments, mixed)
        self.arrangement = Arrangement(self.segments)

    def launches(self) -> list[tuple[Launch, Launch | None]]:
        """Per segment what runs it and what skips it, to be timed one by one after `place`."""
        return [(item.run, item.bypass) for item in self.segments]

    def place(self) -> None:
        """Say where the new tokens go: the rows after the cached ones."""
        self._memory.place()

    @backend_errors
    def decode(self, token: int, rule: Rule) -> None:
        """One token under `rule`."""
        self.input_ids[0, 0] = token
        self.place()
        for launch in self.arrangement.before:
            launch()
        self.skipped[:] = rule.skips(self.damage)
        for launch in self.arrangement.answers[self.skipped.tobytes()]:
            launch()
        self._cache.length += 1

    @backend_errors
    def prefill(self, tokens: npt.NDArray[np.int64]) -> None:
        """`sequence` tokens, every layer."""
        self.input_ids[0] = tokens
        self.place()
        for segment in self.segments:
            launch = segment.run
            launch()
        self._cache.length += self.sequence

    def teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None:
        """`sequence` known tokens in one pass under `rule`, except rows where `dense` is true: what decode would have
        done.
        """
        self.input_ids[0] = tokens
        self._begin_rows()
        self.skipped[:] = rule.skips(self.damage) & ~dense
        self._finish_rows()
        self._cache.length += self.sequence

    def decode_batch(self, tokens: Sequence[int], rules: Sequence[Rule]) -> None:
        """One token of every sequence, each under a rule of its own."""
        if self.batch == 1:
            self.decode(tokens[0], rules[0])
            return
        self.input_ids[:, 0] = tokens
        self._begin_rows()
        for row, rule in enumerate(rules):
            self.skipped[:, row : row + 1] = rule.skips(self.damage[:, row : row + 1])
        self._finish_rows()
        for row in range(self.batch):
            self._cache.lengths[row] += 1

    @backend_errors
    def _begin_rows(self) -> None:
        """Up to where damage is known."""
        self.place()
        for launch in self.arrangement.before:
            launch()

    @backend_errors
    def _finish_rows(self) -> None:
        """Every row as `skipped` says: a unit whose rows agree runs or is skipped, else its mixed engine does both."""
        for item in self.arrangement.after:
            launch = item.run
            if item.unit != ALWAYS_RUN:
                assert item.bypass is not None
                assert item.mixed is not None
                own = self.skipped[item.unit]
                self._memory.skipped.reshape(-1)[:] = own
                launch = item.run if not own.any() else item.bypass if own.all() else item.mixed
            launch()
