from __future__ import annotations

import numpy as np
import pytest
import torch

from dash_export.policy.compensation import ADDED, UpdateStatistics
from dash_export.policy.corpus import Batch
from dash_export.policy.gated_model import GatedModel
from tests.tiny import random_ids

LAYERS = (1, 3)


def batch(seed: int) -> Batch:
    ids = random_ids(4 * 32, seed=seed).reshape(4, 32)
    counted = np.ones(ids.shape, bool)
    counted[:, :2] = False
    return Batch(ids, ~counted, counted)


@pytest.fixture(scope="module")
def statistics(model: GatedModel) -> UpdateStatistics:
    found = UpdateStatistics(model, LAYERS)
    for seed in range(12):
        found.add(batch(seed))
    return found


def updates(model: GatedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, u) of the tokens that count, straight from the model."""
    pairs = []
    for seed in range(12):
        made = batch(seed)
        with torch.no_grad():
            _, before, after = list(model.dense_layers(torch.from_numpy(made.ids)))[layer]
        counted = torch.from_numpy(made.counted)
        pairs.append((before[counted], after[counted] - before[counted]))
    return torch.cat([h for h, _ in pairs]), torch.cat([u for _, u in pairs])


def test_full_rank_is_ridge_regression(model: GatedModel, statistics: UpdateStatistics) -> None:
    hidden = model.spec.hidden_size
    fitted = statistics.low_rank(hidden)
    for row, layer in enumerate(LAYERS):
        h, u = updates(model, layer)
        x = model.normed(h).double()
        ridge = torch.eye(hidden, dtype=torch.float64) * len(x) * 1e-3
        expected = torch.linalg.solve(x.T @ x + ridge, x.T @ u.double())
        whole = fitted.weights["down"][row] @ fitted.weights["up"][row]
        np.testing.assert_allclose(whole, expected.numpy(), atol=1e-3)


def test_a_higher_rank_explains_more(model: GatedModel, statistics: UpdateStatistics) -> None:
    shares = []
    for rank in (2, 8, model.spec.hidden_size):
        fitted = statistics.low_rank(rank)
        assert fitted.weights["down"].shape == (len(LAYERS), model.spec.hidden_size, rank)
        h, u = updates(model, LAYERS[0])
        down, up = (torch.from_numpy(fitted.weights[name][0]) for name in ("down", "up"))
        left = u - model.normed(h) @ down @ up
        shares.append(1 - float(left.square().sum() / u.square().sum()))
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] > 0


def test_what_is_fitted_beside_another_explains_the_rest(model: GatedModel, statistics: UpdateStatistics) -> None:
    """Half of it is added; with all of it the map is that of the higher rank."""
    hidden, known = model.spec.hidden_size, statistics.low_rank(3)
    wide = statistics.low_rank(hidden, known)
    for row in range(len(LAYERS)):
        down, up = wide.weights["down"][row], wide.weights["up"][row]
        np.testing.assert_array_equal(down[:, :3], known.weights["down"][row])
        best = statistics.low_rank(hidden).weights
        whole = down[:, :3] @ up[:3] + down[:, 3:] @ up[3:] / ADDED
        # The known map is not shrunk by the ridge again.
        np.testing.assert_allclose(whole, best["down"][row] @ best["up"][row], atol=5e-3)


def test_scale_is_least_squares(model: GatedModel, statistics: UpdateStatistics) -> None:
    h, u = updates(model, LAYERS[1])
    assert statistics.scale().weights["factor"][1] == pytest.approx(float((h * u).sum() / (h * h).sum()), rel=1e-3)


def test_cosine_order(model: GatedModel, statistics: UpdateStatistics) -> None:
    def similarity(layer: int) -> float:
        h, u = updates(model, layer)
        return float(torch.nn.functional.cosine_similarity(h, h + u, dim=-1).mean())

    assert statistics.cosine_order() == tuple(sorted(LAYERS, key=lambda layer: -similarity(layer)))
