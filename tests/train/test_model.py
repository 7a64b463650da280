"""Training sees the contract that the oracle states: same logits, same damage, same decisions."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_export.core.policy import SkipPolicy
from dash_export.core.rule import DecisionRule
from dash_export.core.units import DENSE_POSITIONS, Unit, parse_units, unit_skips
from dash_export.models import Checkpoint
from dash_export.models.bypasses import full_bypass
from dash_export.models.torch_model import logits_of
from dash_export.reference import Oracle
from dash_export.train.model import GatedModel, Rollout, SkipModules, below, saved
from tests.tiny import random_actions, random_ids, tiny_checkpoint, tiny_policy

TOKENS = 24


def of_few_bits(checkpoint: Checkpoint) -> Checkpoint:
    """Its K, V and their gains are rounded: a bundle's bypasses keep the products in 16 bits, training has the model's
    own, and here both are the same.
    """
    weights = dict(checkpoint.weights)
    for name, weight in weights.items():
        steps = 4 if "input_layernorm" in name else 128
        if re.search("input_layernorm|[kv]_proj.weight", name):
            weights[name] = replace(weight, rows=lambda *at, of=weight, by=steps: np.round(of.rows(*at) * by) / by)
    return replace(checkpoint, weights=weights)


def policy_of(checkpoint: Checkpoint, units: str) -> SkipPolicy:
    policy = tiny_policy(checkpoint, "linear", units=parse_units(units))
    return policy.in_half()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return of_few_bits(tiny_checkpoint(tmp_path_factory.mktemp("policy") / "model"))


@pytest.fixture(params=["2-3,4", "1,3-5"])
def policy(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> SkipPolicy:
    return policy_of(checkpoint, request.param)


def logits(model: GatedModel, rollout: Rollout) -> np.ndarray:
    return logits_of(model.model, rollout.final[0], model.spec.traits).numpy()


@torch.no_grad()
def test_forced_actions(model: GatedModel, checkpoint: Checkpoint, policy: SkipPolicy) -> None:
    ids = random_ids(TOKENS)
    actions = random_actions(TOKENS, checkpoint.spec.num_layers, policy.units)
    expected = Oracle(checkpoint, policy).forward(ids, actions=actions)
    skips = torch.from_numpy(unit_skips(actions, policy.units).T[None])
    modules, dense = SkipModules(policy), torch.zeros(1, TOKENS, dtype=torch.bool)
    rollout = model.rollout(torch.from_numpy(ids[None]), modules, lambda _: skips, dense)
    np.testing.assert_allclose(logits(model, rollout), expected.logits, atol=1e-4)
    damage = modules.damage(rollout.state)[0]
    np.testing.assert_allclose(damage.numpy(), expected.damage, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("gemma2", {"head_dim": 16, "sliding_window": 9, "final_logit_softcapping": 5.0}),
        (
            "gemma3_text",
            {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 9},
        ),
        ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 0.5, "residual_multiplier": 0.6}),
        ("olmo2", {"pad_token_id": 0}),
    ],
)
def test_families(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A bypass's K is what the projection gives, its bias among it, and is normed after."""
    checkpoint = of_few_bits(tiny_checkpoint(tmp_path / "model", family, **options))
    model = GatedModel(checkpoint, torch.device("cpu"), torch.float32)
    test_forced_actions(model, checkpoint, policy_of(checkpoint, "2-3,4"))


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3_text"])
def test_frequencies_are_not_rounded(family: str, tmp_path: Path) -> None:
    """In bfloat16 they turn a head by another angle than the engines do."""
    model = GatedModel(tiny_checkpoint(tmp_path, family, pad_token_id=0), torch.device("cpu"), torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_own_decisions(model: GatedModel, checkpoint: Checkpoint, policy: SkipPolicy) -> None:
    ids = random_ids(TOKENS, seed=3)
    limits = np.median(Oracle(checkpoint, policy).forward(ids).damage, axis=0)
    rule = DecisionRule(tuple(limits.tolist()), tuple(len(unit.layers) for unit in policy.units))
    expected = Oracle(checkpoint, policy).forward(ids, rule=rule)
    dense = torch.arange(TOKENS)[None] < DENSE_POSITIONS
    with torch.no_grad():
        rollout = model.rollout(
            torch.from_numpy(ids[None]), SkipModules(policy), below(torch.from_numpy(limits)), dense
        )
    assert 0 < rollout.skipped.float().mean() < 1
    np.testing.assert_array_equal(rollout.skipped[0].numpy().T, unit_skips(expected.actions, policy.units))
    np.testing.assert_allclose(logits(model, rollout), expected.logits, atol=1e-4)


LIMIT = 0.15


def soft_loss(model: GatedModel, modules: SkipModules, **options: object) -> Rollout:
    ids = torch.from_numpy(random_ids(TOKENS)[None])
    dense = torch.arange(TOKENS)[None] < DENSE_POSITIONS
    return model.rollout(ids, modules, lambda damage: damage < LIMIT, dense, **options)


def soften(damage: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid((LIMIT - damage) / 0.05)


def test_softened_decisions_go_forward_as_they_are(model: GatedModel, checkpoint: Checkpoint) -> None:
    """Straight-through: the values are those of the decisions, the gradient reaches network and bypasses. Nothing of a
    rollout stays in the model.
    """
    modules = SkipModules(tiny_policy(checkpoint, "linear"))
    hard, soft = soft_loss(model, modules), soft_loss(model, modules, soften=soften)
    assert 0 < float(hard.skipped.float().mean()) < 1
    torch.testing.assert_close(soft.final, hard.final)
    torch.testing.assert_close(soft.taken, hard.skipped.float())
    soft.final.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in modules.parameters())
    assert not any(module._forward_hooks for module in model.model.modules())


def test_gradient_of_a_decision(model: GatedModel, checkpoint: Checkpoint) -> None:
    """What the last token skips of the last unit changes its own state only: by the difference of what is bypassed and
    what runs.
    """
    policy = tiny_policy(checkpoint, "linear", units=(Unit(2, 3), Unit(4, 5)))
    modules = SkipModules(policy)
    direction = torch.randn(model.spec.hidden_size, generator=torch.Generator().manual_seed(0))
    ids = torch.from_numpy(random_ids(TOKENS)[None])
    share = torch.zeros(1, TOKENS, 2, requires_grad=True)

    def last(skips: bool, **options: object) -> torch.Tensor:
        chosen = torch.zeros(1, TOKENS, 2, dtype=torch.bool)
        chosen[0, -1, 1] = skips
        dense = torch.zeros(1, TOKENS, dtype=torch.bool)
        return model.rollout(ids, modules, lambda _: chosen, dense, **options).final[0, -1]

    norm = model.model.model.norm
    entered = {}
    hook = norm.register_forward_hook(lambda _module, given, _found: entered.update(state=given[0][0, -1].detach()))
    (last(False, soften=lambda _: share) @ direction).backward()
    ran = entered["state"]
    last(True)
    bypassed = entered["state"]
    hook.remove()
    state = ran.clone().requires_grad_()
    (norm(state) @ direction).backward()
    expected = float(state.grad @ (bypassed - ran))
    assert float(share.grad[0, -1, 1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("token", "heard"), [(3, True), (TOKENS - 1, False)])
def test_keys_and_values_hear_of_later_tokens(
    model: GatedModel, checkpoint: Checkpoint, token: int, heard: bool
) -> None:
    """The columns of a bypass for K and V of a unit's second layer have their gradient from what attends to them."""
    modules = SkipModules(tiny_policy(checkpoint, "linear"))
    skips = torch.zeros(1, TOKENS, 2, dtype=torch.bool)
    skips[0, token, 0] = True
    ids = torch.from_numpy(random_ids(TOKENS)[None])
    model.rollout(ids, modules, lambda _: skips, torch.zeros_like(ids).bool()).final.square().sum().backward()
    gradient = modules.bypasses[0]["weight"].grad.split(model.spec.hidden_size, 1)
    assert gradient[0].abs().sum() > 0
    # A token's own attention reads its K and V too, but what runs is not what it goes on with.
    assert bool(gradient[1].abs().sum() > 0) == heard


def test_recomputed_layers_have_the_same_gradients(checkpoint: Checkpoint) -> None:
    """As on a GPU: the K and V of a bypass are there again when a layer is recomputed."""
    found = []
    for recomputes in (False, True):
        model = GatedModel(checkpoint, torch.device("cpu"), torch.float32)
        model.recomputes = recomputes
        modules = SkipModules(tiny_policy(checkpoint, "linear"))
        soft_loss(model, modules, soften=soften).final.square().sum().backward()
        found.append([parameter.grad for parameter in modules.parameters()])
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_saved_is_bytes(checkpoint: Checkpoint) -> None:
    spec, policy = checkpoint.spec, tiny_policy(checkpoint, "linear")
    sizes = {name: np.prod(shape) for name, shape in spec.weight_shapes().items() if len(shape) == 2}
    token = sum(size for name, size in sizes.items() if "embed_tokens" not in name) / 2
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        full = full_bypass(bypass, unit, checkpoint)
        owed = sum(array.size for array in full.values() if array.ndim == 2)
        layers = sum(size for name, size in sizes.items() for layer in unit.layers if f"layers.{layer}." in name) / 2
        assert saved(spec, len(unit.layers)) == pytest.approx((layers - owed) / token, rel=0.02)


def test_what_a_config_says_beside_the_decoder_is_not_taken(checkpoint: Checkpoint) -> None:
    other = {"num_labels": 10**12, "id2label": 5, "pad_token_id": 10**6, "dtype": "evil", "architectures": ["Other"]}
    other |= {"hidden_act": None, "rms_norm_eps": 1e-6, "attribute_map": {"hidden_size": "vocab_size"}}
    model = GatedModel(replace(checkpoint, config={**checkpoint.config, **other}), torch.device("cpu"), torch.float32)
    ids = torch.from_numpy(random_ids(8))[None]
    same = GatedModel(checkpoint, torch.device("cpu"), torch.float32)
    assert torch.equal(model.dense(ids), same.dense(ids))
