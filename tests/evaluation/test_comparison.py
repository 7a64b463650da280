"""One curve beside another: at equal layers, at equal time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dash_export.decision import Setting
from dash_export.evaluation.bootstrap import Interval
from dash_export.evaluation.comparison import compare, power_at
from dash_export.evaluation.frontier import Point
from dash_export.evaluation.results import TextResult
from dash_export.evaluation.timing import Timing


def point(kind: str, skipped: float, time: float, kl: float, bundle: str = "a") -> Point:
    around = Interval(kl, kl, kl)
    setting = replace(Setting(kind), skipped=skipped or None)
    return Point(bundle, TextResult(setting, 100, 30 - skipped, time, 4, around, around, around, around), None)


def test_a_power_is_read_as_one() -> None:
    x = np.array([4.0, 1.0, 2.0])
    np.testing.assert_allclose(
        power_at([1.0, 1.5, 3.0, 4.4], x, 0.02 * x**1.4), 0.02 * np.array([1, 1.5, 3, 4.4]) ** 1.4
    )
    assert np.isnan(power_at([0.5, 6.0], x, x)).all(), "too far from what is known"
    assert np.isnan(power_at([1.0], [1.0, -1.0, 1.0], [1.0, 2.0, 3.0])).all(), "one point is no curve"


def test_at_equal_layers_and_at_equal_time() -> None:
    """static has twice the KL per layer and takes half as much time off."""
    points = [point("dense", 0, 1.0, 0.0), *(point("static", k, 1 - 0.01 * k, 0.04 * k) for k in (2, 4, 8))]
    points += [point("token", k, 1 - 0.02 * k, 0.02 * k) for k in (2, 3, 8)]
    points += [point("dense", 0, 1.0, 0.0, "b"), point("random", 2, 1.01, 0.3, "b"), point("random", 4, 1.02, 0.5, "b")]
    own, (static, random) = compare(points)
    assert [each.quality.setting.kind for each in own] == ["token"] * 3
    assert static.layers == pytest.approx((0.5, 0.5, 0.5))
    assert static.time[:2] == pytest.approx((0.25, 0.25))
    assert static.time[2] is None
    assert (random.bundle, random.kind, random.time) == ("b", "random", (None, None, None))
    assert compare(points[:4]) == ([], [])


def test_what_may_have_saved_nothing_is_no_point() -> None:
    """Its time would be read as if it were known."""
    points = [point("dense", 0, 1.0, 0.0), point("static", 2, 0.999, 0.5), point("static", 8, 0.8, 0.6)]
    points[1] = replace(points[1], timing=Timing(0.999, 0.98, 1.02, 5.0, 28.0))
    points.append(point("token", 4, 0.9, 0.1))
    _, (static,) = compare(points)
    assert static.time == pytest.approx((0.1 / 0.3,))
