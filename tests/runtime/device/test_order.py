"""The order of launches, events and waits, and the mistakes that these tests are there to see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.names import past_names, present_names
from dash_export.runtime.device.base import Memory
from dash_export.runtime.device.engines import BESIDE, MAIN, DeviceEngines
from dash_export.runtime.device.step import DeviceStep, Part
from dash_export.runtime.rules import DENSE, ForcedRule
from tests.runtime.device.conftest import IDS, MakeSimulated, Simulated
from tests.runtime.device.simulated import (
    Call,
    SimulatedContext,
    SimulatedDevice,
    SimulatedEvent,
    SimulatedStream,
)
from tests.runtime.device.test_step import TOLERANCE, decoded, rule_of

BEFORE = ("layer_00", "layer_01")
"""The segments before the first unit; the policy reads what enters the second."""
SIDES = {"layers_02-03": "bypass_02-03", "layer_04": "bypass_04-04"}


def one_token(made: Simulated, host: DashRuntime) -> list[Call]:
    """What the host did for one decoded token under a policy."""
    session = made.runtime.session_under(rule_of(host))
    session.prefill(IDS[:20])
    session.decode_one(int(IDS[20]))
    made.device.log.clear()
    session.decode_one(int(IDS[21]))
    return list(made.device.log)


def check_overlap(log: list[Call]) -> None:
    """The policy is launched before anybody waits for the layers it runs beside, waits for its state and for nothing
    else, and is the one thing that is waited for inside a token.
    """
    waits = [index for index, (stream, _, _) in enumerate(log) if stream == "host"]
    assert [log[index] for index in waits] == [("host", "wait", "decided"), ("host", "synchronize", MAIN)]
    assert waits[-1] == len(log) - 1
    runs = [(stream, of) for stream, what, of in log[: waits[0]] if what == "run"]
    assert runs == [*((MAIN, name) for name in BEFORE), (BESIDE, "policy")]
    assert [call for call in log if call[1] == "wait" and call[0] == BESIDE] == [(BESIDE, "wait", "state ready")]
    (ready,) = (index for index, call in enumerate(log) if call == (MAIN, "record", "state ready"))
    assert log.index((MAIN, "run", BEFORE[0])) < ready < log.index((MAIN, "run", BEFORE[1]))


def check_scratch(ran: list[tuple[str, SimulatedContext]]) -> None:
    """No two streams share scratch memory."""
    streams: dict[str, set[str]] = {}
    for stream, context in ran:
        streams.setdefault(context.scratch, set()).add(stream)
    assert all(len(names) == 1 for names in streams.values()), streams


def check_aliases(step: DeviceStep) -> None:
    """A cache is read and written under one address."""
    for part in step.parts:
        memory = step._memory_of(part)
        for layer in part.loaded.segment.layers:
            for past, present in zip(past_names(layer), present_names(layer), strict=True):
                assert memory[past] is memory[present]


def differs(made: Simulated, host: DashRuntime) -> bool:
    """Whether decode gives other logits or actions than the CPU."""
    rule = rule_of(host)
    (found, taken), (expected, actions) = decoded(made.runtime, rule), decoded(host, rule)
    return bool((taken != actions).any() or not np.abs(found - expected).max() < TOLERANCE)


def decode_step(made: Simulated) -> DeviceStep:
    engines = made.runtime.engines
    assert isinstance(engines, DeviceEngines)
    cache = engines.cache(0)
    cache.reserve(30)
    return engines.step(cache, 1)


def test_sound(simulated: MakeSimulated, host: DashRuntime) -> None:
    for dialect in ("trt10", "portable"):
        made = simulated(dialect)
        check_overlap(one_token(made, host))
        check_scratch(made.device.ran)
        check_aliases(decode_step(made))
        assert not differs(made, host)


@pytest.mark.parametrize("skipped", [[False, False], [True, False], [True, True]])
def test_launches_of_a_token(skipped: list[bool], simulated: MakeSimulated) -> None:
    """One per segment, whatever a unit's size, and one of the policy; new rows are two copies per layer, skipped or
    not, of engines that leave them to the runtime.
    """
    for dialect, copies in (("trt10", 2 * 6), ("portable", 0)):
        made = simulated(dialect)
        step = decode_step(made)
        step.decode(1, ForcedRule(np.array(skipped)[:, None]))
        units = [pair[which] for pair, which in zip(SIDES.items(), skipped, strict=True)]
        assert sorted(of for _, what, of in made.device.log if what == "run") == sorted(
            [*BEFORE, "policy", *units, "layer_05"]
        )
        done = Counter(what for _, what, _ in made.device.log)
        assert (done["upload"], done["copy_rows"], done["download"]) == (1, copies, 2)


def test_sync_is_one_stream(simulated: MakeSimulated, host: DashRuntime) -> None:
    log = one_token(simulated("trt10", "sync"), host)
    assert {stream for stream, _, _ in log} == {MAIN, "host"}
    assert [of for _, what, of in log if what == "run"][:3] == [*BEFORE, "policy"]


def test_nothing_is_waited_for_where_nobody_asks(simulated: MakeSimulated) -> None:
    made = simulated("trt10")
    decode_step(made).decode(1, DENSE)
    assert [call for call in made.device.log if call[0] == "host"] == [("host", "synchronize", MAIN)]


def test_prompts_and_static_sets_ask_no_policy(simulated: MakeSimulated, host: DashRuntime) -> None:
    made = simulated()
    made.runtime.generate(IDS[:10].tolist(), 4, policy="static", skip=[2, 3])
    made.runtime.session_under(rule_of(host)).prefill(IDS[:20])
    assert not [context for _, context in made.device.ran if context.name == "policy"]


# --- mistakes


def test_layers_awaited_before_the_policy_is_launched(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = DeviceStep._launch

    def waiting(step: DeviceStep, part: Part, bypass: bool = False) -> None:
        sound(step, part, bypass)
        step.main.synchronize()

    monkeypatch.setattr(DeviceStep, "_launch", waiting)
    with pytest.raises(AssertionError):
        check_overlap(one_token(simulated(), host))


def test_a_policy_that_waits_for_the_layers_beside_it(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = SimulatedStream.wait

    def late(stream: SimulatedStream, event: SimulatedEvent) -> None:
        stream.device.stream(MAIN).record(event)
        sound(stream, event)

    monkeypatch.setattr(SimulatedStream, "wait", late)
    with pytest.raises(ValueError, match="too many values"):
        check_overlap(one_token(simulated(), host))


def test_a_missing_event(simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedStream, "wait", lambda *_: None)
    assert differs(simulated(first=BESIDE), host)


def test_a_decision_taken_without_waiting(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedEvent, "wait", lambda _: None)
    assert differs(simulated(), host)


def test_scratch_shared_between_streams(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound: Callable[..., object] = SimulatedDevice.engine
    monkeypatch.setattr(SimulatedDevice, "engine", lambda device, path, _stream: sound(device, path, MAIN))
    made = simulated()
    one_token(made, host)
    with pytest.raises(AssertionError):
        check_scratch(made.device.ran)


def test_a_cache_that_is_not_aliased(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = DeviceStep._memory_of

    def apart(step: DeviceStep, part: Part) -> dict[str, Memory]:
        memory = sound(step, part)
        for layer in part.loaded.segment.layers:
            for name in present_names(layer):
                memory[name] = step.device.memory(memory[name].nbytes)
        return memory

    monkeypatch.setattr(DeviceStep, "_memory_of", apart)
    made = simulated("portable")
    assert differs(made, host)
    with pytest.raises(AssertionError):
        check_aliases(decode_step(made))


def test_new_rows_not_written(simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceStep, "_write_rows", lambda *_: None)
    assert differs(simulated("trt10"), host)


def test_rows_of_a_unit_s_first_layer_alone(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = DeviceStep._written
    monkeypatch.setattr(DeviceStep, "_written", lambda step, part: list(sound(step, part))[:2])
    assert differs(simulated("trt10"), host)


def test_an_engine_writes_over_what_the_policy_reads(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hidden state buffer instead of two."""
    sound = DeviceStep._memory_of

    def single(step: DeviceStep, part: Part) -> dict[str, Memory]:
        return sound(step, part) | {"hidden": step.hidden[0], "hidden_out": step.hidden[0]}

    monkeypatch.setattr(DeviceStep, "_memory_of", single)
    assert differs(simulated(), host)
