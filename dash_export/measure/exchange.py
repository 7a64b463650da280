"""The frontier: the quality that each policy kind, and each other build, gives up for the time it saves."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np

from dash_export.files.artifacts import Progress, no_progress
from dash_export.measure import ROUNDS, TOKENS
from dash_export.measure.candidates import Candidate, kind_shown
from dash_export.measure.intervals import Interval
from dash_export.measure.score import Result, score
from dash_export.measure.texts import JudgedText
from dash_export.measure.timing import SETTLE, Timing, decode_times, fitting_context


@dataclass(frozen=True)
class Point:
    """Point of the frontier: a setting, or another build. `timing` None: only predicted. Times, KL and perplexities are
    relative to the dense mode of the first build; `dense` is this build's dense time.
    """

    quality: Result
    timing: Timing | None
    dense: float = 1.0

    @property
    def time(self) -> float:
        """Decode time as a fraction of dense: measured, or else predicted from the cost tables."""
        return self.quality.time * self.dense if self.timing is None else self.timing.ratio

    @property
    def kl(self) -> Interval:
        return self.quality.figures["kl"]

    @property
    def name(self) -> str:
        """Name of the curve that the point belongs to: its policy kind, or the name of another build."""
        return self.quality.build or kind_shown(self.quality.setting)

    @property
    def exchange_rate(self) -> Interval | None:
        """Per cent of perplexity paid per per cent of decode time saved, both measured; of a slower build, what the
        first one's dense mode pays and saves beside it. Its bounds are the rates at the
        bounds of the two, which are independent: their distances are added as squares (the method of variance
        estimates recovery). None where the interval of the time does not tell whether any was saved or lost; without
        bounds where the time has none.
        """
        if self.timing is None or self.timing.low <= 1 <= self.timing.high:
            return None
        paid = self.quality.figures["perplexity_ratio"]
        time = Interval(self.timing.ratio, self.timing.low, self.timing.high)
        if time.value > 1:
            paid, time = (Interval(1 / one.value, 1 / one.high, 1 / one.low) for one in (paid, time))

        def rate(ratio: float, of_dense: float) -> float:
            return (ratio - 1) / (1 - of_dense)

        value = rate(paid.value, time.value)
        if time.low == time.high:
            return Interval(value, value, value)
        by_paid, by_time = (
            sorted(bound - value for bound in bounds)
            for bounds in (
                (rate(paid.low, time.value), rate(paid.high, time.value)),
                (rate(paid.value, time.low), rate(paid.value, time.high)),
            )
        )
        return Interval(value, value - hypot(by_paid[0], by_time[0]), value + hypot(by_paid[1], by_time[1]))


def frontier(
    candidates: Sequence[Candidate],
    text: JudgedText,
    rounds: int = ROUNDS,
    tokens: int = TOKENS,
    progress: Progress = no_progress,
) -> list[Point]:
    """Return one point per candidate; the first is dense, and everything is compared with it. Quality is that of
    `score`; time is over `rounds` blocks of `tokens` decoded tokens, after as much context as the cost table has.
    `rounds` 0: time is predicted only. Raises RequestError where a text or context does not fit.
    """
    if not rounds:
        dense = [one.runtime.cost.dense_us for one in candidates]
        return [
            Point(result, None, own / dense[0] if own and dense[0] else 1.0)  # 0: not measured
            for result, own in zip(score(text.items, candidates, progress), dense, strict=True)
        ]
    context = fitting_context(candidates, None, SETTLE + tokens)
    timed = text.stretches(rounds, context + SETTLE + tokens)
    quality = score(text.items, candidates, progress)
    timings = decode_times(candidates, timed, context, progress)
    return [Point(result, timing.at(result.time)) for result, timing in zip(quality, timings, strict=True)]


def token_kl_share(points: Sequence[Point]) -> list[float | None]:
    """Return for each point: the token policy's KL at the point's time, as a share of the point's KL. The curve of the
    token policy consists of straight lines that begin at dense. None for dense and the token policy itself, and where
    the curve does not reach.
    """
    curve = sorted(
        (1 - point.time, point.kl.value)
        for point in points
        # A point that may have saved no time at all, by its interval, is left out of the curve.
        if point.name == "token" and (point.time < 1 if point.timing is None else point.timing.high < 1)
    )
    saved, kl = np.array([(0.0, 0.0), *curve]).T
    found: list[float | None] = []
    for point in points:
        there = np.interp(1 - point.time, saved, kl, left=np.nan, right=np.nan)
        other = point.name not in ("token", "dense") and there > 0 and point.kl.value > 0
        found.append(float(there / point.kl.value) if other else None)
    return found
