"""`device` dispatch: a step recorded once gives what the CPU gives, whatever its streams' order, and the mistakes that
these tests are there to see.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import decision_rule
from dash_export.errors import BackendError, PolicyError
from dash_export.runtime.device.base import Decision, Memory, Recording
from dash_export.runtime.device.engines import MAIN, POLICY
from dash_export.runtime.device.graph import GraphStep
from dash_export.runtime.device.step import DeviceStep, Part
from dash_export.runtime.rules import ForcedRule
from tests.runtime.device.conftest import DIALECTS, IDS, MakeSimulated, Simulated
from tests.runtime.device.simulated import Call, SimulatedDevice, SimulatedStream
from tests.runtime.device.test_order import GATED, check_scratch, decode_step, differs, one_token
from tests.runtime.device.test_step import ORDERS, TOLERANCE, decoded, rule_of


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_decode(dialect: str, first: str | int, simulated: MakeSimulated, host: DashRuntime) -> None:
    rule, made = rule_of(host), simulated(dialect, "device", first)
    expected, actions = decoded(host, rule)
    found, taken = decoded(made.runtime, rule)
    np.testing.assert_array_equal(taken, actions)
    assert 0.2 < actions[:, 2:5].mean() < 0.8
    assert np.abs(found - expected).max() < TOLERANCE
    assert len(made.device.recorded) == 1, "one recording serves every token"


def test_damage_and_ceilings(simulated: MakeSimulated, host: DashRuntime) -> None:
    """max_layers counts the layers that always run too."""
    cost = dict.fromkeys(GATED, 0.1)
    runtime = simulated("trt10", "device").runtime
    for trade_off, most in ((0.0, 4), (rule_of(host).limits[2] / 0.1, 5), (1e9, 6)):
        rule = decision_rule(6, GATED, cost, trade_off, most)
        sessions = [each.session_under(rule) for each in (host, runtime)]
        for session in sessions:
            session.prefill(IDS[:20])
        for token in IDS[20:40].tolist():
            (expected, actions), (found, taken) = (session.decode_one(token) for session in sessions)
            np.testing.assert_array_equal(taken, actions)
            assert actions.sum() >= 6 - most
            assert np.abs(found - expected).max() < TOLERANCE
            damages = [session._bound(1).damage[list(GATED)] for session in sessions]
            np.testing.assert_allclose(damages[1], damages[0], atol=1e-5)
        assert sessions[0].counters.layers_run == sessions[1].counters.layers_run


def test_every_kind(simulated: MakeSimulated, host: DashRuntime) -> None:
    """What needs no decision is launched as ever; a conversation may change between both."""
    runtime = simulated("portable", "device").runtime
    for setting in ({}, {"skip": [2, 4]}, {"policy": "random", "skipped": 1}):
        one, other = (each.generate(IDS[:30].tolist(), 25, **setting) for each in (host, runtime))
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    sessions = [each.session_under(rule_of(host)) for each in (host, runtime)]
    for ids in (IDS[:12], IDS[12:20], IDS[20:41]):
        one, other = (session.generate(ids.tolist(), 7) for session in sessions)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(
        *(each.session_under(rule_of(host)).logits(IDS) for each in (host, runtime)), atol=TOLERANCE
    )


def check_recording(log: list[Call]) -> None:
    """Per gated layer: the policy beside the segment before, decided on the main stream, then one branch."""
    policies = [call for call in log if call[2].startswith("policy_")]
    assert policies == [(POLICY, "run", f"policy_{layer:02d}") for layer in GATED]
    for layer in GATED:
        policy = log.index((POLICY, "run", f"policy_{layer:02d}"))
        decided = log.index((MAIN, "wait", f"decided layer_{layer:02d}"))
        before = next(
            index for index, call in enumerate(log) if call[2].endswith(f"_{layer - 1:02d}") and index > policy
        )
        assert log[policy - 1][:2] == (POLICY, "wait")
        assert log[policy + 1] == (POLICY, "record", f"decided layer_{layer:02d}")
        # Enqueued before the segment that it runs beside; joined before the decision.
        assert policy < before < decided
        assert log[decided + 1] == (MAIN, "decide", "")
        sides = [call for call in log[decided:] if call[0].endswith("side") and call[1] == "run"][:2]
        assert sides == [("run side", "run", f"layer_{layer:02d}"), ("skip side", "run", f"skip_{layer:02d}")]
    assert not [call for call in log if call[0] == "host"]


def check_one_token(made: Simulated, host: DashRuntime) -> None:
    one_token(made, host)
    check_recording(made.device.recorded[-1].log)


def check_sides(step: DeviceStep) -> None:
    """Both sides of a branch write one buffer, and not the one they read."""
    assert isinstance(step, GraphStep)
    for part in step.parts:
        if part.layer in GATED:
            run, skip = (step._memory_of(part, kind) for kind in ("run", "skip"))
            assert run["hidden_out"] is skip["hidden_out"]
            assert run["hidden_out"] is not run["hidden"]


def test_sound(simulated: MakeSimulated, host: DashRuntime) -> None:
    for dialect in DIALECTS:
        made = simulated(dialect, "device")
        assert one_token(made, host) == [(MAIN, "launch", "graph"), ("host", "synchronize", MAIN)]
        check_recording(made.device.recorded[-1].log)
        check_scratch([(stream.replace("body", MAIN), context) for stream, context in made.device.ran])
        check_sides(decode_step(made))
        assert not differs(made, host)


def test_recorded_again_when_memory_moved(simulated: MakeSimulated, host: DashRuntime) -> None:
    """A longer prompt makes scratch memory grow, and a recording holds addresses."""
    made = simulated("trt10", "device")
    session = made.runtime.session_under(rule_of(host))
    session.generate(IDS[:10].tolist(), 3)
    made.device.moves += 1
    session.generate(IDS[10:20].tolist(), 3)
    assert len(made.device.recorded) == 2
    session.generate(IDS[20:30].tolist(), 3)
    assert len(made.device.recorded) == 2


def test_launched_steps_leave_nothing_behind(simulated: MakeSimulated, host: DashRuntime) -> None:
    """Forced actions go through the same memory, history and all; the graph that follows does not see them."""
    every = np.zeros((1, 6), np.int8)
    every[0, list(GATED)] = 1
    found = []
    for runtime in (host, simulated("trt10", "device").runtime):
        session = runtime.session_under(rule_of(host))
        session.prefill(IDS[:20])
        taken = []
        for position in range(20, 44):
            rule = ForcedRule(every) if position % 2 else None
            taken.append(session.decode_one(int(IDS[position]), rule)[1])
        found.append(np.array(taken))
    np.testing.assert_array_equal(found[1], found[0])
    assert 0 < found[0][::2, list(GATED)].mean() < 1


def test_sessions_in_threads_take_turns(simulated: MakeSimulated, host: DashRuntime) -> None:
    """What one thread enqueued while another records would become part of the recording."""
    made, rule = simulated("trt10", "device"), rule_of(host)
    expected = [host.session_under(rule).generate(IDS[:length].tolist(), 20).tokens for length in (10, 17)]
    found: dict[int, np.ndarray] = {}

    def work(which: int, length: int) -> None:
        found[which] = made.runtime.session_under(rule).generate(IDS[:length].tolist(), 20).tokens

    threads = [threading.Thread(target=work, args=(which, length)) for which, length in enumerate((10, 17))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which, tokens in enumerate(expected):
        np.testing.assert_array_equal(found[which], tokens)


def test_where_nothing_can_be_recorded(
    simulated: MakeSimulated, host: DashRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    """One line that says why, and `overlapped`."""
    made = simulated("trt10", "device", obstacle="it is too old")
    assert made.runtime.dispatch == "overlapped"
    assert [record.message for record in caplog.records] == [
        "dispatch 'device' is not possible here (it is too old): this is 'overlapped'"
    ]
    assert not differs(made, host)


def test_a_step_that_cannot_be_recorded(
    simulated: MakeSimulated, host: DashRuntime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(*_: object) -> None:
        raise BackendError("an engine waits for its stream")

    monkeypatch.setattr(SimulatedDevice, "record", record)
    made = simulated("trt10", "device")
    with caplog.at_level(logging.WARNING):
        assert not differs(made, host)
        assert not differs(made, host)
    assert len(caplog.records) == 1, "once, not in every session"
    assert "an engine waits for its stream" in caplog.text
    assert made.runtime.dispatch == "overlapped"


def test_a_cpu_has_no_such_dispatch(host: DashRuntime) -> None:
    with pytest.raises(PolicyError, match="'device' needs the streams of a GPU"):
        DashRuntime.load(host.bundle.root, "cpu-fp32", dispatch="device")


class TestMistakes:
    """Each is seen by what checks it when all is well."""

    def test_a_policy_inside_a_branch(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound, beside = GraphStep._side, GraphStep._policy_beside

        def side(step: GraphStep, part: Part, kind: str, recording: Recording, stream: SimulatedStream) -> None:
            sound(step, part, kind, recording, stream)
            following = step.parts[part.index + 1] if part.index + 1 < len(step.parts) else None
            if kind == "run" and part.layer in GATED and following is not None and following.decided is not None:
                stream.run(step.context(following, (following.layer,)))  # type: ignore[arg-type]

        def policy_beside(step: GraphStep, part: Part, begun: object) -> None:
            if part.layer not in GATED:
                beside(step, part, begun)  # type: ignore[arg-type]

        monkeypatch.setattr(GraphStep, "_side", side)
        monkeypatch.setattr(GraphStep, "_policy_beside", policy_beside)
        made = simulated("trt10", "device")
        with pytest.raises(AssertionError, match="decided layer_03 was recorded elsewhere"):
            check_one_token(made, host)

    def test_a_decision_that_waits_for_no_policy(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = SimulatedStream.wait

        def wait(stream: SimulatedStream, event: object) -> None:
            if not (stream.device.recording is not None and stream.name == MAIN):
                sound(stream, event)  # type: ignore[arg-type]

        monkeypatch.setattr(SimulatedStream, "wait", wait)
        with pytest.raises(AssertionError, match="nobody waits for the end of policy"):
            one_token(simulated("trt10", "device", MAIN), host)

    def test_a_policy_that_waits_for_nothing(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = SimulatedStream.wait

        def wait(stream: SimulatedStream, event: object) -> None:
            if not (stream.device.recording is not None and stream.name == POLICY):
                sound(stream, event)  # type: ignore[arg-type]

        monkeypatch.setattr(SimulatedStream, "wait", wait)
        with pytest.raises(AssertionError, match="policy has no place in the recording"):
            one_token(simulated("trt10", "device", POLICY), host)

    def test_a_policy_that_starts_with_the_step(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Waiting for something, but not for what made its input: a legal recording with wrong numbers."""
        sound = GraphStep._policy_beside

        def beside(step: GraphStep, part: Part, begun: object) -> None:
            sound(step, part, step._begun[0])  # type: ignore[arg-type]
            del begun

        monkeypatch.setattr(GraphStep, "_policy_beside", beside)
        assert differs(simulated("trt10", "device", POLICY), host)

    def test_a_policy_that_nobody_waits_for(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CUDA refuses a recording that leaves a stream behind."""
        sound = GraphStep._step

        def step(each: GraphStep, recording: Recording) -> None:
            sound(each, recording)
            each.policy.run(each.context(each.parts[2], (each.parts[2].layer,)))

        monkeypatch.setattr(GraphStep, "_step", step)
        with pytest.raises(AssertionError, match="nobody waits for the end of policy"):
            one_token(simulated("trt10", "device"), host)

    def test_an_event_from_outside(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = GraphStep._step

        def step(each: GraphStep, recording: Recording) -> None:
            each.main.wait(each.parts[0].done)
            sound(each, recording)

        monkeypatch.setattr(GraphStep, "_step", step)
        with pytest.raises(AssertionError, match="was recorded elsewhere"):
            one_token(simulated("trt10", "device"), host)

    def test_rows_written_where_the_first_token_was(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An address computed by the host is the same at every launch."""
        from tests.runtime.device.simulated import SimulatedRecording

        sound = SimulatedRecording.write_rows

        def write_rows(
            recording: SimulatedRecording,
            stream: SimulatedStream,
            to: Memory,
            pitch: int,
            rows: Memory,
            width: int,
            position: Memory,
        ) -> None:
            frozen = SimulatedDevice().memory(8)
            frozen.data[:] = position.data[:8]  # type: ignore[attr-defined]
            sound(recording, stream, to, pitch, rows, width, frozen)  # type: ignore[arg-type]

        monkeypatch.setattr(SimulatedRecording, "write_rows", write_rows)
        assert differs(simulated("trt10", "device"), host)

    def test_layers_that_always_run_are_not_counted(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = GraphStep.__init__

        def init(step: GraphStep, *arguments: object) -> None:
            sound(step, *arguments)  # type: ignore[arg-type]
            step._always[:] = 0

        monkeypatch.setattr(GraphStep, "__init__", init)
        rule = decision_rule(6, GATED, dict.fromkeys(GATED, 0.1), 0.0, 4)
        (_, taken), (_, actions) = decoded(simulated("trt10", "device").runtime, rule), decoded(host, rule)
        assert (taken != actions).any()

    def test_decisions_that_no_policy_hears_of(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The policy of the test's model reads the last two actions."""
        sound = GraphStep._decision_about

        def decision_about(step: GraphStep, layer: int) -> Decision:
            return replace(sound(step, layer), history=(step.device.memory(4), step.device.memory(4)))

        monkeypatch.setattr(GraphStep, "_decision_about", decision_about)
        (_, taken), (_, actions) = (
            decoded(runtime, rule_of(host)) for runtime in (simulated("trt10", "device").runtime, host)
        )
        assert (taken != actions).any()
