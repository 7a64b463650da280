"""The frontier: what each policy kind gives up for the time it saves, one point per kind and setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.bundle import Bundle
from dash_export.decision import DENSE_POSITIONS, DIALLED_KINDS, Setting
from dash_export.errors import RequestError
from dash_export.evaluation.results import TextResult
from dash_export.evaluation.text import measure_text, windows
from dash_export.evaluation.timing import FEWEST_GROUPS, SETTLE, Timing, measure_times
from dash_export.runtime import DashRuntime, Session

TokenIds = npt.NDArray[np.int64]
COPY_ROUNDS = 4
"""Timed rounds, at most, until the engines are loaded anew: where weights lie in memory is worth a per cent or two."""


@dataclass(frozen=True)
class Point:
    """One kind at one setting of one bundle. `timing` is None where only the cost table was asked for."""

    bundle: str
    quality: TextResult
    timing: Timing | None

    @property
    def time(self) -> float:
        """Decode time as a fraction of dense: measured, or else predicted from the cost table."""
        return self.quality.time if self.timing is None else self.timing.ratio


@dataclass(frozen=True)
class Course:
    """What a frontier is measured on: `limit` windows of `text` for quality (as `measure_text`); `rounds` timed blocks
    of `tokens` decoded tokens per setting, after as much context as the cost table has. `rounds` 0: no clock.
    """

    text: str
    name: str
    limit: int
    window: int
    prefix: int
    rounds: int
    tokens: int

    @property
    def copy_rounds(self) -> int:
        """Rounds that share a copy of the engines: few enough that there are copies to draw an interval from."""
        return max(1, min(COPY_ROUNDS, self.rounds // FEWEST_GROUPS))


class Racer:
    """A bundle's build in the two ways it is run: without policies in its engines, and with.

    Kinds that ask no network are timed without, as somebody who has none would run them; dense too.
    """

    def __init__(
        self, name: str, bundle: Bundle, target: str, kinds: Sequence[str] | None, dispatch: str | None = None
    ) -> None:
        self.name = name
        self.plain = DashRuntime.load(bundle.root, target, dispatch="plain")
        network = bundle.manifest.policy.has_network
        asks = network and (kinds is None or bool(set(kinds) & set(DIALLED_KINDS)))
        self._deciding_dispatch = dispatch or self.plain.recipe.runtime.dispatch if asks else "plain"
        self.deciding = self._again(self._deciding_dispatch) if asks else self.plain
        self._timed_copy: dict[bool, DashRuntime] = {}
        self._timed_number = -1

    def _again(self, dispatch: str) -> DashRuntime:
        return DashRuntime.load(self.plain.bundle.root, self.plain.build.target, dispatch=dispatch, verify=False)

    def copy(self, number: int) -> dict[bool, DashRuntime]:
        """The build loaded once more, to be timed: without policies (False) and, where asked, with (True).

        Where engines lie in memory is worth a per cent or two, so every other copy is loaded in turned order.
        """
        ways = {False: "plain"} | ({True: self._deciding_dispatch} if self.deciding is not self.plain else {})
        order = ways if number % 2 == 0 else dict(reversed(ways.items()))
        return {asks: self._again(dispatch) for asks, dispatch in order.items()}

    def timed_session(self, setting: Setting, number: int, copy_rounds: int = COPY_ROUNDS) -> Session:
        """A session for the round of this number, of which every `copy_rounds` share a copy: one is held at a time."""
        if number // copy_rounds != self._timed_number:
            self._timed_number = number // copy_rounds
            self._timed_copy = self.copy(self._timed_number)  # the one before is let go after it is loaded
        # Draws follow from seed and position, and every window is as long: `random` has others in every round.
        own = replace(setting, seed=(setting.seed + number) % (1 << 63))
        return self._timed_copy[setting.asks_network].session_with(own)

    def texts(self, course: Course) -> tuple[list[TokenIds], list[TokenIds]]:
        """The windows that quality is measured on, and those that are timed. Raises RequestError for a text that is too
        short.
        """
        parts = windows(self.plain, course.text, course.name, course.limit, course.window)
        return parts, self._timed(course) if course.rounds else []

    def points(
        self,
        settings: Sequence[Setting],
        course: Course,
        texts: tuple[Sequence[TokenIds], Sequence[TokenIds]],
        progress: Progress = no_progress,
    ) -> list[Point]:
        """One point per setting, dense (the first) included, on what `texts` gave."""

        def named(name: str, done: int, total: int) -> None:
            progress(f"{self.name}: {name}", done, total)

        parts, timed = texts
        quality = measure_text(self.deciding, settings, parts, course.prefix, named)
        timings: Sequence[Timing | None] = [None] * len(settings)
        if timed:
            together = course.copy_rounds
            opened = partial(self.timed_session, copy_rounds=together)
            measured = measure_times(settings, opened, timed, course.tokens, named, together)
            dense = quality[0].layers
            timings = [timing.at(result.layers, dense) for timing, result in zip(measured, quality, strict=True)]
        return [Point(self.name, result, timing) for result, timing in zip(quality, timings, strict=True)]

    def _timed(self, course: Course) -> list[TokenIds]:
        longest = self.plain.engines.model.max_positions
        length = min(self.plain.cost.context + course.tokens + SETTLE, longest)
        if length < course.tokens + SETTLE + DENSE_POSITIONS:
            raise RequestError(f"Blocks of {course.tokens} tokens do not fit the model's context of {longest}.")
        parts = windows(self.plain, course.text, course.name, course.rounds, length)
        return [parts[number % len(parts)] for number in range(course.rounds)]  # a short text is gone through again


def check_same_model(racers: Sequence[Racer]) -> None:
    """Raises RequestError when bundles hold different models: their divergences do not compare."""
    sizes = ("num_layers", "hidden_size", "vocab_size", "parameters")
    first = racers[0]
    for other in racers[1:]:
        a, b = first.plain.bundle.manifest.model, other.plain.bundle.manifest.model
        if any(getattr(a, size) != getattr(b, size) for size in sizes):
            raise RequestError(
                f"{first.name} holds {a.name} and {other.name} holds {b.name}: "
                "one frontier compares policies of one model."
            )
