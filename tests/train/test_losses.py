"""Divergence is that of autograd; the network learns what skipping costs, unit by unit; and where time is dear the
tuned network skips more, where divergence is dear less: both hear it through decisions.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dash_export.core.policy import SkipPolicy
from dash_export.core.units import Unit, parse_units
from dash_export.models import Checkpoint, open_checkpoint
from dash_export.train import losses
from dash_export.train.losses import (
    dense_logits,
    divergence,
    kl_divergence,
    regression_loss,
    static_loss,
    summed_divergence,
    tuning_loss,
)
from dash_export.train.model import GatedModel, Head, SkipModules, always, below, initial_network
from dash_export.train.partition import static_damage, with_dense
from tests.tiny import save_model, tiny_policy
from tests.train.helpers import batch

ROWS = 64


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS", ROWS * 50)


def states(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    head, dense, skipped = (torch.randn(*shape, generator=generator) for shape in ((50, 8), (rows, 8), (rows, 8)))
    return head, dense, skipped, torch.randint(0, 50, (rows,), generator=generator)


def reference(head: torch.Tensor, dense: torch.Tensor, skipped: torch.Tensor, cap: float = 0.0) -> torch.Tensor:
    p, q = dense @ head.T, skipped @ head.T
    if cap:
        p, q = cap * torch.tanh(p / cap), cap * torch.tanh(q / cap)
    p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
    return (p.exp() * (p - q)).sum(-1)


def test_divergence_over_several_blocks() -> None:
    head, dense, skipped, targets = states(2 * ROWS + 3)
    found = divergence(Head(head), dense_logits(Head(head), dense), skipped, targets)
    torch.testing.assert_close(found.kl, reference(head, dense, skipped), atol=1e-5, rtol=1e-4)
    expected = torch.log_softmax(skipped @ head.T, -1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.log_likelihood, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kl_divergence(Head(head), dense_logits(Head(head), dense), skipped), found.kl)
    assert torch.equal(found.agree, (dense @ head.T).argmax(-1) == (skipped @ head.T).argmax(-1))


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_summed_divergence_has_the_gradient_of_autograd(cap: float) -> None:
    head, dense, skipped, _ = states(ROWS + 5)
    weight = torch.rand(len(dense), generator=torch.Generator().manual_seed(1))
    ours, theirs = skipped.clone().requires_grad_(), skipped.clone().requires_grad_()
    value = summed_divergence(Head(head, cap), dense_logits(Head(head), dense), ours, weight)
    expected = (reference(head, dense, theirs, cap) * weight).sum()
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


NEAR = 0.03
"""How far the logarithm of a damage lies from that of the limit, at first."""


@pytest.fixture(scope="module")
def policy(checkpoint: Checkpoint) -> SkipPolicy:
    return tiny_policy(checkpoint, "linear")


def constant(policy: SkipPolicy, hidden: int, bias: np.ndarray) -> SkipModules:
    """Of one damage for every state."""
    network = {"weight": np.zeros((hidden, len(bias)), np.float32), "bias": bias.astype(np.float32)}
    return SkipModules(replace(policy, network=network))


@pytest.mark.parametrize(("trade_off", "first", "last"), [(60.0, 0.0, 1.0), (0.06, 1.0, 0.0)], ids=["time", "KL"])
def test_what_is_dear_decides(
    model: GatedModel, policy: SkipPolicy, trade_off: float, first: float, last: float
) -> None:
    """From all damages just above the limit to all below it, or the other way round."""
    limits = trade_off * SkipModules(policy).cost(model.spec)
    damage = limits.numpy() * np.exp(NEAR if first == 0 else -NEAR)
    modules = constant(policy, model.spec.hidden_size, np.log(np.expm1(damage)))
    optimizer = torch.optim.Adam([modules.network["bias"]], 0.05)

    def skipped() -> float:
        ids = batch(1000).ids
        with torch.no_grad():
            rollout = model.rollout(ids, modules, below(limits), torch.zeros_like(ids).bool())
        return float(rollout.skipped.float().mean())

    assert skipped() == first
    for step in range(12):
        optimizer.zero_grad()
        tuning_loss(model, modules, (trade_off, trade_off * 1.001), batch(step), np.random.default_rng(step)).backward()
        optimizer.step()
    assert skipped() == last


def test_time_is_what_a_unit_saves(model: GatedModel, policy: SkipPolicy) -> None:
    """Where all of both units is skipped, a unit of two layers counts as what it saves, not as one of two."""
    modules = constant(policy, model.spec.hidden_size, np.full(len(policy.units), -40.0))
    ids, dense, counted = given = batch(0)
    with torch.no_grad():
        final = model.rollout(ids, modules, always(2, (0, 1)), dense).final[counted]
        p = torch.log_softmax(model.dense(ids)[counted] @ model.head.weight.T, -1)
        q = torch.log_softmax(final @ model.head.weight.T, -1)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        loss = float(tuning_loss(model, modules, (2.0, 2.0 + 1e-9), given, np.random.default_rng(0)))
    assert loss == pytest.approx(kl / 2 - float(modules.cost(model.spec).sum()), rel=1e-4)


def test_a_static_tuning_skips_the_first_of_its_order(
    model: GatedModel, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to half of the six layers: 4-5, or 4-5 and 2, and never 3."""
    modules = SkipModules(tiny_policy(checkpoint, "linear", units=parse_units("2,3,4-5")))
    seen: list[torch.Tensor] = []
    rollout = GatedModel.rollout
    monkeypatch.setattr(GatedModel, "rollout", lambda *given: seen.append(rollout(*given).skipped) or rollout(*given))
    for step in range(4):
        static_loss(model, modules, (2, 0, 1), batch(step), np.random.default_rng(step)).backward()
    rows = {tuple(window[-1].tolist()) for skipped in seen for window in skipped}
    assert rows == {(False, False, True), (True, False, True)}
    assert not any(skipped[:, :2].any() for skipped in seen), "the prefix is dense"
    assert all(parameter.grad is not None for parameter in modules.bypasses[2].parameters())


UNITS, IDLE = (Unit(2, 2), Unit(3, 3), Unit(4, 5)), 1


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Layer 3 adds nothing to what enters it."""
    folder = tmp_path_factory.mktemp("idle") / "model"
    made = save_model(folder)
    with torch.no_grad():
        layer = made.model.layers[UNITS[IDLE].first]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            weight.zero_()
    made.save_pretrained(folder)
    return open_checkpoint(folder)


def test_an_idle_unit_costs_nothing(idle: Checkpoint) -> None:
    model, hidden = GatedModel(idle, torch.device("cpu"), torch.float32), idle.spec.hidden_size
    columns = [idle.spec.bypass_shapes(unit)["bias"][0] for unit in UNITS]
    bypasses = ({"weight": np.zeros((hidden, n), np.float32), "bias": np.zeros(n, np.float32)} for n in columns)
    modules = SkipModules(SkipPolicy(UNITS, 1, initial_network(len(UNITS), hidden), tuple(bypasses)))
    optimizer = torch.optim.Adam(modules.network.parameters(), 0.05)
    rng = np.random.default_rng(0)
    for step in range(120):
        optimizer.zero_grad()
        regression_loss(model, modules, (0.05, 0.5), batch(step), rng, on_policy=step > 50).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in modules.bypasses.parameters()), "it teaches the network only"
    with torch.no_grad():
        ids = batch(1000).ids
        rollout = model.rollout(ids, modules, lambda known: known < 0, torch.zeros_like(ids).bool())
        learnt = modules.damage(rollout.state).mean((0, 1)).numpy()
    windows = with_dense(model, [batch(1000)])
    alone = np.array([float(static_damage(model, modules, (place,), windows).mean()) for place in range(len(UNITS))])
    assert alone[IDLE] == pytest.approx(0, abs=1e-6)
    assert learnt[IDLE] < 0.1 * min(np.delete(learnt, IDLE))
    np.testing.assert_allclose(np.delete(learnt, IDLE), np.delete(alone, IDLE), rtol=0.3)


def test_losses_compare_the_tokens_that_they_are_told(checkpoint: Checkpoint, policy: SkipPolicy) -> None:
    """Of no tokens but one all distributions are the same; figures are over all tokens."""
    model, modules, given = GatedModel(checkpoint, torch.device("cpu"), torch.float32), SkipModules(policy), batch(0)
    assert static_damage(model, modules, (0,), with_dense(model, [given])).max() > 1e-3
    model.learn_on(torch.tensor([7]))
    assert static_damage(model, modules, (0,), with_dense(model, [given])).abs().max() < 1e-6
    assert len(model.head.weight) == checkpoint.spec.vocab_size
