"""Estimates with 95 % confidence intervals, all by the percentile bootstrap of scipy (extra `profile`). Whole windows,
items or rounds are resampled, because the tokens of one window depend on each other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap

CONFIDENCE = 0.95
RESAMPLES = 2000
FEWEST = 6
"""Fewest rounds for an interval of their median: fewer rounds say little more than how far apart two of them lay."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % confidence interval; a single item gives no width."""

    value: float
    low: float
    high: float


def interval(
    sums: npt.ArrayLike, counts: npt.ArrayLike | None = None, transform: Callable[[Floats], Floats] | None = None
) -> Interval:
    """Return the ratio sum(sums) / sum(counts) over items. `counts` is one per item by default (a plain mean);
    `transform` is a function of the ratio, like `np.exp` for perplexity.
    """
    top = np.asarray(sums, np.float64)
    bottom = np.ones_like(top) if counts is None else np.asarray(counts, np.float64)

    def ratio(top: Floats, bottom: Floats, axis: int = -1) -> Any:
        found = top.sum(axis) / bottom.sum(axis)
        return found if transform is None else transform(found)

    return _bootstrapped(ratio, (top, bottom), fewest=2)


def over_rounds(statistic: Callable[..., Any], values: Floats) -> Interval:
    """Return a statistic of values over rounds. With fewer rounds than `FEWEST` there is no width."""
    return _bootstrapped(statistic, (values,), FEWEST)


def median_ratios(seconds: Floats) -> list[Interval]:
    """Return each variant's time over the first one's, of seconds [variants, rounds]. The median over all variants is
    divided out of each round: a slow machine slows a whole round. With fewer rounds than `FEWEST` there is no width.
    """
    logs = np.log(seconds)
    logs -= np.median(logs, axis=0)

    def ratio(own: Floats, first: Floats, axis: int = -1) -> Any:
        return np.exp(np.median(own, axis=axis) - np.median(first, axis=axis))

    return [_bootstrapped(ratio, (own, logs[0]), FEWEST) for own in logs]


def _bootstrapped(statistic: Callable[..., Any], samples: tuple[Floats, ...], fewest: int) -> Interval:
    """Return the bootstrapped interval, without width for fewer than `fewest` samples. All calls resample alike."""
    value = float(statistic(*samples))
    if samples[0].size < fewest:
        return Interval(value, value, value)
    found = bootstrap(
        samples, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=200,
        confidence_level=CONFIDENCE, method="percentile", random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Interval(value, float(found.low), float(found.high))
