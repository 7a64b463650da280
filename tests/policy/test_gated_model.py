"""Training sees the contract that the oracle states: same logits, same damage, same decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dash_export.decision import DENSE_POSITIONS, decision_rule
from dash_export.models import Checkpoint
from dash_export.policy.gated_model import GatedModel, Rollout, below
from dash_export.policy.skip_modules import SkipModules
from dash_export.reference import Oracle
from dash_export.skip_policy import SkipPolicy
from tests.tiny import random_actions, random_ids, tiny_policy

TOKENS = 24


@pytest.fixture(
    params=[
        (16, "low_rank", ()),
        (0, "scale", ()),
        (0, "none", ()),
        (0, "low_rank", (1, 1, 1)),
        (0, "none", (0, 0, 3)),
    ],
    ids=["hidden layer", "linear", "bare", "at once", "by two states"],
)
def policy(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> SkipPolicy:
    width, kind, reads = request.param
    return replace(tiny_policy(checkpoint, kind, width=width), reads=reads)


def logits(model: GatedModel, rollout: Rollout) -> np.ndarray:
    return (rollout.final[0] @ model.head.T).numpy()


@torch.no_grad()
def forced(model: GatedModel, policy: SkipPolicy, ids: np.ndarray, actions: np.ndarray) -> Rollout:
    skips = torch.from_numpy(actions[None].astype(bool))
    return model.rollout(
        torch.from_numpy(ids[None]),
        SkipModules(policy),
        lambda row, _: skips[..., policy.gated[row]],
        torch.zeros(1, len(ids), dtype=torch.bool),
    )


def test_forced_actions(model: GatedModel, checkpoint: Checkpoint, policy: SkipPolicy) -> None:
    ids = random_ids(TOKENS)
    actions = random_actions(TOKENS, checkpoint.spec.num_layers, policy.gated)
    expected = Oracle(checkpoint, policy).forward(ids, actions=actions)
    rollout = forced(model, policy, ids, actions)
    np.testing.assert_allclose(logits(model, rollout), expected.logits, atol=1e-4)
    np.testing.assert_allclose(rollout.damage[0].numpy(), expected.damage[:, list(policy.gated)], atol=1e-5)


def test_own_decisions(model: GatedModel, checkpoint: Checkpoint, policy: SkipPolicy) -> None:
    ids = random_ids(TOKENS, seed=3)
    layers = checkpoint.spec.num_layers
    limit = float(np.median(Oracle(checkpoint, policy).forward(ids).damage[:, list(policy.gated)]))
    rule = decision_rule(layers, policy.gated, dict.fromkeys(policy.gated, 1.0), limit)
    expected = Oracle(checkpoint, policy).forward(ids, rule=rule)
    dense = torch.arange(TOKENS)[None] < DENSE_POSITIONS
    with torch.no_grad():
        rollout = model.rollout(torch.from_numpy(ids[None]), SkipModules(policy), below(limit), dense)
    assert 0 < rollout.skipped.float().mean() < 1
    np.testing.assert_array_equal(rollout.skipped[0].numpy(), expected.actions[:, list(policy.gated)])
    np.testing.assert_allclose(logits(model, rollout), expected.logits, atol=1e-4)


def test_softened_decisions_go_forward_as_they_are(model: GatedModel, checkpoint: Checkpoint) -> None:
    """Straight-through: the values are those of the decisions, the gradient reaches network and compensation."""
    policy = tiny_policy(checkpoint, "low_rank", width=0)
    ids = torch.from_numpy(random_ids(TOKENS)[None])
    dense = torch.arange(TOKENS)[None] < DENSE_POSITIONS
    modules = SkipModules(policy)
    limit = 0.15

    def roll(**options: object) -> Rollout:
        return model.rollout(ids, modules, lambda _, damage: damage < limit, dense, **options)

    hard = roll()
    soft = roll(soften=lambda damage: torch.sigmoid((limit - damage) / 0.05))
    torch.testing.assert_close(soft.final, hard.final, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(soft.taken, hard.skipped.float())
    soft.final.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in modules.parameters())


def test_network_grad_keeps_no_graph_of_the_pass(model: GatedModel, checkpoint: Checkpoint) -> None:
    modules = SkipModules(tiny_policy(checkpoint, "low_rank", width=0))
    ids = torch.from_numpy(random_ids(TOKENS)[None])
    rollout = model.rollout(
        ids, modules, lambda _, damage: damage < 0.2, torch.zeros_like(ids).bool(), network_grad=True
    )
    assert not rollout.final.requires_grad
    rollout.damage.sum().backward()
    assert modules.network["state"].grad is not None
    assert all(parameter.grad is None for parameter in modules.compensation.values())
