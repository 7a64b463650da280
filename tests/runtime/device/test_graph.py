"""`device` dispatch: a step recorded once gives what the CPU gives, whatever its streams' order, and the mistakes that
these tests are there to see.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import layer_actions
from dash_export.errors import BackendError, PolicyError
from dash_export.runtime.device.base import Decisions, Memory, Recording
from dash_export.runtime.device.engines import BESIDE, MAIN
from dash_export.runtime.device.graph import GraphStep
from dash_export.runtime.device.step import ALWAYS_RUN, DeviceStep, Part
from dash_export.runtime.rules import ForcedRule
from tests.runtime.device.conftest import DIALECTS, IDS, MakeSimulated
from tests.runtime.device.simulated import Call, SimulatedDevice, SimulatedRecording, SimulatedStream
from tests.runtime.device.test_order import BEFORE, SIDES, check_scratch, decode_step, differs, one_token
from tests.runtime.device.test_step import ORDERS, TOLERANCE, decoded, rule_of
from tests.tiny import TINY_UNITS


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


def test_damage_at_every_trade_off(simulated: MakeSimulated, host: DashRuntime) -> None:
    """One recording serves every rule."""
    made = simulated("trt10", "device")
    live = [each.session() for each in (host, made.runtime)]
    for session in live:
        session.prefill(IDS[:20])
    for token, factor in zip(IDS[20:40].tolist(), np.geomspace(0.1, 10, 20), strict=True):
        rule = rule_of(host).scaled(float(factor))
        (expected, actions), (found, taken) = (session.decode_one(token, rule) for session in live)
        np.testing.assert_array_equal(taken, actions)
        assert np.abs(found - expected).max() < TOLERANCE
        np.testing.assert_allclose(*(session._bound(1).damage for session in live), atol=1e-5)
    assert len(made.device.recorded) == 1


def test_every_kind(simulated: MakeSimulated, host: DashRuntime) -> None:
    """What needs no decision is launched as ever; a conversation may change between both."""
    runtime = simulated("portable", "device").runtime
    for setting in ({}, {"skip": [2, 3]}, {"policy": "static", "skipped": 3}):
        one, other = (each.generate(IDS[:30].tolist(), 25, **setting) for each in (host, runtime))
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.tokens, other.tokens)
    sessions = [each.session_under(rule_of(host)) for each in (host, runtime)]
    for ids in (IDS[:12], IDS[12:20], IDS[20:41]):
        one, other = (session.generate(ids.tolist(), 7) for session in sessions)
        np.testing.assert_array_equal(one.tokens, other.tokens)


def check_recording(log: list[Call]) -> None:
    """The policy beside the layers before the first unit, one kernel that decides about all, then a branch per unit."""
    ran = [(stream, of) for stream, what, of in log if what == "run"]
    units = [(side, of) for pair in SIDES.items() for side, of in zip(("run side", "skip side"), pair, strict=True)]
    assert ran == [*((MAIN, name) for name in BEFORE), (BESIDE, "policy"), *units, (MAIN, "layer_05")]
    assert Counter(what for _, what, _ in log)["decide"] == 1
    assert Counter(what for _, what, _ in log)["branch"] == len(SIDES)
    policy = log.index((BESIDE, "run", "policy"))
    assert log[policy - 1] == (BESIDE, "wait", "state ready")
    assert log[policy + 1 : policy + 4] == [
        (BESIDE, "record", "decided"),
        (MAIN, "wait", "decided"),
        (MAIN, "decide", ""),
    ]
    assert log.index((MAIN, "record", "state ready")) < log.index((MAIN, "run", BEFORE[1]))
    assert not [call for call in log if call[0] == "host"]


def check_sides(step: DeviceStep) -> None:
    """Both sides of a branch write one buffer, and not the one they read."""
    assert isinstance(step, GraphStep)
    for part in step.parts:
        memories = [
            step.context(part, bypass).memory  # type: ignore[attr-defined]
            for bypass in ((False, True) if part.unit != ALWAYS_RUN else ())
        ]
        assert len({id(memory["hidden_out"]) for memory in memories}) <= 1
        assert all(memory["hidden_out"] is not memory["hidden"] for memory in memories)


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
    """Forced actions go through the same memory; the graph that follows does not see them."""
    every = np.ones((2, 1), np.bool_)
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
    np.testing.assert_array_equal(found[0][1::2], np.repeat(layer_actions(every, TINY_UNITS, 6), 12, axis=0))
    assert 0 < found[0][::2, 2:5].mean() < 1


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
        sound = DeviceStep._launch

        def launch(step: DeviceStep, part: Part, bypass: bool = False, stream: SimulatedStream | None = None) -> None:
            sound(step, part, bypass, stream)
            if stream is not None:
                step.policy.run(step.asked())

        monkeypatch.setattr(DeviceStep, "_launch", launch)
        with pytest.raises(AssertionError, match="beside has no place in the recording"):
            one_token(simulated("trt10", "device"), host)

    def test_a_decision_that_waits_for_no_policy(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = SimulatedStream.wait

        def wait(stream: SimulatedStream, event: object) -> None:
            if not (stream.device.recording is not None and stream.name == MAIN):
                sound(stream, event)  # type: ignore[arg-type]

        monkeypatch.setattr(SimulatedStream, "wait", wait)
        with pytest.raises(AssertionError, match="nobody waits for the end of beside"):
            one_token(simulated("trt10", "device", MAIN), host)

    def test_a_policy_that_waits_for_nothing(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = SimulatedStream.wait

        def wait(stream: SimulatedStream, event: object) -> None:
            if not (stream.device.recording is not None and stream.name == BESIDE):
                sound(stream, event)  # type: ignore[arg-type]

        monkeypatch.setattr(SimulatedStream, "wait", wait)
        with pytest.raises(AssertionError, match="beside has no place in the recording"):
            one_token(simulated("trt10", "device", BESIDE), host)

    def test_a_policy_that_starts_with_the_step(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Waiting for something, but not for what made its input: a legal recording with wrong numbers."""
        sound = GraphStep._launch_before_units

        def before(step: GraphStep, asks: bool) -> None:
            if step._recording is not None:
                step.main.record(step._ready)
                step.policy.wait(step._ready)
                step.policy.run(step.asked())
                asks = False
            sound(step, asks)

        monkeypatch.setattr(GraphStep, "_launch_before_units", before)
        assert differs(simulated("trt10", "device", BESIDE), host)

    def test_a_policy_that_nobody_waits_for(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """CUDA refuses a recording that leaves a stream behind."""
        sound = GraphStep._step

        def step(each: GraphStep, recording: Recording) -> None:
            sound(each, recording)
            each.policy.run(each.asked())

        monkeypatch.setattr(GraphStep, "_step", step)
        with pytest.raises(AssertionError, match="nobody waits for the end of beside"):
            one_token(simulated("trt10", "device"), host)

    def test_an_event_from_outside(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = GraphStep._step

        def step(each: GraphStep, recording: Recording) -> None:
            elsewhere = each.device.event("elsewhere")
            elsewhere.mark = object()  # type: ignore[attr-defined]
            each.main.wait(elsewhere)
            sound(each, recording)

        monkeypatch.setattr(GraphStep, "_step", step)
        with pytest.raises(AssertionError, match="was recorded elsewhere"):
            one_token(simulated("trt10", "device"), host)

    def test_handles_that_are_not_uploaded(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sound = GraphStep._decisions

        def decisions(step: GraphStep) -> Decisions:
            found = sound(step)
            return Decisions(
                found.damage, found.limit, found.skipped, step.device.memory(found.handles.nbytes), found.host_handles
            )

        monkeypatch.setattr(GraphStep, "_decisions", decisions)
        with pytest.raises(AssertionError, match="not uploaded"):
            one_token(simulated("trt10", "device"), host)

    def test_rows_written_where_the_first_token_was(
        self, simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An address computed by the host is the same at every launch."""
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
