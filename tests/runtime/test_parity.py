"""SmolLM2 through the engines, in fp32, against the PyTorch oracle on real prompts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import Action, decision_rule, trade_off_for
from dash_export.reference import Oracle
from dash_export.resources import resource_folder
from dash_export.skip_policy import SkipPolicy
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
def texts(runtime: DashRuntime) -> list[np.ndarray]:
    """Prompts with their dense continuation: the token ids that all tests here force."""
    return [np.concatenate([ids, greedy(runtime, ids)]) for ids in prompts(runtime)]


def greedy(runtime: DashRuntime, ids: np.ndarray) -> np.ndarray:
    """64 tokens, past an end of turn too."""
    session = runtime.session("dense")
    tokens: list[int] = []
    logits = session.prefill(ids)
    for _ in range(NEW_TOKENS):
        tokens.append(int(logits.argmax()))
        logits, _ = session.decode_one(tokens[-1])
    return np.array(tokens)


def test_dense(runtime: DashRuntime, texts: list[np.ndarray], smollm2_oracle: Oracle) -> None:
    for ids in texts:
        expected = smollm2_oracle.forward(ids).logits
        chosen = expected[-NEW_TOKENS - 1 : -1].argmax(axis=-1)
        np.testing.assert_array_equal(ids[-NEW_TOKENS:], chosen)
        assert np.abs(runtime.session().logits(ids) - expected).max() < TOLERANCE


def test_generate_stops_where_the_oracle_ends_its_turn(runtime: DashRuntime, texts: list[np.ndarray]) -> None:
    for ids in texts:
        generation = runtime.generate(ids[:-NEW_TOKENS], NEW_TOKENS, policy="dense")
        np.testing.assert_array_equal(generation.tokens, ids[len(ids) - NEW_TOKENS :][: len(generation.tokens)])
        stopped = generation.tokens[-1] in runtime.text.eos_ids
        assert generation.finish_reason == ("stop" if stopped else "length")


def test_random_actions(
    runtime: DashRuntime, texts: list[np.ndarray], smollm2_oracle: Oracle, smollm2_policy: SkipPolicy
) -> None:
    for seed, ids in enumerate(texts):
        actions = random_actions(len(ids), 30, smollm2_policy.gated, seed, share=0.1 + 0.1 * seed)
        expected = smollm2_oracle.forward(ids, actions=actions)
        logits = runtime.session().logits(ids, actions=actions)
        assert np.abs(logits - expected.logits).max() < TOLERANCE
        damage = runtime.session().score(ids, actions=actions).damage
        np.testing.assert_allclose(damage, expected.damage, atol=1e-4)


def test_static(runtime: DashRuntime, texts: list[np.ndarray], smollm2_oracle: Oracle) -> None:
    skipped = (5, 6, 13, 20, 28)
    for ids in texts:
        prompt = len(ids) - NEW_TOKENS
        actions = np.zeros((len(ids), 30), np.int8)
        actions[prompt:, list(skipped)] = Action.SKIP
        expected = smollm2_oracle.forward(ids, actions=actions).logits
        session = runtime.session("static", skip=skipped)
        assert np.abs(session.logits(ids, prefix=prompt) - expected).max() < TOLERANCE
        generation = runtime.generate(ids[:prompt], NEW_TOKENS, policy="static", skip=skipped)
        assert generation.actions[1:].sum(axis=1).tolist() == [len(skipped)] * (len(generation.tokens) - 1)
        # The first token comes out of the dense prompt; each later one the oracle must choose too.
        free = np.concatenate([ids[:prompt], generation.tokens])
        forced = np.zeros((len(free), 30), np.int8)
        forced[prompt:, list(skipped)] = Action.SKIP
        chosen = smollm2_oracle.forward(free, actions=forced).logits[prompt - 1 : -1].argmax(axis=-1)
        np.testing.assert_array_equal(generation.tokens, chosen)


def test_token_policy_decides_as_the_oracle(
    runtime: DashRuntime, texts: list[np.ndarray], smollm2_oracle: Oracle, smollm2_policy: SkipPolicy
) -> None:
    """Every decision, with the oracle's actions forced on what came before, but where damage touches the limit."""
    trade_off = next(point.trade_off for point in runtime.build.dial["token"] if point.layers < 29)
    rule = decision_rule(30, smollm2_policy.gated, runtime.cost.cost, trade_off)
    differing, ties, skips, total = 0, 0, 0, 0
    for ids in texts:
        prompt = len(ids) - NEW_TOKENS
        expected = smollm2_oracle.forward(ids, rule, prefix=prompt)
        forced = runtime.session().score(ids, actions=expected.actions)
        limits = np.array(rule.limits)
        for layer in smollm2_policy.gated:
            decided = np.where(forced.damage[prompt:, layer] < limits[layer], Action.SKIP, Action.RUN)
            wrong = decided != expected.actions[prompt:, layer]
            near = np.abs(expected.damage[prompt:, layer] - limits[layer]) < TIE
            differing += int((wrong & ~near).sum())
            ties += int((wrong & near).sum())
        skips += int(expected.actions.sum())
        total += NEW_TOKENS * len(smollm2_policy.gated)
    assert 0.05 < skips / total < 0.95, "the trade-off must make the policy decide both ways"
    assert differing == 0
    assert ties <= 1, f"{ties} of {total} decisions were ties"


def test_two_thousand_tokens_of_prose(runtime: DashRuntime, smollm2_oracle: Oracle, smollm2_policy: SkipPolicy) -> None:
    """The oracle's actions forced: the same logits, the same damage, and so the same decisions but for ties."""
    rule = decision_rule(
        30, smollm2_policy.gated, runtime.cost.cost, trade_off_for(runtime.build.dial["token"], skipped=5)
    )
    gated, limits = list(smollm2_policy.gated), np.array(rule.limits)
    text = runtime.text.encode((resource_folder("calibration") / "heldout.txt").read_text(encoding="utf-8"))
    wrong, far, skips, tokens = 0, 0, 0, 0
    for start in range(0, 8 * WINDOW, WINDOW):
        ids = np.array(text[start : start + WINDOW], np.int64)
        expected = smollm2_oracle.forward(ids, rule)
        assert np.abs(runtime.session().logits(ids, actions=expected.actions) - expected.logits).max() < TOLERANCE
        damage = runtime.session().score(ids, actions=expected.actions).damage[2:, gated]
        differs = (damage < limits[gated]) != (expected.actions[2:, gated] == Action.SKIP)
        wrong += int(differs.sum())
        far += int((differs & (np.abs(expected.damage[2:, gated] - limits[gated]) > TIE)).sum())
        skips += int(expected.actions.sum())
        tokens += len(ids) - 2
    assert tokens > 2000
    assert 2 < skips / tokens < 9, "about the five layers asked for"
    assert wrong < 0.005 * tokens * len(gated)
    assert far == 0


def test_token_policy_free_running(
    runtime: DashRuntime, texts: list[np.ndarray], smollm2_oracle: Oracle, smollm2_policy: SkipPolicy
) -> None:
    """What the runtime generated under its policy, the oracle decides and chooses the same in one pass."""
    trade_off = next(point.trade_off for point in runtime.build.dial["token"] if point.layers < 29)
    rule = decision_rule(30, smollm2_policy.gated, runtime.cost.cost, trade_off, max_layers=27)
    for prompt in [ids[:-NEW_TOKENS] for ids in texts[::2]]:
        generation = runtime.generate(prompt, NEW_TOKENS, policy="token", trade_off=trade_off, max_layers=27)
        ids = np.concatenate([prompt, generation.tokens])
        expected = smollm2_oracle.forward(ids, rule, prefix=len(prompt))
        # The step that made token i read token i - 1; the last token was made but not read.
        np.testing.assert_array_equal(generation.actions[1:], expected.actions[len(prompt) : -1])
        np.testing.assert_array_equal(generation.tokens, expected.logits[len(prompt) - 1 : -1].argmax(axis=-1))
        assert (30 - generation.actions[1:].sum(axis=1) <= 27).all()
