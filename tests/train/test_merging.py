from dataclasses import replace

import numpy as np
import torch

from dash_export.core.policy import SkipPolicy, check_policy
from dash_export.core.units import Unit
from dash_export.models import Checkpoint
from dash_export.models.torch_model import bypass_input
from dash_export.train.merging import merged
from dash_export.train.model import GatedModel, SkipModules
from tests.tiny import tiny_policy
from tests.train.helpers import batch

PARTS = (Unit(1, 1), Unit(2, 3), Unit(5, 5))
UNITS = (Unit(1, 3), Unit(5, 5))


def test_a_merged_unit_does_what_its_parts_did(checkpoint: Checkpoint, model: GatedModel) -> None:
    policy = tiny_policy(checkpoint, "linear", units=PARTS)
    assert policy.network is not None
    policy = replace(policy, network={name: 0.2 * array for name, array in policy.network.items()})
    network, *bypasses = merged(model, policy, UNITS, map(batch, range(12)))
    for name, array in policy.network.items():
        np.testing.assert_array_equal(network[name][..., 1], array[..., 2])
    np.testing.assert_array_equal(bypasses[1]["weight"], policy.bypasses[2]["weight"])
    larger = SkipPolicy(UNITS, policy.read, network, tuple(bypasses))
    check_policy(larger, checkpoint.spec)
    given, before, after = batch(0), SkipModules(policy), SkipModules(larger)
    # Half of the tokens: the others attend to the K and V of these.
    skips = torch.rand(*given.ids.shape, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    with torch.no_grad():
        chained = model.rollout(given.ids, before, lambda _: skips[..., [0, 0, 1]], given.dense)
        whole = model.rollout(given.ids, after, lambda _: skips, given.dense)
        dense = model.dense(given.ids)
        damage, expected = after.damage(whole.state), before.damage(chained.state)
    counted = given.counted
    off = (whole.final - chained.final)[counted].square().mean()
    assert off < 0.02 * (dense - chained.final)[counted].square().mean()
    found, total = damage[counted][:, 0], expected[counted][:, :2].sum(-1)
    assert (found - total).square().mean() < 0.1 * total.var()


def test_its_columns_are_what_the_parts_give_one_after_the_other(checkpoint: Checkpoint, model: GatedModel) -> None:
    """The update, then K and V of layers 2 and 3."""
    policy = tiny_policy(checkpoint, "linear", units=PARTS)
    _, weights, _ = merged(model, policy, UNITS, map(batch, range(12)))
    parts, given = SkipModules(policy), batch(0)
    with torch.no_grad():
        _, entering, _ = next(each for each in model.dense_layers(given.ids) if each[0] == 1)
        entering = entering[given.counted]
        between = entering + parts.bypass(0, bypass_input(entering, model.spec))
        last = parts.bypass(1, bypass_input(between, model.spec))
        hidden = entering.shape[-1]
        update = between + last[:, :hidden] - entering
        expected = torch.cat([update, model.keys_values(2, between), last[:, hidden:]], 1)
        found = bypass_input(entering, model.spec) @ torch.tensor(weights["weight"]) + torch.tensor(weights["bias"])
    unexplained = (found - expected).square().mean(0) / expected.var(0)
    assert unexplained.max() < 0.2
    assert unexplained.mean() < 0.05


def test_a_damage_of_0_is_taken(checkpoint: Checkpoint, model: GatedModel) -> None:
    policy = tiny_policy(checkpoint, "linear", units=PARTS)
    assert policy.network is not None
    network, *_ = merged(
        model, replace(policy, network={**policy.network, "bias": np.full(3, -200, np.float32)}), UNITS, [batch(0)]
    )
    assert np.isfinite(network["weight"]).all()


def test_without_a_network_there_is_none(checkpoint: Checkpoint, model: GatedModel) -> None:
    policy = tiny_policy(checkpoint, "linear", units=PARTS)
    static = SkipPolicy(PARTS, policy.read, None, policy.bypasses)
    network, *bypasses = merged(model, static, UNITS, map(batch, range(2)))
    assert (network, len(bypasses)) == ({}, 2)
