"""Decode times and frontier points from real engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.bundle import Bundle
from dash_export.decision import Setting
from dash_export.errors import RequestError
from dash_export.evaluation.frontier import COPY_ROUNDS, Course, Racer
from dash_export.evaluation.timing import SETTLE, Timing, measure_times, ratios_to_first
from dash_export.runtime import Session
from tests.evaluation.test_text import SETTINGS, TEXT
from tests.tiny import random_ids


def test_times(runtime: DashRuntime) -> None:
    parts = [random_ids(40, seed=seed) for seed in range(6)]
    seen: list[Session] = []

    def opened(setting: Setting, _number: int) -> Session:
        seen.append(runtime.session_with(setting))
        return seen[-1]

    times = measure_times(SETTINGS, opened, parts, tokens=10)
    assert len(seen) == len(SETTINGS) * len(parts)
    # Every setting went through the same text, to its end.
    assert {tuple(session.tokens) for session in seen} == {tuple(part.tolist()) for part in parts}
    assert (times[0].ratio, times[0].low, times[0].high) == (1.0, 1.0, 1.0)
    assert [time.layers for time in times[:2]] == [6, 4]
    assert all(0 < time.low <= time.ratio <= time.high for time in times)
    assert all(time.milliseconds > 0 for time in times)


def test_what_a_round_has_in_common_is_no_ratio() -> None:
    """A machine that is up to three times slower in whole rounds, and 5 % of noise in every block."""
    rng = np.random.default_rng(0)
    true = np.linspace(1.0, 0.6, 8)
    seconds = true[:, None] * rng.uniform(1, 3, 200) * np.exp(0.05 * rng.standard_normal((8, 200)))
    ratio, low, high = ratios_to_first(seconds)
    np.testing.assert_allclose(ratio, true, rtol=0.015)
    assert ((low <= ratio) & (ratio <= high)).all()
    assert 0.005 < (high - low)[1:].mean() < 0.03


def test_rounds_that_have_something_in_common_are_drawn_together() -> None:
    """Eight copies of the engines, four rounds each: 32 rounds know no more than eight."""
    rng = np.random.default_rng(1)
    seconds = np.exp(np.repeat(0.05 * rng.standard_normal((3, 8)), 4, axis=1))
    alone, grouped = (np.subtract(*ratios_to_first(seconds, together)[:0:-1])[1:] for together in (1, 4))
    assert grouped.mean() > 1.3 * alone.mean()


def test_an_interval_wants_several_groups() -> None:
    """Of two groups the quantiles are the groups themselves; and a last one that is short counts once."""
    rng = np.random.default_rng(2)
    seconds = np.exp(0.05 * rng.standard_normal((3, 25)))
    few = ratios_to_first(seconds[:, :20], 4)
    np.testing.assert_array_equal(few[1:], [few[0], few[0]])
    odd = seconds.copy()
    odd[1:, 24] *= 50  # alone in its group: four times over it would be 4 of 28
    low, high = ratios_to_first(odd, 4)[1:]
    assert (high[1:] < 1.05).all()
    assert (low < high)[1:].all()
    rounds = {count: Course("", "", 1, 1, 1, count, 1).copy_rounds for count in (1, 8, 12, 24, 32)}
    assert rounds == {1: 1, 8: 1, 12: 2, 24: 4, 32: 4}


def test_timed_layers_are_those_a_score_takes(runtime: DashRuntime) -> None:
    part = random_ids(40, seed=5)
    pair = (SETTINGS[0], SETTINGS[3])
    (dense, token) = measure_times(pair, lambda setting, _: runtime.session_with(setting), [part], tokens=12)
    actions = runtime.session_with(SETTINGS[3]).score(part, prefix=len(part) - 12 - SETTLE).actions
    assert dense.layers == 6
    assert token.layers == pytest.approx(6 - actions[-12:].sum() / 12)


def test_time_is_moved_to_the_layers_of_the_quality() -> None:
    timing = Timing(0.9, 0.88, 0.94, 5.0, 28.0)
    moved = timing.at(26.0, 30.0)
    assert (moved.ratio, moved.low, moved.high, moved.layers) == pytest.approx((0.8, 0.76, 0.88, 26.0))
    assert moved.milliseconds == pytest.approx(5.0 * 0.8 / 0.9)
    assert Timing(0.99, 0.9, 1.0, 5.0, 29.5).at(26.0, 30.0).ratio == 0.99


def test_points(tiny_root: Path) -> None:
    racer = Racer("tiny", Bundle.open(tiny_root), "cpu-fp32", None)
    assert (racer.plain.dispatch, racer.deciding.dispatch) == ("plain", "fused")
    # Timed engines are none of those loaded first, and after a few rounds they are loaded anew.
    rounds = (0, 1, COPY_ROUNDS, COPY_ROUNDS + 1)
    sessions = [racer.timed_session(SETTINGS[kind], number) for number in rounds for kind in (1, 3)]
    engines = [session.engines for session in sessions]
    assert [each.dispatch for each in engines] == ["plain", "fused"] * 4
    assert engines[:2] == engines[2:4]
    assert engines[4:6] == engines[6:]
    assert len({id(each) for each in (*engines, racer.plain.engines, racer.deciding.engines)}) == 6
    drawn = [racer.timed_session(Setting("random", skipped=1), number).rules for number in range(12)]
    assert len({tuple(rules.at(20, 1).skipped) for rules in drawn}) > 1, "every round has draws of its own"
    course = Course(TEXT, "t", limit=2, window=48, prefix=10, rounds=2, tokens=4)
    points = racer.points(SETTINGS, course, racer.texts(course))
    assert [point.quality.setting for point in points] == list(SETTINGS)
    assert points[0].time == 1.0
    assert points[1].quality.kl.value > 0
    assert all(point.timing is not None and point.time == point.timing.ratio for point in points)
    course = Course(TEXT, "t", 2, 48, 10, 0, 4)
    untimed = racer.points(SETTINGS, course, racer.texts(course))
    assert [point.time for point in untimed] == [point.quality.time for point in points]
    np.testing.assert_allclose(
        [point.quality.kl.value for point in untimed], [point.quality.kl.value for point in points]
    )
    with pytest.raises(RequestError, match="do not fit"):
        racer.texts(Course(TEXT, "t", 2, 48, 10, 2, 600))
