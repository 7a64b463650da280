"""The network learns what skipping costs, unit by unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dash_export.decision import Unit
from dash_export.models import Checkpoint, open_checkpoint
from dash_export.policy import Bypass, SkipPolicy, stored_columns
from dash_export.train.corpus import Batch
from dash_export.train.gated_model import GatedModel
from dash_export.train.ranking import judged, static_damage
from dash_export.train.regression import Regression
from dash_export.train.skip_modules import SkipModules, initial_network
from tests.tiny import random_ids, save_model

UNITS, IDLE = (Unit(2, 2), Unit(3, 3), Unit(4, 5)), 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Layer 3 adds nothing to what enters it."""
    folder = tmp_path_factory.mktemp("idle") / "model"
    made = save_model(folder)
    with torch.no_grad():
        layer = made.model.layers[UNITS[IDLE].first]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
    made.save_pretrained(folder)
    return open_checkpoint(folder)


def batch(seed: int) -> Batch:
    ids = random_ids(4 * 32, seed=seed).reshape(4, 32)
    dense = np.broadcast_to(np.arange(32) < 2, ids.shape)
    return Batch(ids, dense.copy(), ~dense)


def test_an_idle_unit_costs_nothing(checkpoint: Checkpoint) -> None:
    model, hidden = GatedModel(checkpoint, torch.device("cpu"), torch.float32), checkpoint.spec.hidden_size
    bypasses = []
    for unit in UNITS:
        columns = stored_columns(unit, checkpoint.spec)
        bypasses.append(
            Bypass({"weight": np.zeros((hidden, columns), np.float32), "bias": np.zeros(columns, np.float32)})
        )
    modules = SkipModules(SkipPolicy(UNITS, 1, initial_network(len(UNITS), hidden), tuple(bypasses)))
    regression = Regression(model, modules, (0.05, 0.5))
    optimizer = torch.optim.Adam(modules.network.parameters(), 0.05)
    rng = np.random.default_rng(0)
    for step in range(120):
        optimizer.zero_grad()
        regression.loss(batch(step), rng, on_policy=step > 50).backward()
        optimizer.step()
    with torch.no_grad():
        ids = torch.from_numpy(batch(1000).ids)
        damage = model.rollout(ids, modules, lambda known: known < 0, torch.zeros_like(ids).bool()).damage
    learnt = damage.mean((0, 1)).numpy()
    windows = judged(model, [batch(1000)])
    alone = np.array([float(static_damage(model, modules, (place,), windows).mean()) for place in range(len(UNITS))])
    assert alone[IDLE] == pytest.approx(0, abs=1e-6)
    assert learnt[IDLE] < 0.1 * min(np.delete(learnt, IDLE))
    np.testing.assert_allclose(np.delete(learnt, IDLE), np.delete(alone, IDLE), rtol=0.3)
