"""Spreads and intervals: a machine shared with others has outliers, so medians and their order statistics."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles of `count` times, in the unit the owner says."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int


def spread(values: npt.ArrayLike, scale: float = 1.0) -> Spread | None:
    """The spread of `values * scale`; None without any."""
    array = np.asarray(values, np.float64).ravel() * scale
    if array.size == 0:
        return None
    p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
    return Spread(float(array.mean()), p50, p90, p99, int(array.size))


@dataclass(frozen=True)
class Middle:
    """A median and its 95 % confidence interval; with fewer than six values that is their range."""

    value: float
    low: float
    high: float


_NORMAL = 1.96


def middle(values: npt.ArrayLike) -> Middle | None:
    """Distribution-free: between the order statistics that a binomial count of values below the median allows."""
    array = np.sort(np.asarray(values, np.float64).ravel())
    count = array.size
    if count == 0:
        return None
    reach = _NORMAL * sqrt(count) / 2
    low = max(0, int(np.floor((count - 1) / 2 - reach)))
    high = min(count - 1, int(np.ceil((count - 1) / 2 + reach)))
    return Middle(float(np.median(array)), float(array[low]), float(array[high]))
