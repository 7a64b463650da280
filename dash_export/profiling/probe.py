"""Stamps around what one decode step does. The decode loop itself is untouched: while a probe is on, the step's
launches are wrapped ones, and the wrapped and the bare ones run the same engines on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from dash_export.decision import Damages, Skips
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.decode import BoundSegment, BoundStep
from dash_export.runtime.rules import Rule

Stamps = npt.NDArray[np.int64]
_Push = Callable[[tuple[int, int, int]], None]


class What(IntEnum):
    """What a stamp is of: an engine that runs a segment, a bypass, or the host asking the rule about the token."""

    RUN = 0
    BYPASS = 1
    DECISION = 2


class Probe:
    """One step's stamps. `take` gives those since the last time, int64 [stamps, 4]: segment (of a decision -1), What,
    begin and end in nanoseconds of `time.perf_counter_ns`.
    """

    def __init__(self, step: BoundStep) -> None:
        self.step = step
        # Three plain numbers a stamp in one flat list: nothing for the garbage collector to follow.
        self._flat: list[int] = []
        self._stamped: list[tuple[int, int]] = []
        self._watch = _WatchedRule(self._code(-1, What.DECISION), self._flat.extend)
        self._bare = step.segments
        self._timed = [self._wrapped(index, item) for index, item in enumerate(step.segments)]

    @contextmanager
    def on(self, rule: Rule) -> Iterator[Rule]:
        """Inside, the step's launches are timed, and so is what the yielded rule is asked."""
        self._watch.rule = rule
        self.step.segments = self._timed
        try:
            yield self._watch
        finally:
            self.step.segments = self._bare

    def take(self) -> Stamps:
        """The stamps so far, in the order in which they began; they are forgotten."""
        flat = np.array(self._flat, np.int64).reshape(-1, 3)
        self._flat.clear()
        return np.column_stack([np.array(self._stamped, np.int64)[flat[:, 0]], flat[:, 1:]])

    def _code(self, segment: int, what: What) -> int:
        """The number that stands for these in a stamp."""
        self._stamped.append((segment, what))
        return len(self._stamped) - 1

    def _wrapped(self, index: int, segment: BoundSegment) -> BoundSegment:
        def timed(launch: Launch, what: What) -> Launch:
            return _stamped(launch, self._code(index, what), self._flat.extend)

        bypass = None if segment.bypass is None else timed(segment.bypass, What.BYPASS)
        return replace(segment, run=timed(segment.run, What.RUN), bypass=bypass)


def _stamped(launch: Launch, code: int, push: _Push) -> Launch:
    def stamped() -> None:
        began = perf_counter_ns()
        launch()
        push((code, began, perf_counter_ns()))

    return stamped


class _WatchedRule:
    """A rule, and how long its answers take."""

    rule: Rule

    def __init__(self, code: int, push: _Push) -> None:
        self._code = code
        self._push = push

    @property
    def asks(self) -> bool:
        return self.rule.asks

    def skips(self, damage: Damages) -> Skips:
        began = perf_counter_ns()
        skipped = self.rule.skips(damage)
        self._push((self._code, began, perf_counter_ns()))
        return skipped


STAMPS = 2000
_GOES = 7


def stamp_cost() -> float:
    """Seconds one stamp adds: a wrapped call of nothing against a bare one, each the best of several goes."""

    def nothing() -> None: ...

    sink: list[int] = []
    stamped = _stamped(nothing, 0, sink.extend)

    def seconds(call: Launch) -> float:
        began = perf_counter_ns()
        for _ in range(STAMPS):
            call()
        sink.clear()
        return (perf_counter_ns() - began) * 1e-9 / STAMPS

    # In turns: a machine that changes its clock changes it for both.
    goes = [(seconds(nothing), seconds(stamped)) for _ in range(_GOES)]
    return max(0.0, min(go[1] for go in goes) - min(go[0] for go in goes))
