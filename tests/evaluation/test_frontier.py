"""Decode times of processes, exchange rates and frontier points from real engines."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.errors import BackendError, RequestError
from dash_export.evaluation.alone import SETTLE, run_alone
from dash_export.evaluation.bootstrap import Interval
from dash_export.evaluation.frontier import Course, Point, frontier, of_token
from dash_export.evaluation.results import TextResult
from dash_export.evaluation.settings import Entrant, entrants
from dash_export.evaluation.timing import FEWEST_ROUNDS, Timing, measure_times, ratios_to_first
from tests.evaluation.test_text import SETTINGS, TEXT
from tests.forged import edit
from tests.tiny import random_ids


def test_a_process_takes_what_a_score_takes(runtime: DashRuntime) -> None:
    ids = random_ids(60, seed=5)
    entrant = Entrant(runtime, SETTINGS[2])
    alone = run_alone(entrant, ids.tolist(), 20)
    assert alone is not None
    assert 0 < alone.seconds < 1
    assert 1 << 24 < alone.peak_memory < 1 << 31
    entrant.took(entrant.session().score(ids, prefix=20).actions[20 + SETTLE :])
    assert (alone.layers, alone.predicted) == pytest.approx((entrant.layers, entrant.time))


def test_a_process_takes_no_module_from_the_current_folder(
    runtime: DashRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dash_export.py").write_text("raise SystemExit('pwned')")
    monkeypatch.chdir(tmp_path)
    assert run_alone(Entrant(runtime, Setting("dense")), [1, 2, 3], 2) is not None


def test_a_process_that_fails_or_is_killed(
    runtime: DashRuntime, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = DashRuntime.load(own_bundle, "cpu-fp32")
    (own_bundle / "manifest.json").unlink()
    with pytest.raises(BackendError, match="is not a finished bundle"):
        run_alone(Entrant(broken, Setting("dense")), [1, 2, 3], 2)
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert run_alone(Entrant(runtime, Setting("dense")), [1, 2, 3], 2) is None
    with pytest.raises(BackendError, match="was killed"):
        measure_times(entrants(runtime, SETTINGS[:1]), [random_ids(50)], 10)


def test_a_process_times_what_was_judged(own_bundle: Path) -> None:
    judged = Entrant(DashRuntime.load(own_bundle, "cpu-fp32"), Setting("dense"))
    edit(own_bundle / "engines/cpu-fp32/build.json", lambda data: data.update(seconds=data["seconds"] + 1))
    with pytest.raises(BackendError, match=r"own\.dash was replaced while it was measured"):
        run_alone(judged, [1, 2, 3], 2)


def test_what_a_round_has_in_common_is_no_ratio() -> None:
    """A machine that is up to three times slower in whole rounds, and 5 % of noise in every block."""
    rng = np.random.default_rng(0)
    true = np.linspace(1.0, 0.6, 8)
    seconds = true[:, None] * rng.uniform(1, 3, 200) * np.exp(0.05 * rng.standard_normal((8, 200)))
    ratio, low, high = ratios_to_first(seconds)
    np.testing.assert_allclose(ratio, true, rtol=0.015)
    assert ((low <= ratio) & (ratio <= high)).all()
    assert 0.005 < (high - low)[1:].mean() < 0.03
    few = ratios_to_first(seconds[:, : FEWEST_ROUNDS - 1])
    np.testing.assert_array_equal(few[1:], [few[0], few[0]])


def test_time_is_moved_to_the_tokens_of_the_quality() -> None:
    timing = Timing(0.9, 0.88, 0.94, 5.0, 0.8)
    moved = timing.at(0.6)
    assert (moved.ratio, moved.low, moved.high, moved.predicted) == pytest.approx((0.8, 0.76, 0.88, 0.6))
    assert moved.milliseconds == pytest.approx(5.0 * 0.8 / 0.9)
    assert Timing(0.99, 0.9, 1.0, 5.0, 0.99).at(0.6).ratio == 0.99


def point(kind: str, time: float, kl: float = 0.1, more: float = 0.0, spread: float = 0.0, build: str = "") -> Point:
    """`more` perplexity; its bounds and those of the time are as far as `spread`."""
    around = Interval(kl, kl, kl)
    ratio = Interval(1 + more, 1 + more - spread, 1 + more + spread)
    quality = TextResult(build, Setting(kind), 100, 30.0, time, 4, around, around, ratio, around)
    return Point(quality, Timing(time, time - spread / 10, time + spread / 10, 5.0, time))


def test_exchange_rate() -> None:
    """Paid per saved, per cent by per cent; what costs time and lowers perplexity has a rate too."""
    rate = point("token", 0.9, more=0.025).exchange_rate
    assert rate is not None
    assert rate.value == pytest.approx(0.25)
    assert (rate.low, rate.high) == pytest.approx((0.25, 0.25))
    slower = point("dense", 1.25, more=-0.04).exchange_rate
    assert slower is not None
    assert slower.value == pytest.approx(0.16)
    assert point("static", 0.99, more=0.1, spread=0.2).exchange_rate is None, "it may have saved nothing"
    assert replace(point("token", 0.9), timing=None).exchange_rate is None


@pytest.mark.parametrize(("time", "more"), [(0.9, 0.05), (1.2, -0.05), (0.9, -0.05), (1.2, 0.05)])
def test_bounds_of_an_exchange_rate_cover_it(time: float, more: float) -> None:
    """Of draws with these errors, about 95 % lie inside."""
    rate = point("token", time, more=more, spread=0.02).exchange_rate
    assert rate is not None
    rng = np.random.default_rng(0)
    drawn_more = more + 0.02 / 1.96 * rng.standard_normal(20000)
    drawn_time = time + 0.002 / 1.96 * rng.standard_normal(20000)
    rates = drawn_more / (1 - drawn_time)
    assert 0.93 < ((rates > rate.low) & (rates < rate.high)).mean() < 0.97


def test_the_token_policy_at_equal_time() -> None:
    """Along chords from dense on; not beyond its last point, nor by what may have saved nothing."""
    points = [point("dense", 1.0, 0.0), point("token", 0.9, 0.1), point("token", 0.8, 0.3)]
    points += [point("static", 0.95, 0.1), point("static", 0.85, 0.4), point("static", 0.7, 0.5)]
    points += [point("dense", 0.9, 0.2, build="pruned"), point("dense", 1.3, 0.01, build="int8")]
    assert of_token(points) == pytest.approx([None, None, None, 0.5, 0.5, None, 0.5, None])
    unsure = replace(points[1], timing=Timing(0.9, 0.7, 1.1, 5.0, 0.9))
    assert of_token([points[0], unsure, points[2], points[6]])[3] == pytest.approx(0.15 / 0.2)
    assert of_token([points[0], points[3]]) == [None, None]


def test_points(runtime: DashRuntime, tiny_runtime: Callable[..., DashRuntime]) -> None:
    racers = entrants(runtime, (SETTINGS[0], SETTINGS[2]), [("other", tiny_runtime("portable"))])
    course = Course(TEXT, "t", limit=2, window=48, prefix=10, rounds=1, tokens=8)
    points = frontier(racers, course)
    assert [point.name for point in points] == ["dense", "token", "other"]
    assert [point.label for point in points] == ["dense", "token, skipped 1.5", "other"]
    assert points[0].time == 1.0
    assert points[1].quality.kl.value > 0
    assert all(point.timing is not None and point.time == point.timing.ratio > 0 for point in points)
    json.dumps([point.exchange_rate is None for point in points])
    fresh = entrants(runtime, (SETTINGS[0], SETTINGS[2]))
    untimed = frontier(fresh, replace(course, rounds=0))
    assert [point.time for point in untimed] == [point.quality.time for point in points[:2]]
    with pytest.raises(RequestError, match="do not fit"):
        frontier(fresh, replace(course, tokens=600))
