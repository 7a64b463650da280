"""Confidence intervals by the percentile bootstrap over whole windows, prompts or items.

Tokens of one window depend on each other, so windows are what is drawn. A few lines of numpy rather than
`scipy.stats.bootstrap`: a ratio of two sums with tens of windows needs no bias correction, and a device that evaluates
needs no 100 MB more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 2000
_BLOCK = 1 << 20
"""Numbers drawn at a time: 8 MB, however many items there are."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % confidence interval; a single item gives no width."""

    value: float
    low: float
    high: float


def interval(
    sums: npt.ArrayLike,
    counts: npt.ArrayLike | None = None,
    transform: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]] | None = None,
    seed: int = 0,
) -> Interval:
    """The ratio sum(sums) / sum(counts) over items, and its bootstrap interval over them.

    `counts` is one per item by default (a plain mean). `transform` is a monotonic function of the ratio, like `np.exp`
    for perplexity. The same seed draws the same items, so intervals of several settings are over the same resamples.
    """
    top = np.asarray(sums, np.float64)
    bottom = np.ones_like(top) if counts is None else np.asarray(counts, np.float64)
    if top.size == 0 or bottom.sum() <= 0:
        raise ValueError("There is nothing to average.")
    rng = np.random.default_rng(seed)
    ratios = []
    rows = max(1, _BLOCK // top.size)
    for start in range(0, RESAMPLES, rows):
        drawn = rng.integers(0, top.size, (min(rows, RESAMPLES - start), top.size))
        # A resample of empty items alone says nothing.
        weight = bottom[drawn].sum(axis=1)
        ratios.append(top[drawn].sum(axis=1)[weight > 0] / weight[weight > 0])
    edge = (1 - CONFIDENCE) / 2
    found = np.array([top.sum() / bottom.sum(), *np.quantile(np.concatenate(ratios), [edge, 1 - edge])])
    value, low, high = (transform(found) if transform is not None else found).tolist()
    return Interval(value, low, high)
