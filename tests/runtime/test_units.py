"""A tiny model's engines against the oracle: whole units, forced and decided, in one pass and token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import DENSE_POSITIONS, decision_rule
from dash_export.errors import PolicyError
from dash_export.models import open_checkpoint
from dash_export.reference import Oracle
from dash_export.runtime.rules import ForcedRule
from tests.tiny import TINY_UNITS, random_actions, random_ids, tiny_bundle, tiny_policy

TOLERANCE = 2e-4
LoadRuntime = Callable[..., DashRuntime]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DashRuntime, Oracle]:
    """Engines of a family and its oracle."""
    root = tiny_bundle(tmp_path_factory.mktemp(request.param), "cpu", form="linear", family=request.param)
    checkpoint = open_checkpoint(root.parent / "model")
    return DashRuntime.load(root, "cpu-fp32"), Oracle(checkpoint, tiny_policy(checkpoint, "linear"))


def test_forced_actions_in_one_pass(pair: tuple[DashRuntime, Oracle]) -> None:
    runtime, oracle = pair
    for seed in range(3):
        ids, actions = random_ids(40, seed=seed), random_actions(40, 6, TINY_UNITS, seed)
        expected = oracle.forward(ids, actions=actions)
        score = runtime.session().score(ids, actions=actions, keep_logits=True)
        np.testing.assert_allclose(score.logits, expected.logits, atol=TOLERANCE)
        np.testing.assert_allclose(score.damage, expected.damage, atol=TOLERANCE)
        np.testing.assert_array_equal(score.actions, actions)


def test_decode_is_one_pass_with_the_same_actions(pair: tuple[DashRuntime, Oracle]) -> None:
    runtime, oracle = pair
    ids = random_ids(30)
    actions = random_actions(30, 6, TINY_UNITS)
    expected = oracle.forward(ids, actions=actions).logits
    session = runtime.session()
    for position, token in enumerate(ids.tolist()):
        skipped = np.array([[bool(actions[position, unit.first])] for unit in TINY_UNITS])
        logits, taken = session.decode_one(token, ForcedRule(skipped))
        np.testing.assert_allclose(logits, expected[position], atol=TOLERANCE)
        np.testing.assert_array_equal(taken, actions[position])


@pytest.mark.parametrize("max_layers", [None, 4])
def test_the_policy_decides_as_the_oracle(pair: tuple[DashRuntime, Oracle], max_layers: int | None) -> None:
    runtime, oracle = pair
    ids = random_ids(60)
    trade_off = float(np.median(oracle.forward(ids).damage / np.array(runtime.cost.cost)))
    rule = decision_rule(TINY_UNITS, runtime.cost.cost, trade_off, max_layers, 6)
    expected = oracle.forward(ids, rule)
    assert 0.1 < expected.actions.mean() < 0.6
    found = runtime.session("token", trade_off=trade_off, max_layers=max_layers).score(ids, keep_logits=True)
    np.testing.assert_array_equal(found.actions, expected.actions)
    np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE)
    session = runtime.session("token", trade_off=trade_off, max_layers=max_layers)
    decoded = [session.decode_one(token) for token in ids.tolist()]
    np.testing.assert_array_equal([actions for _, actions in decoded], expected.actions)
    np.testing.assert_allclose([logits for logits, _ in decoded], expected.logits, atol=TOLERANCE)


def test_a_trade_off_of_zero_is_dense_bit_for_bit(pair: tuple[DashRuntime, Oracle]) -> None:
    runtime, _ = pair
    ids = random_ids(20)
    dense, token = runtime.session(), runtime.session("token", trade_off=0.0)
    for id_ in ids.tolist():
        np.testing.assert_array_equal(dense.decode_one(id_)[0], token.decode_one(id_)[0])


def test_rows_of_a_batch_are_what_each_is_alone(pair: tuple[DashRuntime, Oracle]) -> None:
    runtime, oracle = pair
    prompts = [random_ids(count, seed=count) for count in (5, 9, 3, 7)]
    trade_off = float(np.median(oracle.forward(prompts[1]).damage / np.array(runtime.cost.cost)))
    alone = [runtime.generate(ids, 24, trade_off=trade_off, policy="token") for ids in prompts]
    together = runtime.generate_batch(prompts, 24, size=3, trade_off=trade_off, policy="token")
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.actions, other.actions)


def test_portable_graphs_give_the_same(tiny_runtime: LoadRuntime, tiny_oracle: Oracle) -> None:
    runtime, ids = tiny_runtime("portable"), random_ids(16)
    actions = random_actions(16, 6, TINY_UNITS, 1)
    expected = tiny_oracle.forward(ids, actions=actions)
    found = runtime.session().score(ids, actions=actions, keep_logits=True)  # token by token there
    np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE)
    np.testing.assert_allclose(found.damage, expected.damage, atol=TOLERANCE)


def test_the_first_positions_are_dense(tiny_runtime: LoadRuntime) -> None:
    session = tiny_runtime().session("static", skip=(2, 3, 4))
    actions = np.array([session.decode_one(token)[1] for token in (1, 2, 3)])
    assert not actions[:DENSE_POSITIONS].any()
    assert actions[2].tolist() == [0, 0, 1, 1, 1, 0]


def test_units_come_whole(tiny_runtime: LoadRuntime) -> None:
    with pytest.raises(PolicyError, match="2-3,4"):
        tiny_runtime().session("static", skip=(2,))
    actions = np.zeros((4, 6), np.int8)
    actions[3, 3] = 1
    with pytest.raises(PolicyError, match="units are skipped whole"):
        tiny_runtime().session().score(random_ids(4), actions=actions)
