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

from dash_export.decision import Damages
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.plan import BoundSegment
from dash_export.runtime.rules import Actions, Counts, Rule

Stamps = npt.NDArray[np.int64]
_Push = Callable[[tuple[int, int, int]], None]


class What(IntEnum):
    """What a stamp is of: an engine that runs a segment, a skip engine, a policy engine of its own, or the host asking
    the rule.
    """

    RUN = 0
    SKIP = 1
    POLICY = 2
    DECISION = 3


class Probe:
    """One step's stamps. `take` gives those since the last time, int64 [stamps, 5]: segment, how many from there on
    were launched at once, What, begin and end in nanoseconds of `time.perf_counter_ns`.
    """

    def __init__(self, step: BoundStep) -> None:
        self._step = step
        # Three plain numbers a stamp in one flat list: nothing for the garbage collector to follow.
        self._flat: list[int] = []
        self._stamped: list[tuple[int, int, What]] = []
        self._bare = step.segments
        self._timed = [self._wrapped(index, segment) for index, segment in enumerate(step.segments)]
        gated = {
            segment.layer: self._code(index, 1, What.DECISION)
            for index, segment in enumerate(step.segments)
            if segment.layer >= 0
        }
        self._watch = _WatchedRule(gated, self._flat.extend)

    @contextmanager
    def on(self, rule: Rule, decisions: bool = False) -> Iterator[Rule]:
        """Inside, the step's launches are timed; with `decisions` also what the yielded rule is asked, which doubles
        what the probe costs.
        """
        self._watch.rule = rule
        self._step.segments = self._timed
        try:
            yield self._watch if decisions else rule
        finally:
            self._step.segments = self._bare

    def take(self) -> Stamps:
        """The stamps so far, in the order in which they began; they are forgotten."""
        flat = np.array(self._flat, np.int64).reshape(-1, 3)
        self._flat.clear()
        return np.column_stack([np.array(self._stamped, np.int64)[flat[:, 0]], flat[:, 1:]])

    def _code(self, index: int, count: int, what: What) -> int:
        """The number that stands for these in a stamp."""
        self._stamped.append((index, count, what))
        return len(self._stamped) - 1

    def _wrapped(self, index: int, segment: BoundSegment) -> BoundSegment:
        def timed(launch: Launch, what: What, count: int = 1) -> Launch:
            return _stamped(launch, self._code(index, count, what), self._flat.extend)

        return replace(
            segment,
            run=timed(segment.run, What.RUN),
            skip=None if segment.skip is None else timed(segment.skip, What.SKIP),
            policy=None if segment.policy is None else timed(segment.policy, What.POLICY),
            stretches=tuple(
                replace(item, launch=timed(item.launch, What.SKIP if item.skips else What.RUN, item.count))
                for item in segment.stretches
            ),
        )


def _stamped(launch: Launch, code: int, push: _Push) -> Launch:
    def stamped() -> None:
        began = perf_counter_ns()
        launch()
        push((code, began, perf_counter_ns()))

    return stamped


class _WatchedRule:
    """A rule, and how long each answer takes."""

    rule: Rule

    def __init__(self, codes: dict[int, int], push: _Push) -> None:
        """`codes`: by layer, what its stamps begin with."""
        self._codes = codes
        self._push = push

    @property
    def asks(self) -> bool:
        return self.rule.asks

    def settled(self, damage: Damages) -> Damages:
        return self.rule.settled(damage)

    def skips(self, layer: int, damage: float, executed: int) -> bool:
        began = perf_counter_ns()
        skip = self.rule.skips(layer, damage, executed)
        self._push((self._codes[layer], began, perf_counter_ns()))
        return skip

    def decide(self, layer: int, damage: Damages, executed: Counts) -> Actions:
        return self.rule.decide(layer, damage, executed)


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
