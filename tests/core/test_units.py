"""Units, the decision rule and the budget dial, by property."""

from contextlib import suppress
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_export.core.dial import MEASURES, DialPoint, binomial, recommended_budget, trade_off_at_most
from dash_export.core.kinds import Setting
from dash_export.core.rule import decision_rule
from dash_export.core.units import (
    Unit,
    check_units,
    layer_actions,
    parse_layers,
    parse_units,
    unit_skips,
    units_of,
    units_text,
)
from dash_export.errors import PolicyError

LAYERS = 12
UNITS = (Unit(2, 4), Unit(5, 5), Unit(8, 9))
COST, SIZES = (0.2, 0.05, 0.15), np.array([3, 1, 2])
trade_offs = st.floats(0, 1e6, allow_nan=False)
damages = st.lists(st.floats(0, 1e6, width=32), min_size=3, max_size=3).map(lambda own: np.array(own)[:, None])


@st.composite
def some_units(draw: st.DrawFn) -> tuple[Unit, ...]:
    cuts = sorted(draw(st.sets(st.integers(1, LAYERS), min_size=1)))
    gaps = draw(st.lists(st.booleans(), min_size=len(cuts), max_size=len(cuts)))
    ends = zip(cuts, cuts[1:], gaps, strict=False)
    return tuple(Unit(first, stop - 1) for first, stop, taken in ends if taken)


@given(some_units())
def test_units_are_written_and_read(units: tuple[Unit, ...]) -> None:
    check_units(units, units[0].first - 1 if units else 0, LAYERS)
    if units:
        assert parse_units(units_text(units)) == units
        assert parse_layers(units_text(units)) == tuple(layer for unit in units for layer in unit.layers)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1-2-3", "1;2", "9" * 30, "4-3", "²"])
def test_bad_units_are_named(text: str) -> None:
    for parse in (parse_units, parse_layers):
        with pytest.raises(PolicyError, match="written like"):
            parse(text)


@pytest.mark.parametrize(
    ("text", "read", "expected"),
    [
        ("2-4,4-5", 1, "rising order"),
        ("5-6,2-3", 1, "rising order"),
        ("10-12", 1, "layers 0 to 11"),
        ("2-3", 2, "before the first unit"),
        ("0-3", 0, "Layer 0"),
    ],
)
def test_units_that_cannot_be(text: str, read: int, expected: str) -> None:
    with pytest.raises(PolicyError, match=expected):
        check_units(parse_units(text), read, LAYERS)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_skip_maps_and_back(rows: list[tuple[bool, ...]]) -> None:
    skipped = np.array(rows).T
    actions = layer_actions(skipped, UNITS, LAYERS)
    assert (actions.shape, actions.dtype) == ((len(rows), LAYERS), np.int8)
    np.testing.assert_array_equal(actions.sum(axis=1), SIZES @ skipped)
    np.testing.assert_array_equal(unit_skips(actions, UNITS), skipped)


@pytest.mark.parametrize("layers", [(2, 3), (6,), (2, 3, 4, 5, 8)])
def test_parts_of_units_are_refused(layers: tuple[int, ...]) -> None:
    actions = np.zeros((2, LAYERS), np.int8)
    actions[1, list(layers)] = 1
    with pytest.raises(PolicyError, match="whole"):
        unit_skips(actions, UNITS)
    with pytest.raises(PolicyError, match="whole units"):
        units_of(layers, UNITS)
    assert units_of((9, 8, 5), UNITS) == (1, 2)


@given(damages, trade_offs)
def test_skipped_where_damage_is_below_trade_off_times_cost(damage: np.ndarray, trade_off: float) -> None:
    """A tie runs; a trade-off of 0 is dense."""
    skips = decision_rule(UNITS, COST, trade_off).skips(damage)
    assert skips[:, 0].tolist() == [own < trade_off * cost for own, cost in zip(damage[:, 0], COST, strict=True)]
    assert not decision_rule(UNITS, COST, 0.0).skips(damage).any()


@given(st.lists(damages, min_size=1, max_size=4), trade_offs, st.integers(6, LAYERS))
def test_one_token_and_many_agree(rows: list[np.ndarray], trade_off: float, most: int) -> None:
    rule = decision_rule(UNITS, COST, trade_off, most, LAYERS)
    np.testing.assert_array_equal(rule.skips(np.hstack(rows)), np.hstack([rule.skips(row) for row in rows]))


@given(damages, trade_offs, st.integers(6, LAYERS))
def test_max_layers_is_respected_by_the_least_damage(damage: np.ndarray, trade_off: float, most: int) -> None:
    free = decision_rule(UNITS, COST, trade_off).skips(damage)[:, 0]
    bound = decision_rule(UNITS, COST, trade_off, most, LAYERS).skips(damage)[:, 0]
    assert LAYERS - SIZES @ bound <= most
    assert (bound | ~free).all()
    forced = np.flatnonzero(bound & ~free)
    if len(forced):  # none of them is in vain, and no unit of less damage per layer runs
        rate = damage[:, 0] / SIZES
        worst = forced[np.argmax(rate[forced])]
        assert LAYERS - SIZES @ bound + SIZES[worst] > most
        assert all(rate[forced].max() <= rate[unit] for unit in np.flatnonzero(~bound))


@pytest.mark.parametrize(
    ("trade_off", "most", "said"),
    [
        *((value, None, "trade-off") for value in (-1.0, float("nan"), float("inf"))),
        *((0.0, value, "from 6 to 12") for value in (-1, 5, 13)),
    ],
)
def test_a_rule_that_cannot_be(trade_off: float, most: int | None, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        decision_rule(UNITS, COST, trade_off, most, LAYERS)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "dense"),
        ({"skip": ()}, "static"),
        ({"policy": "static", "skipped": 2.0}, "static"),
        ({"skipped": 2.0}, "token"),
        ({"max_layers": 20}, "token"),
        ({"budget": 0.9, "max_layers": 20}, "token"),
    ],
)
def test_kinds_follow_from_what_is_given(given: dict[str, object], expected: str) -> None:
    setting = Setting(**given)  # type: ignore[arg-type]
    setting.check()
    assert setting.kind == expected


BAD_SETTINGS: dict[str, tuple[Setting, str]] = {
    "unknown": (Setting("magic"), "Known: dense, static, token"),
    "dense-with-budget": (Setting("dense", budget=0.9), "budget belongs to the policies static, token"),
    "token-with-list": (Setting("token", skip=(2,)), "skip belongs to the policies static, not"),
    "static-with-kl": (Setting("static", max_kl=0.1), "policies token"),
    "two": (Setting(budget=0.9, skipped=2.0), "not both"),
    "static-two": (Setting("static", skipped=2.0, max_layers=20), "not both"),
    "none": (Setting("token"), "Say how much"),
    **{f"budget {value}": (Setting(budget=value), r"\(0, 1\]") for value in (0.0, -0.5, 1.01)},
    **{name: (Setting(**{name: -0.1}), f"{name} must be a finite number >= 0") for name in ("skipped", "max_kl")},
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name: str) -> None:
    setting, expected = BAD_SETTINGS[name]
    with pytest.raises(PolicyError, match=expected):
        setting.check()


@pytest.mark.parametrize(
    ("dial", "budget"),
    [
        ([(1.0, 1.0), (0.9, 1.01), (0.8, 1.03)], 0.85),
        ([(1.0, 1.0), (0.98, 1.03)], None),
        ([(1.0, 1.0), (0.8, 1.01)], 0.8),
        ([(1.0, 1.0), (0.80049, 1.01)], 0.801),
        ([(1.0, 1.0)], None),
        ([], None),
        ([(1.0, 1.05), (0.8, 1.01)], None),
    ],
    ids=["between", "too little time", "never so much", "no faster than the dial", "dense only", "no dial", "nonsense"],
)
def test_the_recommended_budget(dial: list[tuple[float, float]], budget: float | None) -> None:
    points = [DialPoint(place, 30, time, 0.0, perplexity) for place, (time, perplexity) in enumerate(dial)]
    assert recommended_budget(points, MEASURES["prompt"]) == budget


def test_at_most_takes_the_largest_sure_saving() -> None:
    dial = [DialPoint(0.0, 5, 1.0, 0.0)]
    dial += [
        DialPoint(float(at), 5 - at, 1 - at / 10, 0.0, differing=count, judged=400)
        for at, count in ((1, 0), (2, 1), (3, 9), (4, 0))
    ]
    assert trade_off_at_most(dial, 0.02, 0.95) == 2.0  # 9 of 400 may be more than 2 %; what follows is not looked at
    assert trade_off_at_most(dial, 0.05, 0.95) == 4.0
    with pytest.raises(PolicyError, match="400 were judged and 2995 are needed"):
        trade_off_at_most(dial, 0.001, 0.95)
    with pytest.raises(PolicyError, match="no count of differing answers"):
        trade_off_at_most([DialPoint(0.0, 5, 1.0, 0.0), DialPoint(1.0, 4, 0.9, 0.0)], 0.1, 0.95)


@pytest.mark.parametrize(("count", "trials", "share"), [(0, 10, 0.1), (3, 10, 0.25), (9, 400, 0.02), (10, 10, 0.3)])
def test_the_binomial_sum(count: int, trials: int, share: float) -> None:
    expected = sum(comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(count + 1))
    assert binomial(count, trials, share) == pytest.approx(expected, rel=1e-9)


def test_the_promise_holds_as_often_as_it_says() -> None:
    """Of many calibrations by samples, at most 10 % promise a share that the truth breaks, at confidence 0.9."""
    rng, truth = np.random.default_rng(0), np.array([0.005, 0.0205, 0.05])
    broken, trials = 0, 400
    for _ in range(trials):
        counts = rng.binomial(500, truth)
        dial = [DialPoint(0.0, 5, 1.0, 0.0)]
        dial += [DialPoint(at + 1.0, 4, 0.9, 0.0, differing=int(n), judged=500) for at, n in enumerate(counts)]
        with suppress(PolicyError):  # nothing is promised
            broken += truth[int(trade_off_at_most(dial, 0.02, 0.9)) - 1] > 0.02
    assert 0 < broken <= trials * (0.1 + 3 * (0.1 * 0.9 / trials) ** 0.5)
