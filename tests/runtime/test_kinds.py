"""Every policy kind: what it skips, what it refuses, and that a teacher-forced pass does what decode does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import DecisionRule, Setting, decision_rule
from dash_export.errors import PolicyError
from dash_export.runtime.kinds import session_rules
from dash_export.runtime.rules import HOLD_RANGE, FixedRule, HeldRules, RandomRules, SequenceRules
from dash_export.stretches import TokenTime
from tests.tiny import random_ids

LoadRuntime = Callable[..., DashRuntime]
GATED = (2, 3, 4)
STATIC, COSINE = (3, 4, 2), (4, 3, 2)
PROMPT = 20
IDS = random_ids(60)


@pytest.fixture
def runtime(tiny_runtime: LoadRuntime) -> DashRuntime:
    return tiny_runtime()


def middle(runtime: DashRuntime, kind: str) -> float:
    """A trade-off at which the kind skips some layers and runs others."""
    return next(point.trade_off for point in runtime.build.dial[kind] if 3.2 < point.layers < 5.5)


def setting_of(runtime: DashRuntime, kind: str) -> dict[str, Any]:
    if kind == "token":
        return {"policy": kind, "trade_off": middle(runtime, kind)}
    if kind == "sequence":  # between what this prompt's layers need
        damage = runtime.session("token", trade_off=0.0).score(IDS[:PROMPT]).damage[2:].mean(axis=0)
        needed = sorted(damage[layer] / runtime.cost.cost[layer] for layer in GATED)
        return {"policy": kind, "trade_off": float(needed[0] + needed[1]) / 2}
    return {"policy": kind, "skipped": 2}


@pytest.mark.parametrize(("target", "dispatch"), [("cpu-fp32", "fused"), ("cpu-fp32", "sync"), ("portable", "sync")])
@pytest.mark.parametrize("kind", ["static", "cosine", "random", "sequence", "token"])
def test_score_equals_decode(kind: str, target: str, dispatch: str, tiny_runtime: LoadRuntime) -> None:
    runtime = tiny_runtime(target, dispatch)
    setting = setting_of(runtime, kind)
    score = runtime.session(**setting).score(IDS, prefix=PROMPT, keep_logits=True)
    assert score.logits is not None
    live = runtime.session(**setting)
    live.prefill(IDS[:PROMPT])
    for position in range(PROMPT, len(IDS)):
        logits, actions = live.decode_one(int(IDS[position]))
        np.testing.assert_array_equal(actions, score.actions[position])
        np.testing.assert_allclose(logits, score.logits[position], atol=1e-4)
    skipped = score.actions[PROMPT:].mean(axis=0)
    assert 0 < skipped.sum() < 3
    assert not score.actions[:PROMPT].any()
    assert set(np.flatnonzero(skipped)) <= set(GATED)


def test_each_layer_is_weighed_by_its_own_cost(runtime: DashRuntime) -> None:
    """Of the build; the tiny model's layers all cost alike."""
    build = replace(runtime.build, cost=replace(runtime.build.cost, cost={2: 0.3, 3: 0.1, 4: 0.02}))
    manifest = runtime.bundle.manifest
    rule = session_rules(Setting("token", trade_off=2.0), manifest.model, manifest.policy, build).rule
    assert isinstance(rule, DecisionRule)
    assert rule.limits == pytest.approx((0, 0, 0.6, 0.2, 0.04, 0))


@pytest.mark.parametrize(("kind", "order"), [("static", STATIC), ("cosine", COSINE)])
def test_orders(kind: str, order: tuple[int, ...], runtime: DashRuntime) -> None:
    """Amounts become the first layers of the kind's order."""
    share = runtime.cost.cost[2]

    def skipped(**amount: Any) -> list[int]:
        generation = runtime.generate(random_ids(8), 4, policy=kind, **amount)
        assert (generation.actions[1:] == generation.actions[1]).all()
        return np.flatnonzero(generation.actions[1]).tolist()

    for count in range(4):
        expected = sorted(order[:count])
        assert skipped(skipped=count) == expected
        assert skipped(max_layers=6 - count) == expected
        assert skipped(budget=1 - count * share) == expected
    assert skipped(budget=1 - 1.5 * share) == sorted(order[:2]), "a budget is kept, not just approached"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "static-too-many": ({"policy": "static", "skipped": 4}, "skips from 0 to 3 of the model's 6 layers"),
    "static-half": ({"policy": "static", "skipped": 1.5}, "whole layers: give 1 or 2"),
    "static-too-few-layers": ({"policy": "static", "max_layers": 2}, "max_layers = 2"),
    "static-more-than-all": ({"policy": "cosine", "max_layers": 7}, "max_layers = 7"),
    "cosine-too-fast": ({"policy": "cosine", "budget": 0.01}, "all of its 3 layers"),
    "random-too-many": ({"policy": "random", "skipped": 3.5}, "3 layers"),
    "random-too-fast": ({"policy": "random", "budget": 0.01}, "a budget of"),
    "sequence-too-many": ({"policy": "sequence", "skipped": 3.5}, r"skip 3\.00 layers"),
    "token-too-many": ({"policy": "token", "skipped": 3.5}, r"skip 3\.00 layers"),
    "token-too-far": ({"policy": "token", "max_kl": 1e6}, "diverge by"),
    "sequence-bound": ({"policy": "sequence", "max_layers": 2}, "from 3 to 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_more_than_a_kind_can_give(name: str, runtime: DashRuntime) -> None:
    setting, expected = BAD[name]
    with pytest.raises(PolicyError, match=expected):
        runtime.session(**setting)


def test_kinds_without_a_network(tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded without the policy's engines, and without orders."""
    runtime = tiny_runtime("cpu-fp32", "plain")
    for kind in ("sequence", "token"):
        with pytest.raises(PolicyError, match="needs a bundle with a policy network"):
            runtime.session(kind, trade_off=1.0)
    bare = replace(runtime.bundle.manifest.policy, static_order=(), cosine_order=(), has_network=False)
    monkeypatch.setattr(runtime.bundle, "manifest", replace(runtime.bundle.manifest, policy=bare))
    assert bare.kinds == ("dense", "static", "random")
    for kind in ("static", "cosine"):
        with pytest.raises(PolicyError, match="was not trained"):
            runtime.session(kind, skipped=1)


@pytest.mark.parametrize("amount", [{"skipped": 1.2}, {"budget": None}])
def test_random_hits_its_mean(amount: dict[str, float | None], runtime: DashRuntime) -> None:
    if "budget" in amount:
        amount = {"budget": 1 - 1.2 * runtime.cost.cost[2]}
    session = runtime.session("random", **amount)  # type: ignore[arg-type]
    actions = session.rules.at(2, 4000).decide(3, np.zeros(4000, np.float32), np.zeros(4000, np.int64))
    assert actions.mean() == pytest.approx(0.4, abs=0.03)


def test_random_draws_follow_from_seed_and_position() -> None:
    def draws(seed: int, position: int, count: int) -> np.ndarray:
        rule = RandomRules(6, GATED, 0.5, seed).at(position, count)
        nothing = np.zeros(count, np.float32), np.zeros(count, np.int64)
        return np.array([rule.decide(layer, *nothing) for layer in range(6)]).T

    whole = draws(1, 0, 64)
    np.testing.assert_array_equal(draws(1, 40, 24), whole[40:])
    assert (draws(2, 0, 64) != whole).any()
    assert not whole[:, [0, 1, 5]].any()
    assert len(np.unique(whole, axis=0)) > 4, "layers and tokens are drawn one by one"


def expected_set(runtime: DashRuntime, ids: np.ndarray, trade_off: float, first: int = 2) -> list[int]:
    """From a dense pass over the prompt: where the mean damage of its tokens is below trade-off times cost."""
    damage = runtime.session("token", trade_off=0.0).score(ids).damage[first:].mean(axis=0)
    return [layer for layer in GATED if damage[layer] < trade_off * runtime.cost.cost[layer]]


def test_sequence_decides_once_per_prompt(runtime: DashRuntime) -> None:
    trade_off, sets = middle(runtime, "sequence"), set()
    for seed in range(8):
        ids = random_ids(12, seed=seed)
        generation = runtime.generate(ids, 6, policy="sequence", trade_off=trade_off)
        assert (generation.actions[1:] == generation.actions[1]).all()
        chosen = np.flatnonzero(generation.actions[1]).tolist()
        assert chosen == expected_set(runtime, ids, trade_off)
        sets.add(tuple(chosen))
    assert len(sets) > 1, "prompts must differ, or nothing was decided"


def test_sequence_in_chunks_and_over_turns(runtime: DashRuntime) -> None:
    """All prompt tokens of the conversation decide; a second prompt decides anew, a forgotten one counts no more."""
    trade_off, first, second = middle(runtime, "sequence"), random_ids(13, seed=1), random_ids(9, seed=5)
    live = runtime.session("sequence", trade_off=trade_off)
    live.prefill_chunk = 4
    live.prefill(first)
    assert isinstance(live.rules, SequenceRules)
    pooled = live.rules._pool
    assert sum(len(damage) for _, damage in pooled) == 11
    whole = runtime.session("token", trade_off=0.0).score(first).damage[2:]
    np.testing.assert_allclose(np.concatenate([damage for _, damage in pooled]), whole, atol=1e-5)
    live.decode_one(7)
    live.prefill(second)
    assert sum(len(damage) for _, damage in live.rules._pool) == 20, "the decoded token between them does not count"
    live.reset()
    fresh = runtime.session("sequence", trade_off=trade_off)
    for session in (live, fresh):
        session.prefill(second)
    np.testing.assert_array_equal(live.decode_one(3)[1], fresh.decode_one(3)[1])


def test_sequence_of_a_prompt_without_tokens_to_ask(runtime: DashRuntime) -> None:
    assert not runtime.generate([1, 2], 8, policy="sequence", trade_off=1e6).actions.any()
    assert runtime.generate([1, 2, 3], 8, policy="sequence", trade_off=1e6).actions[1:].sum(axis=1).tolist() == [3] * 7


def test_sequence_keeps_the_bound() -> None:
    rule = decision_rule(6, GATED, dict.fromkeys(GATED, 0.1), 1.0, max_layers=4)
    rules = SequenceRules(rule)
    rules.read(0, np.full((5, 6), 9.0, np.float32))
    assert isinstance(rules.rule, FixedRule)
    assert sum(rules.rule.skips(layer, 0.0, 0) for layer in range(6)) == 2


def held(trade_off: float, budget: float) -> HeldRules:
    build = SimpleNamespace(cost=SimpleNamespace(cost=COST, launch=0.0), segments=(), stretches=())
    return HeldRules(decision_rule(6, GATED, COST, trade_off), TokenTime(build), budget)  # type: ignore[arg-type]


COST = {2: 0.1, 3: 0.2, 4: 0.1}


def run_held(rules: HeldRules, damage: np.ndarray) -> np.ndarray:
    """Mean time so far after every token, for damage [tokens, layers]."""
    times = []
    for row in damage:
        rule = rules.at(0, 1)
        actions = np.array([rule.skips(layer, float(row[layer]), 0) for layer in range(6)], np.int8)
        rules.decoded(actions)
        times.append(1 - sum(COST[layer] * actions[layer] for layer in GATED))
    return np.cumsum(times) / np.arange(1, len(times) + 1)


@pytest.mark.parametrize("wrong", [0.2, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("budget", [0.75, 0.9])
def test_hold_reaches_the_budget_with_a_wrong_dial(wrong: float, budget: float) -> None:
    damage = np.random.default_rng(0).lognormal(0, 1, (600, 6)).astype(np.float32)
    fair = 8.0  # about half of the layers: 1 / 0.125
    free = run_held(held(0.0, budget), damage)
    assert free[-1] == 1.0, "nothing to scale"
    assert run_held(held(fair * wrong, budget), damage)[-1] == pytest.approx(budget, abs=0.01)


def test_hold_stays_within_its_limits_and_recovers() -> None:
    """A text on which the budget cannot be met piles up no debt: afterwards the budget is met within some tokens."""
    rules = held(8.0, 0.75)
    run_held(rules, np.full((500, 6), 1e6, np.float32))
    assert isinstance(rules.rule, DecisionRule)
    assert rules.rule.limits[2] == pytest.approx(HOLD_RANGE * 0.8)
    damage = np.random.default_rng(0).lognormal(0, 1, (600, 6)).astype(np.float32)
    assert run_held(rules, damage)[-1] == pytest.approx(0.75, abs=0.02)
    rules.rewind(0)
    assert rules.rule.limits[2] == pytest.approx(0.8)


def test_hold_in_a_session(runtime: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build's dial is made wrong: what is asked for 0.1 of the time needs is far from what the budget needs."""
    points = runtime.build.dial["token"]
    # As if a tenth of each trade-off were enough.
    wrong = tuple(replace(point, trade_off=0.1 * point.trade_off) for point in points)
    monkeypatch.setattr(runtime, "build", replace(runtime.build, dial={"token": wrong}))
    budget = 1 - 1.5 * runtime.cost.cost[3]

    def mean_time(hold: bool) -> tuple[float, np.ndarray]:
        session = runtime.session("token", budget=budget, hold=hold)
        actions = session.generate(random_ids(10), 400).actions[1:]
        return 1 - float(actions.sum(axis=1).mean()) * runtime.cost.cost[3], actions

    (free, _), (kept, actions), (again, same) = mean_time(False), mean_time(True), mean_time(True)
    assert abs(free - budget) > 5 * abs(kept - budget)
    assert kept == pytest.approx(budget, abs=0.02)
    assert kept == again
    np.testing.assert_array_equal(actions, same)


def test_hold_cannot_be_scored_in_one_pass(runtime: DashRuntime) -> None:
    session = runtime.session("token", budget=0.9, hold=True)
    with pytest.raises(PolicyError, match="token by token"):
        session.score(IDS)
    with pytest.raises(PolicyError, match="token by token"):
        session.logits(IDS)
    forced = np.zeros((len(IDS), 6), np.int8)
    assert len(session.score(IDS, actions=forced).log_likelihoods) == len(IDS) - 1
