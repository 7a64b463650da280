"""Decode time on the clock: every entrant in a process of its own, in turns, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.errors import BackendError
from dash_export.evaluation.alone import run_alone
from dash_export.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from dash_export.evaluation.settings import Entrant

TokenIds = npt.NDArray[np.int64]
FEWEST_ROUNDS = 6
"""For an interval: resampling fewer says little more than how far apart two of them lay."""


@dataclass(frozen=True)
class Timing:
    """Decode time of an entrant as a fraction of the first one's, with the bounds of its 95 % bootstrap interval over
    rounds (both the ratio itself where there are too few); `milliseconds` per token (median), and what the cost table
    of its build `predicted` for the same tokens, as a fraction of its dense.
    """

    ratio: float
    low: float
    high: float
    milliseconds: float
    predicted: float

    def at(self, predicted: float) -> Timing:
        """The same, moved to tokens for which `predicted` is predicted: what a text makes a policy skip differs from
        text to text, and more tokens are judged than timed. Left as it is where hardly anything was skipped.
        """
        if 1 - self.predicted < 0.02:
            return self
        scale = (1 - predicted) / (1 - self.predicted)
        ratio, low, high = (1 - (1 - value) * scale for value in (self.ratio, self.low, self.high))
        milliseconds = self.milliseconds * ratio / self.ratio
        return replace(self, ratio=ratio, low=low, high=high, milliseconds=milliseconds, predicted=predicted)


def measure_times(
    entrants: Sequence[Entrant], parts: Sequence[TokenIds], context: int, progress: Progress = no_progress
) -> list[Timing]:
    """One round per part: its first `context` tokens are a prompt, the others are decoded by every entrant, the same
    known text for all. The first entrant is the one the others are divided by.

    Raises BackendError where a process fails or is killed.
    """
    seconds, predicted = np.zeros((2, len(entrants), len(parts)))
    for number, part in enumerate(parts):
        # In another order every round: nobody always follows the same one.
        for turn, index in enumerate(Random(number).sample(range(len(entrants)), len(entrants))):
            found = run_alone(entrants[index], part.tolist(), context)
            if found is None:
                raise BackendError("A process that decodes alone was killed: free memory, or give fewer builds.")
            seconds[index, number], predicted[index, number] = found.seconds, found.predicted
            progress("decode time", number * len(entrants) + turn + 1, len(parts) * len(entrants))
    milliseconds = 1e3 * np.median(seconds, axis=1)
    figures = np.stack([*ratios_to_first(seconds), milliseconds, predicted.mean(axis=1)], axis=1)
    return [Timing(*row) for row in figures.tolist()]


def ratios_to_first(seconds: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """[entrants, rounds] -> the ratio to the first entrant, and the bounds of its interval, [entrants] each: by the
    bootstrap over rounds, of under `FEWEST_ROUNDS` without width.

    What a round has more than others, a slow machine, is taken to be the median over all entrants and divided out.
    """
    logs = np.log(seconds)
    logs -= np.median(logs, axis=0)
    middle = np.median(logs, axis=1)
    ratio = np.exp(middle - middle[0])
    rounds = seconds.shape[1]
    if rounds < FEWEST_ROUNDS:
        return ratio, ratio, ratio
    drawn = np.random.default_rng(0).integers(0, rounds, (RESAMPLES, rounds))
    effects = np.stack([np.median(own[drawn], axis=1) for own in logs])
    edge = (1 - CONFIDENCE) / 2
    return ratio, *np.exp(np.quantile(effects - effects[0], [edge, 1 - edge], axis=1))
