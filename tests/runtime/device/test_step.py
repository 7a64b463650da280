"""What a device gives, in every dialect, dispatch and order of its streams, is what the CPU gives."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import DecisionRule, decision_rule
from dash_export.errors import BackendError, ContextLengthError, PolicyError
from tests.runtime.device.conftest import DIALECTS, IDS, MakeSimulated
from tests.runtime.device.simulated import SimulatedContext, SimulatedStream
from tests.tiny import random_actions

ORDERS = ("main", "policy", 0, 1)
TOLERANCE = 1e-4


def rule_of(host: DashRuntime) -> DecisionRule:
    """Skips about half of what is gated."""
    damage = host.session().score(IDS).damage[:, list(host.bundle.manifest.policy.gated)]
    cost = dict.fromkeys(host.bundle.manifest.policy.gated, 0.1)
    return decision_rule(6, cost, cost, float(np.median(damage)) / 0.1)


def decoded(runtime: DashRuntime, rule: object) -> tuple[np.ndarray, np.ndarray]:
    """Logits and actions of 40 tokens decoded one by one after a prompt of 20."""
    session = runtime.session_under(rule)  # type: ignore[arg-type]
    session.prefill(IDS[:20])
    steps = [session.decode_one(int(token)) for token in IDS[20:]]
    return np.array([logits for logits, _ in steps]), np.array([actions for _, actions in steps])


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("dispatch", ["overlapped", "sync"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_decode(dialect: str, dispatch: str, first: str | int, simulated: MakeSimulated, host: DashRuntime) -> None:
    rule = rule_of(host)
    expected, actions = decoded(host, rule)
    found, taken = decoded(simulated(dialect, dispatch, first).runtime, rule)
    np.testing.assert_array_equal(taken, actions)
    assert 0.2 < actions[:, 2:5].mean() < 0.8
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("dispatch", ["overlapped", "sync"])
def test_damage_is_compared_in_double(dispatch: str, simulated: MakeSimulated) -> None:
    """A float32 of numpy would round the limit to its own precision, and decide a tie otherwise than a score does."""

    seen = set()

    class Noting:
        asks = True

        def skips(self, _layer: int, damage: float, _executed: int) -> bool:
            seen.add(type(damage))
            return False

    decoded(simulated("trt10", dispatch).runtime, Noting())
    assert seen == {float}


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_score(dialect: str, first: str | int, simulated: MakeSimulated, host: DashRuntime) -> None:
    """One pass per eight tokens, rows selected on the device, equals the host's and token-by-token decode."""
    rule, runtime = rule_of(host), simulated(dialect, "overlapped", first).runtime
    expected = host.session_under(rule).score(IDS, keep_logits=True)
    found = runtime.session_under(rule).score(IDS, keep_logits=True)
    np.testing.assert_array_equal(found.actions, expected.actions)
    np.testing.assert_allclose(found.damage, expected.damage, atol=1e-5)
    assert np.abs(found.logits - expected.logits).max() < TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize("dispatch", ["sync", "overlapped"])
def test_a_prompt_s_set_is_scored_as_it_is_decoded(dispatch: str, simulated: MakeSimulated) -> None:
    """One set per prompt, from what the policy says of it: read in one pass over a text as in a prefill."""
    runtime = simulated("trt10", dispatch).runtime
    damage = runtime.session("token", trade_off=0.0).score(IDS[:20]).damage[2:].mean(axis=0)
    needed = sorted(damage[layer] / cost for layer, cost in runtime.cost.cost.items())
    setting = {"policy": "sequence", "trade_off": float(needed[0] + needed[1]) / 2}
    found = runtime.session(**setting).score(IDS, prefix=20).actions[20:]
    live = runtime.session(**setting)
    live.prefill(IDS[:20])
    np.testing.assert_array_equal(found, [live.decode_one(int(token))[1] for token in IDS[20:]])
    assert found.sum(axis=1).tolist() == [1] * 40


@pytest.mark.parametrize("dispatch", ["plain", "sync", "overlapped"])
def test_forced_and_static(dispatch: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    runtime = simulated("trt10", dispatch).runtime
    actions = random_actions(60, 6, (2, 3, 4))
    assert np.abs(
        runtime.session().logits(IDS, actions=actions) - host.session().logits(IDS, actions=actions)
    ).max() < (TOLERANCE)
    answers = [each.generate(IDS[:30].tolist(), 20, policy="static", skip=[2, 4]) for each in (runtime, host)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    np.testing.assert_array_equal(answers[0].actions, answers[1].actions)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_fork_has_memory_of_its_own(dialect: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    runtime = simulated(dialect).runtime
    live = runtime.session()
    assert live.fork().tokens == []
    live.prefill(IDS[:20])
    twin = live.fork()
    expected = [host.generate(np.concatenate([IDS[:20], ids]), 9).tokens for ids in (IDS[20:30], IDS[40:50])]
    for session, ids, tokens in zip((live, twin), (IDS[20:30], IDS[40:50]), expected, strict=True):
        np.testing.assert_array_equal(session.generate(ids, 9).tokens, tokens)


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_a_dropped_step_gives_back_its_contexts(dispatch: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    """At once, not when Python looks for circles: nothing tells it how much of a device's memory they hold."""
    made = simulated("trt10", dispatch)
    session = made.runtime.session_under(rule_of(host))
    session.generate(IDS[:12].tolist(), 3)
    gc.collect()
    gc.disable()
    try:
        step = session._bound(7)
        context = weakref.ref(step.context(step.parts[3], "run"))  # type: ignore[attr-defined]
        del step
        session.prefill(IDS[12:20])
        made.device.ran.clear()
        assert context() is None
    finally:
        gc.enable()


def test_a_device_takes_one_sequence(simulated: MakeSimulated) -> None:
    with pytest.raises(BackendError, match="one sequence at a time"):
        simulated().runtime.batch(2)


def test_the_context_is_the_cache(simulated: MakeSimulated) -> None:
    runtime = simulated().runtime
    assert runtime.session().context_left == 96
    with pytest.raises(ContextLengthError, match="96 positions"):
        runtime.generate(list(range(90)), 10)


@pytest.mark.parametrize(("target", "dispatch"), [("trt10", "fused"), ("cpu-fp32", "overlapped")])
def test_modes_that_a_target_has_not(target: str, dispatch: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    if target == "trt10":
        with pytest.raises(PolicyError, match="no fused policies"):
            simulated(target, dispatch)
    else:
        with pytest.raises(PolicyError, match="needs the streams of a GPU"):
            DashRuntime.load(host.bundle.root, target, dispatch=dispatch)


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("dispatch", ["overlapped", "sync"])
def test_a_launch_that_fails(
    dispatch: str, first: str | int, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way is left to end, and the session goes on from before the step."""
    rule, runtime = rule_of(host), simulated("trt10", dispatch, first).runtime
    live, other = runtime.session_under(rule), runtime.session_under(rule)
    for session in (live, other):
        session.prefill(IDS[:20])
    sound, launched = SimulatedStream.run, 0
    for number, token in enumerate(IDS[20:26].tolist()):

        def failing(stream: SimulatedStream, context: SimulatedContext, last: int = number % 4) -> None:
            nonlocal launched
            launched += 1
            if launched > last:
                raise BackendError(f"{context.name} could not be launched")
            sound(stream, context)

        launched = 0
        monkeypatch.setattr(SimulatedStream, "run", failing)
        with pytest.raises(BackendError, match="could not be launched"):
            live.decode_one(token)
        monkeypatch.undo()
        assert live.tokens == other.tokens
        found, expected = (session.decode_one(token)[0] for session in (live, other))
        np.testing.assert_array_equal(found, expected)
