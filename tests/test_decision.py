"""The decision rule and the budget dial, by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_export.decision import Action, DialPoint, decision_rule, trade_off_for_budget
from dash_export.errors import PolicyError

LAYERS = 12
gated_sets = st.sets(st.integers(1, LAYERS - 1), max_size=LAYERS - 2)
trade_offs = st.floats(0, 1e6, allow_nan=False)
damages = st.floats(0, 1e6, width=32, allow_nan=False)


def costs(gated: set[int], scale: float = 0.03) -> dict[int, float]:
    return {layer: scale * (1 + layer % 3) for layer in gated}


def walk(rule: object, damage: list[float]) -> list[bool]:
    """One token through every layer: which it skips."""
    executed, skipped = 0, []
    for layer in range(LAYERS):
        skip = rule.skips(layer, damage[layer], executed)  # type: ignore[attr-defined]
        skipped.append(skip)
        executed += not skip
    return skipped


@given(gated_sets, trade_offs, st.lists(damages, min_size=LAYERS, max_size=LAYERS), st.integers(0, LAYERS))
def test_one_token_and_many_agree(gated: set[int], trade_off: float, damage: list[float], executed: int) -> None:
    rule = decision_rule(LAYERS, gated, costs(gated), trade_off)
    for layer in range(LAYERS):
        for count in (executed, 0):
            actions = rule.decide(layer, np.array([damage[layer]], np.float32), np.array([count]))
            assert actions.dtype == np.int8
            assert (actions[0] == Action.SKIP) == rule.skips(layer, damage[layer], count)


@given(gated_sets, st.lists(damages, min_size=LAYERS, max_size=LAYERS))
def test_zero_is_dense(gated: set[int], damage: list[float]) -> None:
    assert not any(walk(decision_rule(LAYERS, gated, costs(gated), 0.0), damage))


@given(gated_sets, trade_offs, st.data())
def test_max_layers_is_respected_and_feasible(gated: set[int], trade_off: float, data: st.DataObject) -> None:
    most = data.draw(st.integers(LAYERS - len(gated), LAYERS))
    damage = data.draw(st.lists(damages, min_size=LAYERS, max_size=LAYERS))
    skipped = walk(decision_rule(LAYERS, gated, costs(gated), trade_off, most), damage)
    assert LAYERS - sum(skipped) <= most
    assert {layer for layer, skip in enumerate(skipped) if skip} <= gated


@given(gated_sets, st.data())
def test_max_layers_alone_runs_exactly_that_many(gated: set[int], data: st.DataObject) -> None:
    most = data.draw(st.integers(LAYERS - len(gated), LAYERS))
    assert LAYERS - sum(walk(decision_rule(LAYERS, gated, costs(gated), 0.0, most), [1.0] * LAYERS)) == most


@given(gated_sets.filter(bool), st.lists(damages, min_size=LAYERS, max_size=LAYERS), trade_offs, trade_offs)
def test_a_larger_trade_off_never_skips_less(gated: set[int], damage: list[float], one: float, other: float) -> None:
    low, high = (
        walk(decision_rule(LAYERS, gated, costs(gated), trade_off), damage) for trade_off in sorted((one, other))
    )
    assert all(b or not a for a, b in zip(low, high, strict=True))


def test_uneven_costs_change_decisions() -> None:
    """The same damage is worth it where much time is saved and not where little is."""
    rule = decision_rule(4, (1, 2), {1: 0.5, 2: 0.01}, 1.0)
    assert walk_four(rule, 0.1) == [False, True, False, False]
    even = decision_rule(4, (1, 2), {1: 0.2, 2: 0.2}, 1.0)
    assert walk_four(even, 0.1) == [False, True, True, False]


def walk_four(rule: object, damage: float) -> list[bool]:
    return [rule.skips(layer, damage, 0) for layer in range(4)]  # type: ignore[attr-defined]


def test_a_tie_runs() -> None:
    rule = decision_rule(4, (1,), {1: 0.5}, 1.0)
    assert not rule.skips(1, 0.5, 0)
    assert rule.decide(1, np.array([0.5], np.float32), np.array([0]))[0] == Action.RUN


@pytest.mark.parametrize("trade_off", [-1.0, float("nan"), float("inf")])
def test_bad_trade_off(trade_off: float) -> None:
    with pytest.raises(PolicyError, match="trade-off"):
        decision_rule(4, (1,), {1: 0.1}, trade_off)


@pytest.mark.parametrize("most", [-1, 0, 2, 5])
def test_bad_max_layers(most: int) -> None:
    with pytest.raises(PolicyError, match="from 3 to 4"):
        decision_rule(4, (1,), {1: 0.1}, 0.0, most)


DIAL = [DialPoint(0.0, 30, 1.0), DialPoint(2.0, 26, 0.9), DialPoint(6.0, 22, 0.8), DialPoint(9.0, 20, 0.75)]


def test_budget_points_and_between() -> None:
    assert trade_off_for_budget(DIAL, 1.0) == 0.0
    assert trade_off_for_budget(DIAL, 0.9) == pytest.approx(2.0)
    assert trade_off_for_budget(DIAL, 0.85) == pytest.approx(4.0)
    assert trade_off_for_budget(DIAL[::-1], 0.75) == pytest.approx(9.0)


@st.composite
def dials(draw: st.DrawFn) -> list[DialPoint]:
    """Trade-offs rise; time mostly falls, as measured tables do, but not always."""
    count = draw(st.integers(1, 8))
    steps = draw(st.lists(st.floats(0.1, 5), min_size=count, max_size=count))
    times = draw(st.lists(st.floats(0.4, 1.0), min_size=count, max_size=count))
    points = [DialPoint(0.0, 30, 1.0)]
    return points + [DialPoint(t, 20, time) for t, time in zip(np.cumsum(steps).tolist(), times, strict=True)]


@given(dials(), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_budget_is_monotone_and_kept(dial: list[DialPoint], one: float, other: float) -> None:
    tight, loose = sorted((one, other))
    fastest = min(point.time for point in dial)
    if tight < fastest:
        with pytest.raises(PolicyError, match="fastest"):
            trade_off_for_budget(dial, tight)
        tight = fastest
    loose = max(loose, tight)
    assert trade_off_for_budget(dial, tight) >= trade_off_for_budget(dial, loose)
    ordered = sorted(dial, key=lambda point: point.trade_off)
    chosen = trade_off_for_budget(dial, tight)
    interpolated = np.interp(chosen, [point.trade_off for point in ordered], [point.time for point in ordered])
    assert interpolated <= tight + 1e-9


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan")])
def test_bad_budget(budget: float) -> None:
    with pytest.raises(PolicyError, match="budget"):
        trade_off_for_budget(DIAL, budget)


def test_no_table() -> None:
    with pytest.raises(PolicyError, match="no calibrated budget table"):
        trade_off_for_budget([], 0.9)
