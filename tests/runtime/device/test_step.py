"""What a device gives, in every dialect, dispatch and order of its streams, is what the CPU gives."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build, dial
from dash_export.building.cost_table import measure_cost
from dash_export.bundle import Bundle
from dash_export.decision import DecisionRule, Unit, decision_rule
from dash_export.errors import BackendError, BundleError, ContextLengthError
from dash_export.exporting import export
from dash_export.manifest import Segment
from dash_export.policy import no_policy
from tests.runtime.device.conftest import DIALECTS, IDS, RECIPE, MakeSimulated
from tests.runtime.device.simulated import SimulatedContext, SimulatedDevice, SimulatedStream
from tests.tiny import TINY_UNITS, random_actions, tiny_checkpoint, tiny_policy

ORDERS = ("main", "beside", 0, 1)
TOLERANCE = 1e-4


def rule_of(host: DashRuntime, max_layers: int | None = None) -> DecisionRule:
    """Skips about half of what may be skipped."""
    units, cost = TINY_UNITS, (0.2, 0.1)
    ratio = np.median(host.session().score(IDS).damage[2:] / cost)
    return decision_rule(units, cost, float(ratio), max_layers, 6)


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
    assert (actions[:, 2] == actions[:, 3]).all(), "one unit"
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.mark.parametrize("dispatch", ["overlapped", "sync", "device"])
def test_score(dispatch: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    """Token by token, it is what one pass on the host gives."""
    rule, runtime = rule_of(host), simulated("trt10", dispatch).runtime
    expected = host.session_under(rule).score(IDS, keep_logits=True)
    session = runtime.session_under(rule)
    session.score(IDS)
    found = session.score(IDS, keep_logits=True)
    np.testing.assert_array_equal(found.actions, expected.actions)
    np.testing.assert_allclose(found.damage[2:], expected.damage[2:], atol=1e-5)
    assert not found.damage[:2].any(), "nobody asked"
    assert np.abs(found.logits - expected.logits).max() < TOLERANCE  # type: ignore[operator]


@pytest.mark.parametrize("dispatch", ["sync", "overlapped"])
def test_forced_and_static(dispatch: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    runtime = simulated("trt10", dispatch).runtime
    actions = random_actions(60, 6, TINY_UNITS)
    (found, expected) = (each.session().score(IDS, actions=actions, keep_logits=True) for each in (runtime, host))
    assert np.abs(found.logits - expected.logits).max() < TOLERANCE
    np.testing.assert_allclose(found.damage, expected.damage, atol=1e-5, err_msg="forced actions ask too")
    answers = [each.generate(IDS[:30].tolist(), 20, policy="static", skip=[2, 3]) for each in (runtime, host)]
    np.testing.assert_array_equal(answers[0].tokens, answers[1].tokens)
    np.testing.assert_array_equal(answers[0].actions, answers[1].actions)


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_max_layers(dispatch: str, simulated: MakeSimulated, host: DashRuntime) -> None:
    for most in (3, 4):
        rule = rule_of(host, most)
        (expected, actions), (found, taken) = (
            decoded(each, rule) for each in (host, simulated("trt10", dispatch).runtime)
        )
        np.testing.assert_array_equal(taken, actions)
        assert (actions.sum(axis=1) >= 6 - most).all()
        assert np.abs(found - expected).max() < TOLERANCE


def test_a_model_without_units(tmp_path: Path) -> None:
    """One engine, embedding and head included."""
    checkpoint = tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)
    root = export(checkpoint, tmp_path / "tiny.dash", no_policy(2, ())).root
    (tmp_path / "whole.toml").write_text(RECIPE.format(dialect="trt10"))
    bundle = Bundle.open(root)
    made = build(bundle, str(tmp_path / "whole.toml"))
    assert list(made.engines) == ["layers_00-01"]
    device = SimulatedDevice()
    DashRuntime(bundle, made, device, "device").generate(IDS[:9].tolist(), 4)
    assert len(device.ran) == 1 + 3, "a launch for the prompt and one for each token that is run"


CUTS = {
    "elsewhere": (1, [Segment(0, -1, True, False, False), Segment(0, 1, False, False, False)]),
    "nowhere": (0, [Segment(0, 1, True, False, False)]),
}
"""(what the policy reads, segments before the first unit)"""


@pytest.mark.parametrize("change", ["no policy", *CUTS])
def test_a_build_that_cannot_ask(change: str, device_bundle: Bundle) -> None:
    """A missing policy would be no damage, and no damage is always skipped."""
    bundle = Bundle.open(device_bundle.root)
    made = bundle.load_build("trt10")
    if change == "no policy":
        made = replace(made, engines={name: each for name, each in made.engines.items() if name != "policy"})
    else:
        read, segments = CUTS[change]
        bundle.manifest = replace(bundle.manifest, policy=replace(bundle.manifest.policy, read=read))
        engines = made.engines | {segment.name: made.engines["layer_00"] for segment in segments}
        made = replace(made, segments=(*segments, *made.segments[2:]), engines=engines)
    with pytest.raises(BundleError, match="cannot ask its policy"):
        DashRuntime(bundle, made, SimulatedDevice(), "overlapped")


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
def test_a_policy_that_reads_the_embedding(dispatch: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", num_hidden_layers=4)
    policy = tiny_policy(checkpoint, "linear", units=(Unit(1, 2),))
    bundle = export(checkpoint, tmp_path / "tiny.dash", policy)
    (tmp_path / "mine.toml").write_text(RECIPE.format(dialect="portable"))
    build(bundle, "cpu", weights="fp32")
    host = DashRuntime.load(bundle.root, "cpu-fp32")
    rule = decision_rule(policy.units, (1.0,), float(np.median(host.session().score(IDS).damage[20:])))
    device = SimulatedDevice("beside")
    runtime = DashRuntime(bundle, build(bundle, str(tmp_path / "mine.toml")), device, dispatch)
    (found, taken), (expected, actions) = decoded(runtime, rule), decoded(host, rule)
    np.testing.assert_array_equal(taken, actions)
    assert 0.2 < actions[:, 1].mean() < 0.8
    assert np.abs(found - expected).max() < TOLERANCE


def test_costs_and_dial_are_measured(device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "WINDOWS", 1)
    monkeypatch.setattr(dial, "TOKENS", 40)
    made = device_bundle.load_build("trt10")
    cost = measure_cost(device_bundle, made, SimulatedDevice())
    assert {*cost.segment_us, *cost.bypass_us, "policy"} == set(made.engines)
    assert cost.device == "simulated"
    points = dial.calibrate_dial(device_bundle, replace(made, cost=cost), SimulatedDevice())
    assert [points[0].layers, points[-1].layers] == [6, 3]


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
        context = weakref.ref(step.context(step.parts[3]))  # type: ignore[attr-defined]
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
