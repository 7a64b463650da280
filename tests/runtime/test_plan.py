"""Rules worked out ahead: the same actions, logits and damage as asking the rule layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.builders import build
from dash_export.decision import DecisionRule, decision_rule
from dash_export.exporting import export
from dash_export.runtime.plan import Answers, BoundStretch, ComparingPlan, FixedPlan, Plans, score_limits
from dash_export.runtime.rules import DENSE, FixedRule, Rule
from tests.tiny import random_ids, tiny_checkpoint, tiny_policy

LoadRuntime = Callable[..., DashRuntime]
IDS = random_ids(60)


class Asked:
    """A rule that nobody can see through."""

    asks = True

    def __init__(self, rule: Rule) -> None:
        self.settled, self.skips, self.decide = rule.settled, rule.skips, rule.decide


@pytest.fixture(params=["hidden layer", "linear", "sync"])
def runtime(request: pytest.FixtureRequest, tiny_runtime: LoadRuntime, tmp_path: Path) -> DashRuntime:
    if request.param != "linear":
        return tiny_runtime("cpu-fp32", "sync" if request.param == "sync" else "fused")
    checkpoint = tiny_checkpoint(tmp_path / "model")
    export(checkpoint, tmp_path / "linear.dash", tiny_policy(checkpoint, width=0))
    build(tmp_path / "linear.dash", "cpu", weights="fp32")
    made = DashRuntime.load(tmp_path / "linear.dash", "cpu-fp32")
    assert made.engines.score_bias  # type: ignore[union-attr]
    return made


def decoded(runtime: DashRuntime, rule: Rule) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Logits, actions and damage of every token after a prompt."""
    session = runtime.session()
    session.prefill(IDS[:8])
    found = []
    for token in IDS[8:]:
        logits, actions = session.decode_one(int(token), rule)
        found.append((logits, actions, session._bound(1).damage.copy()))
    return found


def test_comparing_is_asking(runtime: DashRuntime) -> None:
    rule = runtime.session("token", trade_off=runtime.build.dial["token"][2].trade_off).rule
    one, other = decoded(runtime, rule), decoded(runtime, Asked(rule))
    assert 0 < sum(actions.sum() for _, actions, _ in one) < len(one) * len(rule.limits)  # type: ignore[attr-defined]
    for (logits, actions, damage), (asked_logits, asked_actions, asked_damage) in zip(one, other, strict=True):
        np.testing.assert_array_equal(actions, asked_actions)
        np.testing.assert_array_equal(logits, asked_logits)
        np.testing.assert_allclose(damage, asked_damage, rtol=1e-6)


def test_a_fixed_rule_is_its_launches(runtime: DashRuntime) -> None:
    for rule in (DENSE, FixedRule([3]), FixedRule(runtime.bundle.manifest.policy.gated)):
        for one, other in zip(decoded(runtime, rule), decoded(runtime, Asked(rule)), strict=True):
            np.testing.assert_array_equal(one[1], other[1])
            np.testing.assert_array_equal(one[0], other[0])
            assert set(np.flatnonzero(one[1])) == rule.skipped


def segments(calls: list[str], stretches: bool = False) -> list[Any]:
    def launch(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    pairs = [BoundStretch(2, skips, launch(f"{'skip' if skips else 'run'} 2-3")) for skips in (False, True)]
    policy = None if stretches else launch("policy 3")
    return [
        segment(-1, launch("run 0-1"), None),
        segment(2, launch("run 2"), launch("skip 2"), stretches=tuple(pairs if stretches else ())),
        segment(3, launch("run 3"), launch("skip 3"), policy=policy),
    ]


def segment(layer: int, run: Any, skip: Any, policy: Any = None, stretches: tuple[BoundStretch, ...] = ()) -> Any:
    return SimpleNamespace(layer=layer, count=1, run=run, skip=skip, policy=policy, stretches=stretches)


def test_what_is_planned() -> None:
    calls: list[str] = []
    parts, plans = segments(calls), Plans(4, {}, {1: (2,), 2: (3,)})
    fixed = plans.plan(FixedRule([3]), parts)
    assert isinstance(fixed, FixedPlan)
    for launch in fixed.launches:
        launch()
    assert calls == ["run 0-1", "run 2", "skip 3"]
    assert (fixed.executed, fixed.actions.tolist()) == (3, [0, 0, 0, 1])
    assert plans.plan(FixedRule([3]), parts) is fixed, "of one set, whoever asks for it"
    rule = decision_rule(4, [2, 3], {2: 0.1, 3: 0.2}, 0.5)
    assert plans.plan(rule, parts) is None  # its first token
    found = plans.plan(rule, parts)
    assert isinstance(found, ComparingPlan)
    assert [stage.choices for stage in found.stages] == [(), ((1, 2, 0.05),), ((1, 3, 0.1),)]
    for way in (0, 1):
        calls.clear()
        for stage in found.stages:
            for launch in stage.before:
                launch()
            for launch in stage.answers[way * len(stage.choices)][0]:
                launch()
        assert calls == [["run 0-1", "run 2", "policy 3", "run 3"], ["run 0-1", "skip 2", "policy 3", "skip 3"]][way]
    assert plans.plan(rule, parts) is found
    assert plans.plan(rule, list(parts)) is None  # other launches


def test_what_is_decided_at_once() -> None:
    """Layer 1 always runs between two that one state decides."""
    parts = [segment(layer, f"run {layer}", f"skip {layer}" if layer in (0, 2) else None) for layer in range(-1, 3)]
    parts[2].layer = -1
    rule = decision_rule(4, [0, 2], {0: 0.1, 2: 0.2}, 0.5)
    plans = Plans(4, {0: 0.0, 2: 0.0}, {-1: (0, 2)})
    assert [plans.plan(rule, parts) is None for _ in range(2)] == [True, False]
    found = plans.plan(rule, parts)
    assert isinstance(found, ComparingPlan)
    first, second = found.stages
    assert (first.before, first.choices, second.before) == (("run -1",), (), ())
    assert [choice[:2] for choice in second.choices] == [(1, 0), (2, 1)]
    assert second.answers[2] == (("run 0", "run 1", "skip 2"), (2,))
    assert second.answers[1] == (("skip 0", "run 1", "run 2"), (0,))


def test_what_takes_one_launch() -> None:
    calls: list[str] = []
    parts, plans = segments(calls, stretches=True), Plans(4, {}, {1: (2, 3)})
    rule = decision_rule(4, [2, 3], {2: 0.1, 3: 0.2}, 0.5)
    found = [plans.plan(rule, parts) for _ in range(2)][1]
    assert isinstance(found, ComparingPlan)
    answers = found.stages[1].answers
    for mask, expected in enumerate([["run 2-3"], ["skip 2", "run 3"], ["run 2", "skip 3"], ["skip 2-3"]]):
        calls.clear()
        for launch in answers[mask][0]:
            launch()
        assert calls == expected
    assert answers[1] is answers[1]


def test_answers_are_not_kept_for_ever() -> None:
    answers = Answers([segment(layer, f"run {layer}", f"skip {layer}") for layer in range(12)])
    for mask in range(3 * Answers.KEPT):
        assert sum(1 << layer for layer in answers[mask][1]) == mask
    assert len(answers) == Answers.KEPT


def test_what_has_to_be_asked() -> None:
    parts, plans = segments([]), Plans(4, {}, {})
    for rule in (decision_rule(4, [2, 3], {2: 0.1, 3: 0.2}, 0.5, max_layers=3), Asked(DENSE)):
        assert [plans.plan(rule, parts) for _ in range(3)] == [None] * 3
    for _ in range(3 * Plans.KEPT):
        assert plans.plan(decision_rule(4, [2, 3], {2: 0.1, 3: 0.2}, 0.5), parts) is None
    assert len(plans._known) == Plans.KEPT


def test_score_limits_decide_as_the_damage_does() -> None:
    rng = np.random.default_rng(0)
    limits = [0.0, 1e-30, 1e-6, 0.017, 0.3, 2.5, 29.0, 45.0, float("inf"), *rng.uniform(0, 0.2, 40)]
    bias = dict(enumerate(rng.normal(-4, 3, len(limits))))
    found = score_limits(limits, bias)
    for layer, limit in enumerate(limits):
        edge = np.float32(found[layer])
        near = [edge, *(np.nextafter(edge, np.float32(far)) for far in (-np.inf, np.inf)), *rng.normal(0, 5, 50)]
        scores = np.array(near, np.float32)
        damage = np.logaddexp(0.0, scores.astype(np.float64) + bias[layer]).astype(np.float32)
        np.testing.assert_array_equal(scores < found[layer], damage.astype(np.float64) < limit)


def test_the_dial_is_planned(runtime: DashRuntime) -> None:
    """What sessions decode with, after the first tokens."""
    session = runtime.session("token", trade_off=0.1)
    assert isinstance(session.rule, DecisionRule)
    session.prefill(IDS[:8])
    for token in IDS[8:12]:
        session.decode_one(int(token))
    step = session._bound(1)
    assert isinstance(step._plans.plan(session.rule, step.segments), ComparingPlan)  # type: ignore[attr-defined]
