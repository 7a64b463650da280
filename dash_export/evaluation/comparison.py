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
    layers (`layers`), and where it takes as much of the dense time (`time`). None where it does not reach.
    """

    bundle: str
    kind: str
    layers: tuple[float | None, ...]
    time: tuple[float | None, ...]


def compare(points: Sequence[Point], kind: str = "token") -> tuple[list[Point], list[Comparison]]:
    """(the first curve of `kind`, it against every other curve but dense)."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.bundle, point.quality.setting.kind), []).append(point)
    first = next((name for name in curves if name[1] == kind), None)
    if first is None:
        return [], []
    own, dense = curves.pop(first), curves.pop((first[0], "dense"))[0]
    total = dense.quality.layers

    def skipped(curve: Sequence[Point]) -> npt.NDArray[np.float64]:
        return np.array([total - point.quality.layers for point in curve])

    def saved(curve: Sequence[Point]) -> npt.NDArray[np.float64]:
        return np.array([1 - point.time for point in curve])

    found = []
    mine = _kl(own)
    for (bundle, name), curve in curves.items():
        if name != "dense":
            ratios = [
                tuple(
                    None if np.isnan(value) else float(value)
                    for value in mine / power_at(of(own), of(curve), _kl(curve))
                )
                for of in (skipped, saved)
            ]
            found.append(Comparison(bundle, name, *ratios))
    return own, found


def _kl(curve: Sequence[Point]) -> npt.NDArray[np.float64]:
    return np.array([point.quality.kl.value for point in curve])


def power_at(at: npt.ArrayLike, x: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """y at these x, between known points taken to be a power of x (a chord would lie above); the points in any order,
    those that are not above 0 left out. NaN further outside than MARGIN, and where two points are not left.
    """
    where, known, values = (np.asarray(each, np.float64) for each in (at, x, y))
    good = (known > 0) & (values > 0)
    if good.sum() < 2:
        return np.full(where.shape, np.nan)
    order = np.argsort(known[good])
    known, values = np.log(known[good][order]), np.log(values[good][order])
    near = (where > np.exp(known[0]) * (1 - MARGIN)) & (where < np.exp(known[-1]) * (1 + MARGIN))
    place = np.log(np.where(near, where, np.exp(known[0])))
    segment = np.clip(np.searchsorted(known, place) - 1, 0, len(known) - 2)
    slope = np.diff(values) / np.maximum(np.diff(known), 1e-9)
    return np.where(near, np.exp(values[segment] + slope[segment] * (place - known[segment])), np.nan)
