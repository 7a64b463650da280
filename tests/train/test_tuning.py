"""Where time is dear the tuned network skips more, where divergence is dear less; both hear it through decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dash_export.decision import parse_units
from dash_export.models import Checkpoint
from dash_export.policy import SkipPolicy
from dash_export.train.corpus import Batch
from dash_export.train.gated_model import GatedModel, always, below
from dash_export.train.skip_modules import SkipModules
from dash_export.train.tuning import StaticTuning, Tuning
from tests.tiny import random_ids, tiny_policy

NEAR = 0.03
"""How far the logarithm of a damage lies from that of the limit, at first."""


def batch(seed: int) -> Batch:
    ids = random_ids(4 * 32, seed=seed).reshape(4, 32)
    dense = np.broadcast_to(np.arange(32) < 2, ids.shape)
    return Batch(ids, dense.copy(), ~dense)


@pytest.fixture
def policy(checkpoint: Checkpoint) -> SkipPolicy:
    return tiny_policy(checkpoint, "linear")


@pytest.mark.parametrize(("trade_off", "first", "last"), [(60.0, 0.0, 1.0), (0.06, 1.0, 0.0)], ids=["time", "KL"])
def test_what_is_dear_decides(
    model: GatedModel, policy: SkipPolicy, trade_off: float, first: float, last: float
) -> None:
    """From all damages just above the limit to all below it, or the other way round."""
    limits = trade_off * SkipModules(policy).cost(model.spec)
    damage = limits.numpy() * np.exp(NEAR if first == 0 else -NEAR)
    network = {
        "weight": np.zeros((model.spec.hidden_size, len(policy.units)), np.float32),
        "bias": np.log(np.expm1(damage)).astype(np.float32),
    }
    modules = SkipModules(replace(policy, network=network))
    tuning = Tuning(model, modules, (trade_off, trade_off * 1.001))
    optimizer = torch.optim.Adam([modules.network["bias"]], 0.05)

    def skipped() -> float:
        ids = torch.from_numpy(batch(1000).ids)
        with torch.no_grad():
            rollout = model.rollout(ids, modules, below(limits), torch.zeros_like(ids).bool())
        return float(rollout.skipped.float().mean())

    assert skipped() == first
    for step in range(12):
        optimizer.zero_grad()
        tuning.loss(batch(step), np.random.default_rng(step)).backward()
        optimizer.step()
    assert skipped() == last


def test_time_is_what_a_unit_saves(model: GatedModel, policy: SkipPolicy) -> None:
    """Where all of both units is skipped, a unit of two layers counts as what it saves, not as one of two."""
    network = {
        "weight": np.zeros((model.spec.hidden_size, len(policy.units)), np.float32),
        "bias": np.full(len(policy.units), -40, np.float32),
    }
    modules = SkipModules(replace(policy, network=network))
    given = batch(0)
    ids, dense, counted = model.tensors(given)
    with torch.no_grad():
        final = model.rollout(ids, modules, always(2, (0, 1)), dense).final[counted]
        p = torch.log_softmax(model.dense(ids)[counted] @ model.head.T, -1)
        q = torch.log_softmax(final @ model.head.T, -1)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        loss = float(Tuning(model, modules, (2.0, 2.0 + 1e-9)).loss(given, np.random.default_rng(0)))
    assert loss == pytest.approx(kl / 2 - float(modules.cost(model.spec).sum()), rel=1e-4)


def test_a_static_tuning_skips_the_first_of_its_order(
    model: GatedModel, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to half of the six layers: 4-5, or 4-5 and 2, and never 3."""
    modules = SkipModules(tiny_policy(checkpoint, "linear", units=parse_units("2,3,4-5")))
    seen: list[torch.Tensor] = []
    rollout = GatedModel.rollout
    monkeypatch.setattr(GatedModel, "rollout", lambda *given: seen.append(rollout(*given).skipped) or rollout(*given))
    tuning = StaticTuning(model, modules, (2, 0, 1))
    for step in range(4):
        tuning.loss(batch(step), np.random.default_rng(step)).backward()
    rows = {tuple(window[-1].tolist()) for skipped in seen for window in skipped}
    assert rows == {(False, False, True), (True, False, True)}
    assert not any(skipped[:, :2].any() for skipped in seen), "the prefix is dense"
    assert all(parameter.grad is not None for parameter in modules.bypasses[2].parameters())
