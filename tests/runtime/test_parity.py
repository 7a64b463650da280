"""SmolLM2 through the engines, in fp32, against the PyTorch oracle on real prompts."""

from collections.abc import Callable

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.policy import SkipPolicy
from dash_export.core.rule import DecisionRule, decision_rule
from dash_export.core.units import unit_skips
from dash_export.files.resources import resource_folder
from dash_export.reference import Oracle
from tests.runtime.prompts import prompts
from tests.tiny import random_actions

pytestmark = pytest.mark.model

NEW_TOKENS = 64
TOLERANCE = 2e-3
TIE = 1e-4
WINDOW = 256
LoadRuntime = Callable[..., DashRuntime]


@pytest.fixture(scope="module")
def runtime(smollm2_runtime: LoadRuntime) -> DashRuntime:
    return smollm2_runtime("cpu-fp32")


@pytest.fixture(scope="module")
def rule(runtime: DashRuntime, smollm2_policy: SkipPolicy) -> DecisionRule:
    """In the middle of the dial."""
    trade_off = runtime.build.dial[len(runtime.build.dial) // 2].trade_off
    return decision_rule(smollm2_policy.units, runtime.cost.cost, trade_off)


def greedy(runtime: DashRuntime, ids: np.ndarray) -> np.ndarray:
    """64 tokens, past an end of turn too."""
    session = runtime.session("dense")
    tokens: list[int] = []
    logits = session.prefill(ids)
    for _ in range(NEW_TOKENS):
        tokens.append(int(logits.argmax()))
        logits, _ = session.decode_one(tokens[-1])
    return np.array(tokens)


def test_forced_actions(runtime: DashRuntime, smollm2_oracle: Oracle, smollm2_policy: SkipPolicy) -> None:
    """From dense to half of all units, of prompts with their dense continuation."""
    for seed, prompt in enumerate(prompts(runtime)):
        ids = np.concatenate([prompt, greedy(runtime, prompt)])
        actions = random_actions(len(ids), 30, smollm2_policy.units, seed, share=0.1 * seed)
        expected = smollm2_oracle.forward(ids, actions=actions)
        found = runtime.session().score(ids, actions=actions, keep_logits=True)
        np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE)
        np.testing.assert_allclose(found.damage, expected.damage, atol=TIE)
        if not seed:
            chosen = expected.logits[-NEW_TOKENS - 1 : -1].argmax(axis=-1)
            np.testing.assert_array_equal(ids[-NEW_TOKENS:], chosen)


def test_two_thousand_tokens_of_prose(runtime: DashRuntime, smollm2_oracle: Oracle, rule: DecisionRule) -> None:
    """The oracle's actions forced: the same logits, the same damage, and so the same decisions but for ties."""
    units, limits = runtime.engines.units, np.array(rule.limits)
    text = runtime.text.encode((resource_folder("calibration") / "heldout.txt").read_text(encoding="utf-8"))
    wrong, far, skips, decisions = 0, 0, 0, 0
    for start in range(0, 8 * WINDOW, WINDOW):
        ids = np.array(text[start : start + WINDOW], np.int64)
        expected = smollm2_oracle.forward(ids, rule)
        found = runtime.session().score(ids, actions=expected.actions, keep_logits=True)
        np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE)
        skipped = unit_skips(expected.actions, units)[:, 2:]
        differs = rule.skips(found.damage[2:].T) != skipped
        wrong += int(differs.sum())
        far += int((differs & (np.abs(expected.damage[2:] - limits).T > TIE)).sum())
        skips += int(skipped.sum())
        decisions += skipped.size
    assert decisions > 2000 * len(units)
    assert 0.05 < skips / decisions < 0.95, "the trade-off must make the policy decide both ways"
    assert wrong < 0.005 * decisions
    assert far == 0


@pytest.mark.parametrize("bound", [None, 1])
def test_token_policy_free_running(
    bound: int | None, runtime: DashRuntime, smollm2_oracle: Oracle, rule: DecisionRule
) -> None:
    """What the runtime generated under its policy, also where every token must skip a unit, the oracle decides and
    chooses the same in one pass.
    """
    max_layers = None if bound is None else 30 - min(rule.sizes)
    trade_off = rule.limits[0] / runtime.cost.cost[0]
    bounded = decision_rule(runtime.engines.units, runtime.cost.cost, trade_off, max_layers, 30)
    for prompt in prompts(runtime)[::2]:
        generation = runtime.generate(prompt, NEW_TOKENS, policy="token", trade_off=trade_off, max_layers=max_layers)
        ids = np.concatenate([prompt, generation.tokens])
        expected = smollm2_oracle.forward(ids, bounded, prefix=len(prompt))
        # The step that made token i read token i - 1; the last token was made but not read.
        np.testing.assert_array_equal(generation.actions[1:], expected.actions[len(prompt) : -1])
        np.testing.assert_array_equal(generation.tokens, expected.logits[len(prompt) - 1 : -1].argmax(axis=-1))
        assert (30 - generation.actions[1:].sum(axis=1) <= (max_layers or 30)).all()
