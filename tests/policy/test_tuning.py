"""Where time is dear the tuned network skips more, where divergence is dear less; both hear it through decisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dash_export.policy.corpus import Batch
from dash_export.policy.gated_model import GatedModel, below
from dash_export.policy.skip_modules import SkipModules
from dash_export.policy.tuning import Tuning
from dash_export.skip_policy import SkipPolicy
from tests.tiny import random_ids

GATED = (2, 3, 4)
NEAR = 0.03
"""How far the logarithm of a damage lies from that of the limit, at first."""


def batch(seed: int) -> Batch:
    ids = random_ids(4 * 32, seed=seed).reshape(4, 32)
    dense = np.broadcast_to(np.arange(32) < 2, ids.shape)
    return Batch(ids, dense.copy(), ~dense)


@pytest.mark.parametrize(("trade_off", "first", "last"), [(60.0, 0.0, 1.0), (0.06, 1.0, 0.0)], ids=["time", "KL"])
def test_what_is_dear_decides(model: GatedModel, trade_off: float, first: float, last: float) -> None:
    """From all damages just above the limit to all below it, or the other way round."""
    limit = trade_off / model.spec.num_layers
    damage = limit * np.exp(NEAR if first == 0 else -NEAR)
    hidden = model.spec.hidden_size
    network = {
        "state": np.zeros((len(GATED), hidden, 1), np.float32),
        "bias": np.full((len(GATED), 1), np.log(np.expm1(damage)), np.float32),
    }
    modules = SkipModules(SkipPolicy(GATED, network))
    tuning = Tuning(model, modules, (trade_off, trade_off * 1.001))
    optimizer = torch.optim.Adam([modules.network["bias"]], 0.05)

    def skipped() -> float:
        ids = torch.from_numpy(batch(1000).ids)
        with torch.no_grad():
            rollout = model.rollout(ids, modules, below(limit), torch.zeros_like(ids).bool())
        return float(rollout.skipped.float().mean())

    assert skipped() == first
    for step in range(12):
        optimizer.zero_grad()
        tuning.loss(batch(step), np.random.default_rng(step)).backward()
        optimizer.step()
    assert skipped() == last
