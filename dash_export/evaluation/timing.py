"""Decode time on the clock: settings in turn, block by block, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Action, Setting
from dash_export.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from dash_export.runtime import Session

TokenIds = npt.NDArray[np.int64]
TOKENS = 32
SETTLE = 2
"""First tokens of a block, not timed: they find another setting's weights in the caches."""
FEWEST_GROUPS = 6
"""Of rounds, for an interval: resampling fewer says little more than how far apart two of them lay."""


@dataclass(frozen=True)
class Timing:
    """Decode time of a setting as a fraction of dense, with the bounds of its 95 % bootstrap interval over rounds
    (both the ratio itself where there are too few); `milliseconds` per token (median) and `layers` run (mean).
    """

    ratio: float
    low: float
    high: float
    milliseconds: float
    layers: float

    def at(self, layers: float, dense: float) -> Timing:
        """The same with its time moved to `layers` run of `dense`: time falls about linearly with every layer skipped.

        What a text makes a policy skip differs from text to text, and time and quality are measured on different ones.
        Left as it is where hardly anything was skipped.
        """
        if dense - self.layers < 1:
            return self
        scale = (dense - layers) / (dense - self.layers)
        ratio, low, high = (1 - (1 - value) * scale for value in (self.ratio, self.low, self.high))
        milliseconds = self.milliseconds * ratio / self.ratio
        return replace(self, ratio=ratio, low=low, high=high, milliseconds=milliseconds, layers=layers)


def measure_times(
    settings: Sequence[Setting],
    open_session: Callable[[Setting, int], Session],
    parts: Sequence[TokenIds],
    tokens: int = TOKENS,
    progress: Progress = no_progress,
    together: int = 1,
) -> list[Timing]:
    """One round per part: every setting prefills all but its last `tokens` + 2 tokens and decodes those, as they are.

    Every setting sees the same text at the same cache lengths, so what differs is what it skips. The first setting is
    the one the others are divided by. A sequence policy decides anew in every round. `open_session` is told the round.
    So many rounds have something else in common, `together`, and are drawn together where the interval is found.
    """
    seconds = np.zeros((len(settings), len(parts)))
    layers = np.zeros((len(settings), len(parts)))
    for number, part in enumerate(parts):
        # In another order every round: nobody always follows the same one.
        for turn, index in enumerate(Random(number).sample(range(len(settings)), len(settings))):
            session = open_session(settings[index], number)
            seconds[index, number], layers[index, number] = _block(session, part, tokens)
            progress("decode time", number * len(settings) + turn + 1, len(parts) * len(settings))
    milliseconds = 1e3 * np.median(seconds, axis=1)
    figures = np.stack([*ratios_to_first(seconds, together), milliseconds, layers.mean(axis=1)], axis=1)
    return [Timing(*row) for row in figures.tolist()]


def ratios_to_first(seconds: npt.NDArray[np.float64], together: int = 1) -> tuple[npt.NDArray[np.float64], ...]:
    """[settings, rounds] -> the ratio to the first setting, and the bounds of its interval, [settings] each. The
    interval is by the bootstrap over groups of `together` rounds (the last may have fewer); of under `FEWEST_GROUPS`
    groups it has no width.

    What a round has more than others, a slow machine, is taken to be the median over all its settings and divided out.
    """
    logs = np.log(seconds)
    logs -= np.median(logs, axis=0)
    rounds = seconds.shape[1]
    groups = -(-rounds // together)
    middle = np.median(logs, axis=1)
    ratio = np.exp(middle - middle[0])
    if groups < FEWEST_GROUPS:
        return ratio, ratio, ratio
    padded = np.pad(logs, ((0, 0), (0, groups * together - rounds)), constant_values=np.nan)
    drawn = np.random.default_rng(0).integers(0, groups, (RESAMPLES, groups))
    drawn = (drawn[..., None] * together + np.arange(together)).reshape(RESAMPLES, -1)
    effects = np.stack([np.nanmedian(own[drawn], axis=1) for own in padded])
    edge = (1 - CONFIDENCE) / 2
    return ratio, *np.exp(np.quantile(effects - effects[0], [edge, 1 - edge], axis=1))


def _block(session: Session, part: TokenIds, tokens: int) -> tuple[float, float]:
    """Mean seconds and layers per decoded token."""
    first = len(part) - tokens - SETTLE
    session.prefill(part[:first])
    for token in part[first : first + SETTLE].tolist():
        session.decode_one(token)
    taken = []
    began = time.perf_counter()
    for token in part[first + SETTLE :].tolist():
        taken.append(session.decode_one(token)[1])
    seconds = (time.perf_counter() - began) / tokens
    return seconds, float((np.array(taken) == Action.RUN).sum() / tokens)
