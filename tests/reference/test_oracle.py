"""The oracle against transformers, and against itself broken on purpose: the contract is what the tests can see."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from dash_export import DashRuntime
from dash_export.decision import Action, DecisionRule, decision_rule
from dash_export.models import Checkpoint
from dash_export.reference import Oracle
from dash_export.reference import oracle as oracle_module
from tests.tiny import random_actions, random_ids

GATED = (2, 3, 4)
IDS = random_ids(60)
LoadRuntime = Callable[..., DashRuntime]


def rule_of(runtime: DashRuntime, max_layers: int | None = None) -> DecisionRule:
    return decision_rule(6, GATED, runtime.cost.cost, runtime.build.dial["token"][5].trade_off, max_layers)


@pytest.mark.model
def test_dense_is_transformers(smollm2: Checkpoint, smollm2_oracle: Oracle) -> None:
    """The model's own forward, masks and positions its own."""
    model = transformers.AutoModelForCausalLM.from_config(smollm2_oracle.model.config).eval()
    model.load_state_dict(smollm2_oracle.model.state_dict())
    ids = random_ids(80, smollm2.spec.vocab_size)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(smollm2_oracle.forward(ids).logits, expected, atol=1e-3)


def test_actions_of_zero_are_dense(tiny_oracle: Oracle) -> None:
    dense = tiny_oracle.forward(IDS)
    forced = tiny_oracle.forward(IDS, actions=np.zeros((60, 6), np.int8))
    np.testing.assert_array_equal(forced.logits, dense.logits)
    assert not dense.actions.any()


def test_a_skip_reaches_later_tokens_only(tiny_oracle: Oracle) -> None:
    """Causal: nothing before the skipped token changes, what follows reads its keys and values."""
    actions = np.zeros((60, 6), np.int8)
    actions[30, 3] = Action.SKIP
    dense, skipped = tiny_oracle.forward(IDS).logits, tiny_oracle.forward(IDS, actions=actions).logits
    np.testing.assert_allclose(skipped[:30], dense[:30], atol=1e-5)
    assert np.abs(skipped[30] - dense[30]).max() > 0.01
    assert np.abs(skipped[31:] - dense[31:]).max() > 1e-4


def test_prefix_and_first_positions_are_dense(tiny_oracle: Oracle, tiny_runtime: LoadRuntime) -> None:
    rule = rule_of(tiny_runtime(), max_layers=3)
    for prefix in (1, 2, 20):
        actions = tiny_oracle.forward(IDS, rule, prefix=prefix).actions
        assert not actions[: max(prefix, 2)].any()
        assert (actions[max(prefix, 2) :].sum(axis=1) == 3).all()


def test_generate_repeats_forward(tiny_oracle: Oracle, tiny_runtime: LoadRuntime) -> None:
    rule = rule_of(tiny_runtime())
    ids, last = tiny_oracle.generate(IDS[:10], 12, rule)
    again = tiny_oracle.forward(ids, rule, prefix=10)
    np.testing.assert_array_equal(ids[10:], again.logits[9:-1].argmax(axis=-1))
    np.testing.assert_array_equal(last.actions, again.actions[:-1])


class TestBrokenOnPurpose:
    """Each clause of the contract, broken in the oracle, must part it from the runtime."""

    @staticmethod
    def differences(runtime: DashRuntime, oracle: Oracle) -> tuple[float, int]:
        """Largest logit difference under random forced actions, and decisions that differ under a rule."""
        actions = random_actions(60, 6, GATED)
        logits = runtime.session().logits(IDS, actions=actions) - oracle.forward(IDS, actions=actions).logits
        rule = rule_of(runtime)
        decided = runtime.session_under(rule).score(IDS).actions != oracle.forward(IDS, rule).actions
        return float(np.abs(logits).max()), int(decided.sum())

    def test_sound(self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle) -> None:
        logits, decisions = self.differences(tiny_runtime(), tiny_oracle)
        assert logits < 1e-4
        assert decisions == 0

    def test_compensation_left_out(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Oracle, "compensation", lambda oracle, hidden, layer: torch.zeros_like(hidden))  # noqa: ARG005
        assert self.differences(tiny_runtime(), tiny_oracle)[0] > 0.05

    def test_compensation_of_a_neighbour(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = Oracle.compensation
        monkeypatch.setattr(Oracle, "compensation", lambda oracle, hidden, layer: sound(oracle, hidden, 2 + layer % 3))
        assert self.differences(tiny_runtime(), tiny_oracle)[0] > 0.05

    def test_policy_of_a_neighbour(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = Oracle.damage
        wrong = {2: 3, 3: 4, 4: 2}
        monkeypatch.setattr(
            Oracle, "damage", lambda oracle, state, actions, layer: sound(oracle, state, actions, wrong[layer])
        )
        assert self.differences(tiny_runtime(), tiny_oracle)[1] > 0

    def test_policy_that_does_not_look_ahead(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Reading the gated layer's own input instead of the one before."""
        sound, inputs = Oracle.damage, []

        def own_input(oracle: Oracle, state: torch.Tensor, actions: np.ndarray, layer: int) -> np.ndarray:
            decoder = oracle.model.model
            inputs.append(layer)
            with torch.no_grad():
                count = len(actions)
                hidden = state[None]
                rotary = decoder.rotary_emb(hidden, torch.arange(count)[None])
                mask = torch.full((count, count), float("-inf")).triu(1)[None, None]
                ran = decoder.layers[layer - 1](hidden, attention_mask=mask, position_embeddings=rotary)
                return sound(oracle, (ran[0] if isinstance(ran, tuple) else ran)[0], actions, layer)

        monkeypatch.setattr(Oracle, "damage", own_input)
        assert self.differences(tiny_runtime(), tiny_oracle)[1] > 0
        assert inputs

    def test_history_left_out(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = Oracle.damage
        monkeypatch.setattr(
            Oracle,
            "damage",
            lambda oracle, state, actions, layer: sound(oracle, state, np.zeros_like(actions), layer),
        )
        runtime = tiny_runtime()
        actions = random_actions(60, 6, GATED, share=0.7)
        damage = runtime.session().score(IDS, actions=actions).damage
        assert np.abs(damage - tiny_oracle.forward(IDS, actions=actions).damage).max() > 0.01

    def test_threshold_that_ignores_the_cost(self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle) -> None:
        """With uneven costs, one limit for all layers decides otherwise."""
        runtime = tiny_runtime()
        middle = float(np.median(runtime.session().score(IDS).damage[:, GATED]))
        uneven = {2: 0.3, 3: 0.1, 4: 0.03}
        rule = decision_rule(6, GATED, uneven, middle / 0.1)
        expected = tiny_oracle.forward(IDS, rule).actions
        np.testing.assert_array_equal(runtime.session_under(rule).score(IDS).actions, expected)
        flat = decision_rule(6, GATED, dict.fromkeys(GATED, 0.1), middle / 0.1)
        assert (runtime.session_under(flat).score(IDS).actions != expected).any()

    def test_damage_with_its_sign_flipped(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = Oracle.damage
        monkeypatch.setattr(Oracle, "damage", lambda *given: -sound(*given))
        assert self.differences(tiny_runtime(), tiny_oracle)[1] > 0

    def test_positions_counted_from_the_wrong_end(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the rotation, and of the positions that are always dense."""
        sound = torch.arange
        monkeypatch.setattr(torch, "arange", lambda count: sound(count).flip(0))
        assert self.differences(tiny_runtime(), tiny_oracle)[0] > 0.01
        monkeypatch.undo()
        backwards = SimpleNamespace(**{**vars(np), "arange": lambda count: np.arange(count)[::-1]})
        monkeypatch.setattr(oracle_module, "np", backwards)
        assert self.differences(tiny_runtime(), tiny_oracle)[1] > 0

    def test_skipped_token_without_keys(
        self, tiny_runtime: LoadRuntime, tiny_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Holes in the cache, in the oracle: the skipped token's keys and values hidden from later tokens."""
        actions = random_actions(60, 6, GATED)
        sound = torch.Tensor.triu
        current = iter(range(100))

        def holes(tensor: torch.Tensor, diagonal: int = 0) -> torch.Tensor:
            next(current)
            mask = sound(tensor, diagonal)
            hidden = torch.from_numpy(actions[:, 3] == Action.SKIP)
            mask[:, hidden] = float("-inf")
            mask.fill_diagonal_(0)
            return mask

        monkeypatch.setattr(torch.Tensor, "triu", holes)
        assert self.differences(tiny_runtime(), tiny_oracle)[0] > 0.01
