from pathlib import Path

import numpy as np
import pytest
import torch

from dash_export.core.policy import no_policy
from dash_export.core.units import Unit
from dash_export.models import Checkpoint
from dash_export.reference import Oracle
from dash_export.train.closed_form import RIDGE, Sums
from dash_export.train.model import GatedModel
from tests.tiny import tiny_checkpoint
from tests.train.helpers import batch

UNITS = (Unit(1, 1), Unit(1, 3), Unit(2, 3), Unit(4, 5))
BATCHES = 12


@pytest.fixture(scope="module")
def sums(model: GatedModel) -> Sums:
    found = Sums(model, UNITS)
    for seed in range(BATCHES):
        found.add(batch(seed))
    return found


def rows(checkpoint: Checkpoint, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the tokens that count, by hooks on the transformers model."""
    oracle = Oracle(checkpoint, no_policy(checkpoint.spec.num_layers))
    layers, seen = oracle.model.model.layers, {}
    watched = {"entered": layers[unit.first].input_layernorm, "left": layers[unit.last]}
    for layer in unit.layers[1:]:
        watched |= {f"{layer} {which}": getattr(layers[layer].self_attn, f"{which}_proj") for which in ("k", "v")}
    hooks = [
        module.register_forward_hook(
            lambda _module, given, found, name=name: seen.setdefault(name, []).append(
                given[0] if name == "entered" else found
            )
        )
        for name, module in watched.items()
    ]
    for seed in range(BATCHES):
        for ids in batch(seed).ids.numpy():
            oracle.forward(ids)
    for hook in hooks:
        hook.remove()
    parts = {name: torch.cat([found[0, 2:] for found in each]).double() for name, each in seen.items()}
    entered = parts.pop("entered")
    update = parts.pop("left") - entered
    x = oracle.normed(entered).numpy()
    return np.hstack([x, np.ones((len(x), 1))]), torch.cat([update, *parts.values()], 1).numpy()


@pytest.mark.parametrize("unit", UNITS[1::2], ids=str)
def test_a_bypass_is_ridge_regression(checkpoint: Checkpoint, sums: Sums, unit: Unit) -> None:
    """As least squares, with a row for what the ridge holds every weight to."""
    x, y = rows(checkpoint, unit)
    ridge = np.sqrt(RIDGE * len(x)) * np.eye(x.shape[1])
    expected, *_ = np.linalg.lstsq(
        np.vstack([x, ridge]), np.vstack([y, np.zeros((len(ridge), y.shape[1]))]), rcond=None
    )
    weights = sums.fit(unit)
    assert weights["weight"].shape[1] == checkpoint.spec.bypass_shapes(unit)["bias"][0]
    np.testing.assert_allclose(weights["weight"], expected[:-1], atol=1e-3)
    np.testing.assert_allclose(weights["bias"], expected[-1], atol=1e-3)


def test_states_that_are_not_normed(tmp_path: Path) -> None:
    """OLMo 2's layers read the state itself, and so do its bypasses."""
    model = GatedModel(tiny_checkpoint(tmp_path / "model", "olmo2", pad_token_id=0), torch.device("cpu"), torch.float32)
    unit, given = Unit(2, 3), batch(1)
    found = Sums(model, [unit])
    found.add(given)
    states = {layer: (before, after) for layer, before, after in model.dense_layers(given.ids)}
    entered, left = states[2][0][given.counted], states[3][1][given.counted]
    keys_values = model.keys_values(3, states[3][0])[given.counted]
    weights = found.fit(unit)
    predicted = entered.numpy() @ weights["weight"] + weights["bias"]
    wanted = np.hstack([left - entered, keys_values])
    x = np.hstack([entered, np.ones((len(entered), 1))])
    best, *_ = np.linalg.lstsq(x, wanted, rcond=None)
    np.testing.assert_allclose(predicted, x @ best, atol=0.02 * float(wanted.std()))
