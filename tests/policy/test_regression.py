"""The network learns what skipping costs, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dash_export.models import open_checkpoint
from dash_export.policy.corpus import Batch
from dash_export.policy.gated_model import GatedModel
from dash_export.policy.ranking import judged, single_damages
from dash_export.policy.regression import Regression
from dash_export.policy.skip_modules import SkipModules, initial_network
from dash_export.skip_policy import SkipPolicy
from tests.tiny import random_ids, save_model

GATED, IDLE = (2, 3, 4), 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GatedModel:
    """Layer 3 adds nothing to what enters it."""
    folder = tmp_path_factory.mktemp("idle") / "model"
    made = save_model(folder)
    with torch.no_grad():
        for weight in (made.model.layers[IDLE].self_attn.o_proj.weight, made.model.layers[IDLE].mlp.down_proj.weight):
            weight.zero_()
    made.save_pretrained(folder)
    return GatedModel(open_checkpoint(folder), torch.device("cpu"), torch.float32)


def batch(seed: int) -> Batch:
    ids = random_ids(4 * 32, seed=seed).reshape(4, 32)
    dense = np.broadcast_to(np.arange(32) < 2, ids.shape)
    return Batch(ids, dense.copy(), ~dense)


def test_an_idle_layer_costs_nothing(model: GatedModel) -> None:
    network = initial_network(len(GATED), model.spec.hidden_size, 0, False, 0)
    modules = SkipModules(SkipPolicy(GATED, network))
    regression = Regression(model, modules, (0.05, 0.5))
    optimizer = torch.optim.Adam(modules.parameters(), 0.05)
    rng = np.random.default_rng(0)
    for step in range(120):
        optimizer.zero_grad()
        regression.loss(batch(step), rng, on_policy=step > 50).backward()
        optimizer.step()
    with torch.no_grad():
        ids = torch.from_numpy(batch(1000).ids)
        damage = model.rollout(ids, modules, lambda _, known: known < 0, torch.zeros_like(ids).bool()).damage
    learnt = damage.mean((0, 1)).numpy()
    alone = single_damages(model, modules, judged(model, [batch(1000)]))
    idle = GATED.index(IDLE)
    assert alone[idle] == pytest.approx(0, abs=1e-6)
    assert learnt[idle] < 0.1 * min(np.delete(learnt, idle))
    np.testing.assert_allclose(np.delete(learnt, idle), np.delete(alone, idle), rtol=0.3)
