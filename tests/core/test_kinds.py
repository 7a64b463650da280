"""Every policy kind: what it skips, what it refuses, and how a budget is held."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.dial import CostTable, DialPoint, trade_off_for
from dash_export.core.kinds import HOLD_RANGE, Served, SessionRules, Setting, kinds_of, session_rules
from dash_export.core.rule import DecisionRule, decision_rule
from dash_export.errors import PolicyError
from tests.tiny import TINY_UNITS, random_ids

LoadRuntime = Callable[..., DashRuntime]


def test_each_unit_is_weighed_by_its_own_cost(runtime: DashRuntime) -> None:
    build = replace(runtime.build, cost=replace(runtime.cost, cost=(0.3, 0.02)))
    manifest = runtime.bundle.manifest
    rule = session_rules(
        Setting("token", trade_off=2.0), Served(manifest.model, manifest.policy, build.cost, build.dial)
    ).rule
    assert isinstance(rule, DecisionRule)
    assert rule.limits == pytest.approx((0.6, 0.04))


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ({"skipped": 1}, [4]),
        ({"skipped": 1.5}, [2, 3, 4]),
        ({"max_layers": 5}, [4]),
        ({"max_layers": 4}, [2, 3, 4]),
        ({"budget": 0.9}, [4]),
        ({"budget": 0.89}, [2, 3, 4]),
        ({"skip": (2, 3)}, [2, 3]),
        ({"skip": ()}, []),
    ],
)
def test_static_skips_the_fewest_units_that_are_as_much(
    amount: dict[str, Any], expected: list[int], runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "build", replace(runtime.build, cost=replace(runtime.cost, cost=(0.2, 0.1))))
    actions = runtime.generate(random_ids(8), 4, policy="static", **amount).actions
    assert [np.flatnonzero(row).tolist() for row in actions] == [[], *[expected] * 3]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no-unit": ({"skip": [0]}, r"Layers 0 are not whole units\. Units of this policy: 2-3,4"),
    "static-too-many": ({"policy": "static", "skipped": 4}, "Skipping 4 layers .* above the 3 that .* at most that"),
    "static-too-fast": ({"policy": "static", "budget": 0.01}, "A budget of 0.01 is below the 0.* at least that"),
    "static-bound": ({"policy": "static", "max_layers": 2}, "from 3 to 6"),
    "token-too-many": ({"skipped": 3.5}, "Skipping 3.5 layers .* above the 3 that"),
    "token-bound": ({"max_layers": 1}, "from 3 to 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, runtime: DashRuntime) -> None:
    setting, expected = BAD[name]
    with pytest.raises(PolicyError, match=expected):
        runtime.session(**setting)


def test_without_a_network_and_an_order(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = runtime.bundle.manifest
    bare = replace(manifest.policy, static_order=(), has_network=False)
    monkeypatch.setattr(runtime.bundle, "manifest", replace(manifest, policy=bare))
    assert kinds_of(bare) == ("dense", "static")
    for amount in ({}, {"trade_off": 1.0}, {"budget": 7.0}):  # told at once: no amount would help
        with pytest.raises(
            PolicyError, match=r"needs a bundle with a policy network\. Train one .*dash-export train MODEL"
        ):
            runtime.session("token", **amount)
    for amount in ({}, {"skipped": 1}):
        with pytest.raises(PolicyError, match=r"was not trained\. List the layers .*dash-export train MODEL"):
            runtime.session("static", **amount)
    assert runtime.generate([1, 2, 3], 3, skip=[4]).actions[1:, 4].all()


COST = CostTable(0, 0.0, {}, {}, (0.2, 0.1), "")


def held(trade_off: float, budget: float) -> SessionRules:
    return SessionRules(decision_rule(TINY_UNITS, COST.cost, trade_off), COST, budget)


def run_held(rules: SessionRules, damage: np.ndarray) -> float:
    """Mean time of tokens with this damage [tokens, units]."""
    times = []
    for row in damage:
        skipped = rules.rule.skips(row[:, None])
        rules.decoded(skipped)
        times.append(COST.token_time(skipped)[0])
    return float(np.mean(times))


DAMAGE = np.random.default_rng(0).lognormal(0, 1, (600, 2)).astype(np.float32)


@pytest.mark.parametrize("wrong", [0.2, 5.0])
@pytest.mark.parametrize("budget", [0.8, 0.9])
def test_hold_reaches_the_budget_with_a_wrong_dial(wrong: float, budget: float) -> None:
    fair = 8.0  # about half of the units
    assert run_held(held(fair * wrong, budget), DAMAGE) == pytest.approx(budget, abs=0.01)


def test_hold_stays_within_its_limits_and_recovers() -> None:
    """A text on which the budget cannot be met piles up no debt: afterwards the budget is met within some tokens."""
    rules = held(8.0, 0.8)
    run_held(rules, np.full((500, 2), 1e6, np.float32))
    assert isinstance(rules.rule, DecisionRule)
    assert rules.rule.limits == pytest.approx((HOLD_RANGE * 1.6, HOLD_RANGE * 0.8))
    assert run_held(rules, DAMAGE) == pytest.approx(0.8, abs=0.02)
    rules.restart()
    assert rules.rule.limits == pytest.approx((1.6, 0.8))


def test_hold_in_a_session(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dial's trade-off is far too small. Costs and dial are given: with measured ones the answer is another on
    every machine, and may end too early to hold anything.
    """
    cost = (0.3, 0.2)
    dial = (DialPoint(0, 6, 1, 0, 1), DialPoint(0.2, 3, 0.5, 1, 1))
    monkeypatch.setattr(runtime, "build", replace(runtime.build, dial=dial, cost=replace(runtime.cost, cost=cost)))
    budget = 1 - 0.5 * sum(cost)

    def mean_time(hold: bool) -> tuple[float, np.ndarray]:
        actions = runtime.session("token", budget=budget, hold=hold).generate(random_ids(10), 400).actions[1:]
        return 1 - float((actions[:, [2, 4]] @ np.array(cost)).mean()), actions

    (free, _), (kept, actions), (_, same) = mean_time(False), mean_time(True), mean_time(True)
    assert abs(free - budget) > 5 * abs(kept - budget)
    assert kept == pytest.approx(budget, abs=0.02)
    np.testing.assert_array_equal(actions, same)


def test_a_held_budget_is_scored_as_calibrated(tiny_runtime: LoadRuntime) -> None:
    """In one pass or token by token, and whatever was decoded before."""
    ids = random_ids(60)
    for target in ("cpu", "portable"):
        live = tiny_runtime(target) if target != "cpu" else tiny_runtime()
        held = live.session("token", budget=0.9)
        held.generate(ids[:9], 40)
        score, free = held.score(ids), live.session("token", budget=0.9, hold=False).score(ids)
        assert np.any(score.actions)
        np.testing.assert_array_equal(score.actions, free.actions)


DIAL = [
    DialPoint(0.0, 30, 1.0, 0.0),
    DialPoint(2.0, 26, 0.9, 0.1),
    DialPoint(4.0, 27, 0.92, 0.05),  # tables are measured: they mostly rise and fall
    DialPoint(6.0, 22, 0.8, 0.2),
    DialPoint(9.0, 20, 0.75, 0.5),
]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"budget": 1.0}, 0.0),
        ({"budget": 0.9}, 2.0),
        ({"budget": 0.86}, 24**0.5),  # halfway from 4 to 6, geometrically
        ({"budget": 0.75}, 9.0),
        ({"skipped": 2}, 2**0.5),  # from half the first on
        ({"skipped": 9}, 54**0.5),
        ({"max_kl": 0}, 0.0),
        ({"max_kl": 0.125}, 24**0.5),
        (
            {"budget": 0.7},
            r"^A budget of 0\.7 is below the 0\.75 that this policy reaches with all its units skipped: "
            r"give at least that\.$",
        ),
        ({"skipped": 10.5}, r"^Skipping 10\.5 layers of a token is above the 10 that .* give at most that\.$"),
        ({"max_kl": 0.6}, r"^A KL of 0\.6 nats is above the 0\.5 that .* give at most that\.$"),
    ],
)
def test_the_dial(asked: dict[str, float], expected: float | str) -> None:
    if isinstance(expected, float):
        assert trade_off_for(DIAL[::-1], **asked) == pytest.approx(expected)
        return
    with pytest.raises(PolicyError, match=expected):
        trade_off_for(DIAL, **asked)
    with pytest.raises(PolicyError, match="no calibrated dial"):
        trade_off_for([], **asked)


@pytest.mark.parametrize(
    ("asked", "limit"),
    [({"budget": 0.1}, 0.329), ({"skipped": 25.0}, 20.12), ({"max_kl": 9.0}, 1.2345)],
)
def test_the_limit_that_is_told_may_be_asked_for(asked: dict[str, float], limit: float) -> None:
    """It is rounded towards what the policy gives."""
    dial = [DialPoint(0.0, 30, 1.0, 0.0), DialPoint(9.0, 30 - 20.1287, 0.32812, 1.23459)]
    with pytest.raises(PolicyError, match=rf"the {limit} that"):
        trade_off_for(dial, **asked)
    assert 8.9 < trade_off_for(dial, **dict.fromkeys(asked, limit)) <= 9.0
