"""What one curve of a frontier costs beside another, where both skip as many layers and where both take as long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.evaluation.frontier import Point

MARGIN = 0.15
"""How far outside the known points, as a share, a curve is still read."""


@dataclass(frozen=True)
class Comparison:
    """KL of every point of one curve, of that of another curve (`kind` of `bundle`): where this one has skipped as many
    layers (`layers`), and where it takes as much of its own bundle's dense time (`time`). None where it does not reach.
    """

    bundle: str
    kind: str
    layers: tuple[float | None, ...]
    time: tuple[float | None, ...]


def compare(points: Sequence[Point]) -> tuple[list[Point], list[Comparison]]:
    """(the first curve of `token`, it against every other curve but dense); nothing where there is none."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.bundle, point.quality.setting.kind), []).append(point)
    first = next((name for name in curves if name[1] == "token"), None)
    if first is None:
        return [], []
    own, dense = curves.pop(first), curves.pop((first[0], "dense"))[0]
    total = dense.quality.layers

    def skipped(curve: Sequence[Point]) -> list[float]:
        return [total - point.quality.layers for point in curve]

    mine = _kl(own)
    found = []
    for (bundle, name), curve in curves.items():
        if name != "dense":
            layers = mine / power_at(skipped(own), skipped(curve), _kl(curve))
            time = mine / _kl_at_time([point.time for point in own], curve)
            found.append(Comparison(bundle, name, _known(layers), _known(time)))
    return own, found


def _kl(curve: Sequence[Point]) -> npt.NDArray[np.float64]:
    return np.array([point.quality.kl.value for point in curve])


def _known(values: npt.NDArray[np.float64]) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(value) else value for value in values.tolist())


def _kl_at_time(at: Sequence[float], curve: Sequence[Point]) -> npt.NDArray[np.float64]:
    """Along chords from dense on. What may have saved nothing at all, by its interval, is no point of a curve."""
    points = sorted(
        (1 - point.time, point.quality.kl.value)
        for point in curve
        if (point.time < 1 if point.timing is None else point.timing.low < point.timing.high < 1)
    )
    saved, kl = np.array([(0.0, 0.0), *points]).T
    found: npt.NDArray[np.float64] = np.interp(1 - np.array(at), saved, kl, left=np.nan, right=np.nan)
    return np.where(found > 0, found, np.nan)


def power_at(at: npt.ArrayLike, x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """y at these x, y taken to be a power of x between known points, which may be in any order; those that are not
    above 0 are left out. NaN further outside than MARGIN, and where two points are not left.
    """
    where, known, values = (np.asarray(each, np.float64) for each in (at, x, y))
    known, first = np.unique(known[values > 0], return_index=True)
    values = values[values > 0][first][known > 0]
    known = known[known > 0]
    if len(known) < 2:
        return np.full(where.shape, np.nan)
    near = (where > known[0] * (1 - MARGIN)) & (where < known[-1] * (1 + MARGIN))
    known, values, place = np.log(known), np.log(values), np.log(np.where(near, where, known[0]))
    segment = np.clip(np.searchsorted(known, place) - 1, 0, len(known) - 2)
    slope = np.diff(values) / np.diff(known)
    return np.where(near, np.exp(values[segment] + slope[segment] * (place - known[segment])), np.nan)
