"""Every form of the damage network, in every form it is run in, says what the oracle says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.builders import build
from dash_export.decision import decision_rule
from dash_export.exporting import export
from dash_export.models import open_checkpoint
from dash_export.reference import Oracle
from dash_export.runtime.cache import KVCache
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.rules import DENSE
from dash_export.skip_policy import SkipPolicy
from tests.tiny import random_actions, random_ids, tiny_checkpoint, tiny_policy

FORMS = {
    "linear": (0, False),
    "linear with actions": (0, True),
    "hidden layer": (16, False),
    "hidden layer with actions": (16, True),
}
MODES = (("cpu-fp32", "fused"), ("cpu-fp32", "sync"), ("portable", "sync"))


def policy_of(checkpoint, width: int, actions: bool) -> SkipPolicy:
    policy = tiny_policy(checkpoint, "low_rank", width=width)
    network = {name: value for name, value in policy.network.items() if name != "actions"}
    if actions:
        shape = (len(policy.gated), 2, max(width, 1))
        network["actions"] = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    return replace(policy, network=network)


@pytest.fixture(scope="module", params=FORMS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    root = tmp_path_factory.mktemp("form")
    checkpoint = tiny_checkpoint(root / "model")
    policy = policy_of(checkpoint, *FORMS[request.param])
    path = export(checkpoint, root / "tiny.dash", policy).root
    for target, weights in (("cpu", "fp32"), ("portable", None)):
        build(path, target, weights=weights)
    return path, Oracle(open_checkpoint(root / "model"), policy)


@pytest.mark.parametrize(("target", "dispatch"), MODES)
def test_damage_is_the_oracles(bundle: tuple[Path, Oracle], target: str, dispatch: str) -> None:
    path, oracle = bundle
    runtime = DashRuntime.load(path, target, dispatch=dispatch)
    gated = runtime.bundle.manifest.policy.gated
    ids = random_ids(20)
    actions = random_actions(20, runtime.engines.model.num_layers, gated)
    expected = oracle.forward(ids, actions=actions)
    scored = runtime.session().score(ids, actions=actions)
    assert expected.damage.max() > 0.05
    np.testing.assert_allclose(scored.damage, expected.damage, atol=2e-5)


@pytest.mark.parametrize(("target", "dispatch"), MODES)
def test_decode_decides_as_the_oracle(bundle: tuple[Path, Oracle], target: str, dispatch: str) -> None:
    path, oracle = bundle
    runtime = DashRuntime.load(path, target, dispatch=dispatch)
    gated = runtime.bundle.manifest.policy.gated
    ids = random_ids(12)
    damages = oracle.forward(ids).damage[2:, list(gated)]
    cost = dict.fromkeys(gated, 1.0)
    rule = decision_rule(runtime.engines.model.num_layers, gated, cost, float(np.median(damages)))
    expected = oracle.forward(ids, rule=rule, prefix=3)
    cache = KVCache(runtime.engines.model, len(ids))
    cache.reserve(len(ids))
    step = BoundStep(runtime.engines, cache, 1)
    taken = []
    for position, token in enumerate(ids):
        step.decode(int(token), rule if position >= 3 else DENSE)
        taken.append(step.actions[0].copy())
    assert expected.actions.any()
    np.testing.assert_array_equal(np.array(taken), expected.actions)


def test_a_huge_score_does_not_overflow(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy = policy_of(checkpoint, 0, False)
    policy = replace(policy, network=policy.network | {"bias": np.full_like(policy.network["bias"], 1e5)})
    path = export(checkpoint, tmp_path / "tiny.dash", policy).root
    build(path, "cpu", weights="fp32")
    made = DashRuntime.load(path, "cpu-fp32").generate(random_ids(4), 3, policy="token", trade_off=1.0)
    assert not made.actions.any()
