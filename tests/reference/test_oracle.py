"""The oracle against transformers, and against itself broken on purpose: the contract is what the tests can see."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from dash_export import DashRuntime
from dash_export.core.rule import DecisionRule, decision_rule
from dash_export.core.units import Action
from dash_export.models import Checkpoint
from dash_export.reference import Oracle
from tests.tiny import TINY_UNITS, random_actions, random_ids

IDS = random_ids(60)


def rule_of(runtime: DashRuntime, max_layers: int | None = None) -> DecisionRule:
    return decision_rule(TINY_UNITS, runtime.cost.cost, runtime.build.dial[5].trade_off, max_layers, 6)


@pytest.mark.model
def test_dense_is_transformers(smollm2: Checkpoint, smollm2_oracle: Oracle) -> None:
    """The model's own forward, masks and positions its own."""
    model = transformers.AutoModelForCausalLM.from_config(smollm2_oracle.model.config).eval()
    model.load_state_dict(smollm2_oracle.model.state_dict())
    ids = random_ids(80, smollm2.spec.vocab_size)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(smollm2_oracle.forward(ids).logits, expected, atol=1e-3)


def test_actions_of_zero_are_dense(tiny_oracle: Oracle) -> None:
    dense = tiny_oracle.forward(IDS)
    forced = tiny_oracle.forward(IDS, actions=np.zeros((60, 6), np.int8))
    np.testing.assert_array_equal(forced.logits, dense.logits)
    assert not dense.actions.any()


def test_a_skip_reaches_later_tokens_only(tiny_oracle: Oracle) -> None:
    """Causal: nothing before the skipped token changes, what follows reads its keys and values."""
    actions = np.zeros((60, 6), np.int8)
    actions[30, 2:4] = Action.SKIP
    dense, skipped = tiny_oracle.forward(IDS).logits, tiny_oracle.forward(IDS, actions=actions).logits
    np.testing.assert_allclose(skipped[:30], dense[:30], atol=1e-5)
    assert np.abs(skipped[30] - dense[30]).max() > 0.01
    assert np.abs(skipped[31:] - dense[31:]).max() > 1e-4


def test_prefix_and_first_positions_are_dense(tiny_oracle: Oracle, runtime: DashRuntime) -> None:
    rule = rule_of(runtime, max_layers=3)
    for prefix in (1, 2, 20):
        actions = tiny_oracle.forward(IDS, rule, prefix=prefix).actions
        assert not actions[: max(prefix, 2)].any()
        assert (actions[max(prefix, 2) :].sum(axis=1) == 3).all()


def differences(runtime: DashRuntime, oracle: Oracle) -> tuple[float, int]:
    """Largest logit difference under random forced actions, and decisions that differ under a rule."""
    actions = random_actions(60, 6, TINY_UNITS)
    logits = runtime.session().logits(IDS, actions=actions) - oracle.forward(IDS, actions=actions).logits
    rule = rule_of(runtime)
    decided = runtime.session_under(rule).score(IDS).actions != oracle.forward(IDS, rule).actions
    return float(np.abs(logits).max()), int(decided.sum())


def test_it_is_the_runtimes(runtime: DashRuntime, tiny_oracle: Oracle) -> None:
    logits, decisions = differences(runtime, tiny_oracle)
    assert logits < 2e-4
    assert decisions == 0


@pytest.mark.parametrize(
    ("broken", "least"),
    [
        (lambda update, rows: (update * 0, rows), 0.05),
        (lambda update, _: (update, {}), 1e-3),
        (lambda update, rows: (update, {name: row for name, row in rows.items() if ".3." not in name}), 1e-3),
        (lambda update, rows: (update, dict(zip(rows, list(rows.values())[::-1], strict=True))), 1e-2),
        (lambda update, rows: (update, {name: row.roll(1, dims=1) for name, row in rows.items()}), 1e-2),
    ],
    ids=["no update", "of the run", "none of the second layer", "keys for values", "of the position before"],
)
def test_a_broken_bypass(
    broken: Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]], least: float, runtime: DashRuntime,
    tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Each clause of the contract, broken in the oracle, must part it from the runtime: the update; keys and values."""
    sound = Oracle.bypass
    monkeypatch.setattr(Oracle, "bypass", lambda oracle, hidden, place: broken(*sound(oracle, hidden, place)))
    assert differences(runtime, tiny_oracle)[0] > least


@pytest.mark.parametrize("broken", [lambda damage: damage[::-1], np.negative], ids=["of the other unit", "negated"])
def test_a_broken_damage(
    broken: Callable[..., np.ndarray], runtime: DashRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Oracle.damage
    monkeypatch.setattr(Oracle, "damage", lambda *given: broken(sound(*given)))
    assert differences(runtime, tiny_oracle)[1] > 0


def test_a_lag_off_by_one(runtime: DashRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading what enters the layer before."""
    monkeypatch.setattr(tiny_oracle, "policy", replace(tiny_oracle.policy, read=tiny_oracle.policy.read - 1))
    assert differences(runtime, tiny_oracle)[1] > 0


def test_a_cost_counted_per_layer(runtime: DashRuntime, tiny_oracle: Oracle) -> None:
    """A unit of two layers saves twice as much as one: a limit that forgets it decides otherwise."""
    damage = runtime.session().score(IDS).damage
    cost = (0.4, 0.2)
    rule = decision_rule(TINY_UNITS, cost, float(np.median(damage / cost)))
    expected = tiny_oracle.forward(IDS, rule).actions
    np.testing.assert_array_equal(runtime.session_under(rule).score(IDS).actions, expected)
    flat = decision_rule(TINY_UNITS, (0.2, 0.2), float(np.median(damage / cost)))
    assert (runtime.session_under(flat).score(IDS).actions != expected).any()
