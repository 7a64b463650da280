"""Exchange rates and frontier points from real engines."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import Setting
from dash_export.errors import RequestError
from dash_export.measure.candidates import candidates
from dash_export.measure.exchange import Point, frontier, token_kl_share
from dash_export.measure.intervals import Interval
from dash_export.measure.score import Result
from dash_export.measure.texts import JudgedText, windows
from dash_export.measure.timing import Timing
from dash_export.text.chats import Continuation
from tests.measure.test_score import SETTINGS, TEXT


def point(kind: str, time: float, kl: float = 0.1, more: float = 0.0, spread: float = 0.0, build: str = "") -> Point:
    """`more` perplexity; its bounds and those of the time are as far as `spread`."""
    figures = {
        "kl": Interval(kl, 0.9 * kl, 1.2 * kl),
        "perplexity": Interval(30 + 10 * kl, 25.0, 60.0),
        "perplexity_ratio": Interval(1 + more, 1 + more - spread, 1 + more + spread),
    }
    quality = Result(build, Setting(kind), 100, 30.0, time, 4, figures)
    return Point(quality, Timing(time, time - spread / 10, time + spread / 10, 5.0, time, 9.0))


def test_exchange_rate() -> None:
    """Paid per saved, per cent by per cent; beside a slower and better build it is dense that pays and saves."""
    rate = point("token", 0.9, more=0.025).exchange_rate
    assert rate is not None
    assert rate.value == pytest.approx(0.25)
    assert (rate.low, rate.high) == pytest.approx((0.25, 0.25))
    slower = point("dense", 1.25, more=-0.04).exchange_rate
    assert slower is not None
    assert slower.value == pytest.approx((1 / 0.96 - 1) / (1 - 1 / 1.25))
    ratio = {"perplexity_ratio": Interval(0.95, 0.9, 0.96)}
    slow = point("dense", 1.2, spread=1e-6)
    lopsided = replace(slow, quality=replace(slow.quality, figures=ratio)).exchange_rate
    assert lopsided is not None
    expected = [(1 / paid - 1) / (1 - 1 / 1.2) for paid in (0.95, 0.96, 0.9)]
    assert [lopsided.value, lopsided.low, lopsided.high] == pytest.approx(expected)
    assert point("static", 0.99, more=0.1, spread=0.2).exchange_rate is None, "it may have saved nothing"
    assert replace(point("token", 0.9), timing=None).exchange_rate is None
    few = replace(
        point("token", 0.9, more=0.02, spread=0.01), timing=Timing(0.9, 0.9, 0.9, 5.0, 0.9, 9.0)
    ).exchange_rate
    assert few is not None
    assert few.low == few.value == few.high == pytest.approx(0.2), "of too few rounds"


def test_little_that_is_surely_saved_makes_a_rate_that_may_be_high() -> None:
    paid = replace(point("token", 0.896, more=0.018), timing=Timing(0.896, 0.85, 0.964, 5.0, 0.9, 9.0)).exchange_rate
    assert paid is not None
    assert (paid.low, paid.high) == pytest.approx((0.018 / 0.15, 0.018 / 0.036))


@pytest.mark.parametrize(("time", "more"), [(0.9, 0.05), (1.2, -0.05), (0.9, -0.05), (1.2, 0.05)])
def test_bounds_of_an_exchange_rate_cover_it(time: float, more: float) -> None:
    """Of draws with these errors, about 95 % lie inside."""
    rate = point("token", time, more=more, spread=0.02).exchange_rate
    assert rate is not None
    rng = np.random.default_rng(0)
    paid = 1 + more + 0.02 / 1.96 * rng.standard_normal(20000)
    took = time + 0.002 / 1.96 * rng.standard_normal(20000)
    rates = (paid - 1) / (1 - took) if time < 1 else (1 / paid - 1) / (1 - 1 / took)
    assert 0.93 < ((rates > rate.low) & (rates < rate.high)).mean() < 0.97


def test_the_token_policy_at_equal_time() -> None:
    """Along chords from dense on; not beyond its last point, nor by what may have saved nothing."""
    points = [point("dense", 1.0, 0.0), point("token", 0.9, 0.1), point("token", 0.8, 0.3)]
    points += [point("static", 0.95, 0.1), point("static", 0.85, 0.4), point("static", 0.7, 0.5)]
    points += [point("dense", 0.9, 0.2, build="pruned"), point("dense", 1.3, 0.01, build="int8")]
    assert token_kl_share(points) == pytest.approx([None, None, None, 0.5, 0.5, None, 0.5, None])
    unsure = replace(points[1], timing=Timing(0.9, 0.7, 1.1, 5.0, 0.9, 9.0))
    assert token_kl_share([points[0], unsure, points[2], points[6]])[3] == pytest.approx(0.15 / 0.2)
    assert token_kl_share([points[0], points[3]]) == [None, None]


def test_points(runtime: DashRuntime, tiny_runtime: Callable[..., DashRuntime]) -> None:
    compared = candidates(runtime, (SETTINGS[0], SETTINGS[2]), [("other", tiny_runtime("portable"))])
    items = [Continuation(ids, 10) for ids in windows(runtime, TEXT, "t", 2, 48)]
    measured = partial(frontier, compared, JudgedText("t", Path("t"), items))
    points = measured(rounds=1, tokens=8)
    assert [point.name for point in points] == ["dense", "token", "other"]
    assert points[0].time == 1.0
    assert points[1].kl.value > 0
    assert all(point.timing is not None and point.time == point.timing.ratio > 0 for point in points)
    dense = [one.runtime.cost.dense_us / runtime.cost.dense_us for one in compared]
    predicted = [point.quality.time * own for point, own in zip(points, dense, strict=True)]
    assert [point.time for point in measured(rounds=0)] == predicted
    assert predicted[2] == dense[2] != 1, "of the first build's dense"
    with pytest.raises(RequestError, match="do not fit"):
        measured(rounds=1, tokens=600)
