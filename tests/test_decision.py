"""The decision rule and the budget dial, by property."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_export.decision import Action, DialPoint, Setting, decision_rule, trade_off_for
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
    for layer, own in enumerate(damage):
        skip = rule.skips(layer, own, executed)  # type: ignore[attr-defined]
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


@given(gated_sets.filter(bool), trade_offs, st.floats(0, 0.2), st.data())
def test_a_stretch_is_broken_where_that_pays(
    gated: set[int], trade_off: float, launches: float, data: st.DataObject
) -> None:
    """By what it gives: the differential reward of skipping some of it is above 0, or none of it is skipped."""
    together = tuple(sorted(gated))
    cost = costs(gated)
    damage = np.array(data.draw(st.lists(damages, min_size=LAYERS, max_size=LAYERS)))
    rule = decision_rule(LAYERS, gated, cost, trade_off, breaking={together: launches})
    alone = walk(decision_rule(LAYERS, gated, cost, trade_off), damage.tolist())
    skipped = walk(rule, rule.settled(damage[:, None])[:, 0].tolist())
    reward = sum(trade_off * cost[layer] - damage[layer] for layer in gated if alone[layer]) - trade_off * launches
    if abs(reward) > 1e-9:
        assert skipped == (alone if reward > 0 or not launches else [False] * LAYERS)
    scaled = decision_rule(LAYERS, gated, cost, 2 * trade_off, breaking={together: launches})
    np.testing.assert_allclose(rule.scaled(2.0).limits, scaled.limits)
    assert [price for _, price in rule.scaled(2.0).breaking] == pytest.approx([price for _, price in scaled.breaking])


def test_a_ceiling_breaks_stretches_anyway() -> None:
    """So it leaves the cheap skips, where it takes some."""
    rule = decision_rule(4, (1, 2, 3), dict.fromkeys((1, 2, 3), 1.0), 1.0, 3, {(1, 2, 3): 0.3})
    damage = np.array([[0.0], [0.9], [0.9], [5.0]])
    assert walk(rule, rule.settled(damage)[:, 0].tolist()) == [False, True, True, False]


def test_each_stretch_for_itself() -> None:
    """Layers outside of them, and other tokens, do not pay for one."""
    rule = decision_rule(6, range(1, 6), dict.fromkeys(range(1, 6), 0.1), 1.0, breaking={(1, 2): 0.08, (3, 4): 0.08})
    damage = np.array([[9, 9], [0.05, 0.0], [0.05, 0.3], [0.0, 0.09], [0.3, 0.09], [0.05, 0.05]])
    settled = rule.settled(damage)
    skips = np.array([rule.decide(layer, settled[layer], np.zeros(2, np.int64)) for layer in range(6)])
    np.testing.assert_array_equal(skips, [[0, 0], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1]])


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


DIAL = [
    DialPoint(0.0, 30, 1.0, 0.0),
    DialPoint(2.0, 26, 0.9, 0.1),
    DialPoint(6.0, 22, 0.8, 0.2),
    DialPoint(9.0, 20, 0.75, 0.5),
]


def test_dial_points_and_between() -> None:
    assert trade_off_for(DIAL, budget=1.0) == 0.0
    assert trade_off_for(DIAL, budget=0.9) == pytest.approx(2.0)
    assert trade_off_for(DIAL, budget=0.85) == pytest.approx(12**0.5)  # halfway from 2 to 6, geometrically
    assert trade_off_for(DIAL[::-1], budget=0.75) == pytest.approx(9.0)
    assert trade_off_for(DIAL, skipped=0) == 0.0
    assert trade_off_for(DIAL, skipped=2) == pytest.approx(1.0)
    assert trade_off_for(DIAL, skipped=9) == pytest.approx(54**0.5)
    assert trade_off_for(DIAL, max_kl=0) == 0.0
    assert trade_off_for(DIAL, max_kl=0.15) == pytest.approx(12**0.5)
    assert trade_off_for(DIAL, max_kl=0.5) == pytest.approx(9.0)


@st.composite
def dials(draw: st.DrawFn) -> list[DialPoint]:
    """Trade-offs rise; time and layers mostly fall and KL mostly rises, as measured tables do, but not always."""
    count = draw(st.integers(1, 8))

    def column(strategy: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(strategy, min_size=count, max_size=count))

    steps, times, layers, kls = (column(st.floats(low, high)) for low, high in ((0.1, 5), (0.4, 1), (10, 30), (0, 3)))
    rows = zip(np.cumsum(steps).tolist(), layers, times, kls, strict=True)
    return [DialPoint(0.0, 30, 1.0, 0.0), *(DialPoint(*row) for row in rows)]


AMOUNTS: dict[str, Callable[[DialPoint], float]] = {
    "budget": lambda point: 1 - point.time,
    "skipped": lambda point: 30 - point.layers,
    "max_kl": lambda point: point.kl,
}


@pytest.mark.parametrize("name", AMOUNTS)
@given(dials(), st.floats(0, 1), st.floats(0, 1))
def test_the_dial_is_monotone_exact_and_bounded(name: str, dial: list[DialPoint], one: float, other: float) -> None:
    """What is asked for is got by interpolation, first met there; more than there is, is an error."""
    amount = AMOUNTS[name]
    most = max(amount(point) for point in dial)

    def ask(wanted: float) -> float:
        return trade_off_for(dial, **{name: 1 - wanted if name == "budget" else wanted})

    less, more = sorted((one * most, other * most))
    assert ask(less) <= ask(more) + 1e-6

    def place(trade_off: float) -> float:
        """Straight up to the first point, in ratios from there on."""
        first = dial[1].trade_off
        return trade_off / first if trade_off < first else 1 + float(np.log(trade_off / first))

    found = np.interp(place(ask(more)), [place(point.trade_off) for point in dial], [amount(point) for point in dial])
    assert found == pytest.approx(more, abs=1e-6)
    assert all(amount(point) <= more + 1e-6 for point in dial if point.trade_off < ask(more))
    if name != "budget" or most < 0.98:
        with pytest.raises(PolicyError, match="more than this policy can give"):
            ask(most + 0.01)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"budget": 0.7}, "take 0.750 of the dense time"),
        ({"skipped": 10.5}, r"skip 10\.00 layers"),
        ({"max_kl": 0.6}, r"diverge by 0\.5000 nats"),
    ],
)
def test_too_much_says_what_there_is(asked: dict[str, float], expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        trade_off_for(DIAL, **asked)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan")])
def test_bad_budget(budget: float) -> None:
    with pytest.raises(PolicyError, match="budget"):
        trade_off_for(DIAL, budget=budget)


@pytest.mark.parametrize("amount", [-0.1, float("nan"), float("inf")])
def test_bad_amounts(amount: float) -> None:
    for name in ("skipped", "max_kl"):
        with pytest.raises(PolicyError, match=name):
            trade_off_for(DIAL, **{name: amount})


def test_no_table() -> None:
    with pytest.raises(PolicyError, match="no calibrated dial"):
        trade_off_for([], budget=0.9)


def test_kinds_follow_from_what_is_given() -> None:
    assert Setting().kind == "dense"
    assert Setting(skip=()).kind == "static"
    assert Setting(skipped=2.0).kind == "token"
    assert Setting("sequence", max_layers=20).asks_network
    assert not Setting("random", skipped=2.0).asks_network


BAD_SETTINGS: dict[str, tuple[Setting, str]] = {
    "unknown": (Setting("magic"), "Known: dense, static"),
    "dense-with-budget": (Setting("dense", budget=0.9), "budget belongs to the policies static, cosine, random"),
    "cosine-with-list": (Setting("cosine", skip=(2,)), "skip belongs to the policies static, not"),
    "static-with-kl": (Setting("static", max_kl=0.1), "sequence, token"),
    "random-with-bound": (Setting("random", max_layers=20), "max_layers belongs"),
    "two": (Setting(budget=0.9, skipped=2.0), "not both"),
    "static-two": (Setting("static", skipped=2.0, max_layers=20), "not both"),
    "none": (Setting("sequence"), "Say how much"),
    "hold-without-budget": (Setting("token", skipped=3.0, hold=True), "give the budget"),
    "hold-sequence": (Setting("sequence", budget=0.9, hold=True), "token policy"),
    "seed": (Setting("random", skipped=2.0, seed=-1), "seed"),
    "budget": (Setting("static", budget=0.0), r"\(0, 1\]"),
    "negative": (Setting("random", skipped=-1.0), "finite"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name: str) -> None:
    setting, expected = BAD_SETTINGS[name]
    with pytest.raises(PolicyError, match=expected):
        setting.check()


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_a_bound_may_stand_beside_the_dial(kind: str) -> None:
    Setting(kind, budget=0.9, max_layers=20).check()
    Setting(kind, max_layers=20).check()
