"""The order of launches, events and waits, and the mistakes that these tests are there to see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from typing import Any

import numpy as np
import pytest

from dash_export.names import past_names, present_names
from dash_export.runtime.device.base import BESIDE, MAIN
from dash_export.runtime.device.engines import DeviceEngines
from dash_export.runtime.device.step import READY, DeviceStep
from dash_export.runtime.rules import DENSE, ForcedRule
from tests.runtime.device.conftest import DIALECTS, IDS, Host, MakeSimulated, Simulated
from tests.runtime.device.simulated import (
    Call,
    Mark,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedGraph,
    SimulatedLaunch,
    SimulatedMemory,
)

BEFORE = ("layer_00", "layer_01")
"""The segments before the first unit; the policy reads what enters the second."""
SIDES = {"layers_02-03": "bypass_02-03", "layer_04": "bypass_04-04"}


def one_token(made: Simulated, host: Host) -> list[Call]:
    """What the host did for one decoded token under a policy."""
    session = made.runtime.session_under(host.rule)
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
    assert [call for call in log if call[1] == "wait" and call[0] == BESIDE] == [(BESIDE, "wait", READY)]
    assert log.count((MAIN, "record", READY)) == 1, "recorded once"
    ready = log.index((MAIN, "record", READY))
    assert log.index((MAIN, "run", BEFORE[0])) < ready < log.index((MAIN, "run", BEFORE[1]))


def check_recording(log: list[Call]) -> None:
    """The policy beside the layers before the first unit, one kernel that decides about all, then a branch per unit."""
    ran = [(stream, of) for stream, what, of in log if what == "run"]
    units = [(side, of) for pair in SIDES.items() for side, of in zip(("run side", "skip side"), pair, strict=True)]
    assert ran == [*((MAIN, name) for name in BEFORE), (BESIDE, "policy"), *units, (MAIN, "layer_05")]
    done = Counter(what for _, what, _ in log)
    assert (done["decide"], done["branch"]) == (1, len(SIDES))
    policy = log.index((BESIDE, "run", "policy"))
    assert log[policy - 1] == (BESIDE, "wait", READY)
    decided = [(BESIDE, "record", "decided"), (MAIN, "wait", "decided"), (MAIN, "decide", "")]
    assert log[policy + 1 : policy + 4] == decided
    assert log.index((MAIN, "record", READY)) < log.index((MAIN, "run", BEFORE[1]))
    assert not [call for call in log if call[0] == "host"]


def check_scratch(ran: list[tuple[str, SimulatedLaunch]]) -> None:
    """Engines that share scratch memory run on one stream."""
    streams = {(launch.engine.stream, stream.replace("body", MAIN)) for stream, launch in ran}
    assert len({scratch for scratch, _ in streams}) == len(streams), streams


def check_memory(ran: list[tuple[str, SimulatedLaunch]]) -> None:
    """A cache is read and written under one address, a hidden state is not; both sides of a unit write one buffer."""
    outputs: dict[str, int] = {}
    for _, launch in ran:
        memory = launch.memory
        for layer in range(6):
            for past, present in zip(past_names(layer), present_names(layer), strict=True):
                assert past not in memory or present not in memory or memory[past] is memory[present]
        if "hidden_out" in memory and launch.shapes["position_ids"] == (1, 1):
            assert memory["hidden_out"] is not memory.get("hidden")
            outputs[launch.name] = id(memory["hidden_out"])
    assert all(outputs.get(bypass, outputs[run]) == outputs[run] for run, bypass in SIDES.items() if run in outputs)


def decode_step(made: Simulated) -> DeviceStep:
    engines = made.runtime.engines
    assert isinstance(engines, DeviceEngines)
    cache = engines.cache(0)
    cache.reserve(30)
    return engines.step(cache, 1)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sound(dialect: str, simulated: MakeSimulated, host: Host) -> None:
    made = simulated(dialect)
    check_overlap(one_token(made, host))
    recorded = simulated(dialect, "device")
    assert one_token(recorded, host) == [(MAIN, "launch", "graph"), ("host", "synchronize", MAIN)]
    check_recording(recorded.device.recorded[-1].log)
    for ran in (made.device.ran, recorded.device.ran):
        check_scratch(ran)
        check_memory(ran)
    in_turn = one_token(simulated(dialect, "sync"), host)
    assert {stream for stream, _, _ in in_turn} == {MAIN, "host"}
    assert [of for _, what, of in in_turn if what == "run"][:3] == [*BEFORE, "policy"]


@pytest.mark.parametrize("skipped", [[False, False], [True, False], [True, True]])
def test_launches_of_a_token(skipped: list[bool], simulated: MakeSimulated) -> None:
    """One per segment, whatever a unit's size, and one of the policy; new rows are two copies per layer, skipped or
    not, of engines that leave them to the runtime.
    """
    for dialect, copies in (("trt10", 2 * 6), ("portable", 0)):
        made = simulated(dialect)
        decode_step(made).decode(1, ForcedRule(np.array(skipped)[:, None]))
        units = [pair[which] for pair, which in zip(SIDES.items(), skipped, strict=True)]
        assert sorted(of for _, what, of in made.device.log if what == "run") == sorted(
            [*BEFORE, "policy", *units, "layer_05"]
        )
        done = Counter(what for _, what, _ in made.device.log)
        assert (done["upload"], done["copy_rows"], done["download"]) == (2, copies, 2)


def test_nobody_asks_a_policy_whose_answer_is_not_wanted(simulated: MakeSimulated) -> None:
    """A token whose actions are known is one launch, of a graph that has no decision in it."""
    made = simulated("trt10")
    step = decode_step(made)
    step.decode(1, DENSE)
    made.device.log.clear()
    step.decode(1, DENSE)
    assert made.device.log == [(MAIN, "launch", "graph"), ("host", "synchronize", MAIN)]
    (graph,) = made.device.recorded
    assert [of for _, what, of in graph.log if what == "run"] == [*BEFORE, *SIDES, "layer_05"]
    assert not {"decide", "branch"} & {what for _, what, _ in graph.log}


# --- mistakes: each wraps a sound method, which it is given first, then that one's arguments


def launch_and_wait(sound: Any, step: DeviceStep, *given: Any, **named: Any) -> None:
    sound(step, *given, **named)
    step.device.synchronize(MAIN)


def wait_for_the_layers_beside(sound: Any, device: SimulatedDevice, stream: str, event: str) -> None:
    device.record(MAIN, event)
    sound(device, stream, event)


def wait_except(stream: str, recorded: bool = True) -> Callable[..., None]:
    def wait(sound: Any, device: SimulatedDevice, on: str, event: str) -> None:
        if (device.recording is not None) != recorded or on != stream:
            sound(device, on, event)

    return wait


def nothing(sound: Any, *given: Any) -> None:
    pass


def engine_with_the_layers_scratch(sound: Any, device: SimulatedDevice, path: Any, _stream: str) -> Any:
    return sound(device, path, MAIN)


def bind_apart(sound: Any, engine: SimulatedEngine, profile: int, shapes: Any, memory: Any) -> Any:
    """A cache that is not aliased."""
    apart = {name: engine.device.memory(place.nbytes) for name, place in memory.items() if name.startswith("present")}
    return sound(engine, profile, shapes, memory | apart)


def bind_to_one_buffer(sound: Any, step: DeviceStep, engine: Any, memory: dict[str, Any]) -> Any:
    return sound(step, engine, memory | dict.fromkeys(("hidden", "hidden_out"), step._hidden[0]))


def new_rows(kept: int) -> Callable[..., Any]:
    """Only so many of a segment's are written."""

    def bind_part(sound: Any, *given: Any) -> Any:
        part = sound(*given)
        return replace(part, new_rows=part.new_rows[:kept])

    return bind_part


def copy_late(sound: Any, device: SimulatedDevice, _stream: str, *given: Any) -> None:
    """On a stream that the next token does not wait for."""
    sound(device, "late", *given)


def policy_inside_a_branch(
    sound: Any, step: Any, part: Any, bypass: bool = False, graph: Any = None, stream: str = MAIN
) -> None:
    sound(step, part, bypass, graph, stream)
    if stream != MAIN:
        step._policy(BESIDE)


def policy_starts_with_the_step(sound: Any, step: Any, asks: bool, graph: Any = None) -> None:
    """Waiting for something, but not for what made its input: a legal recording with wrong numbers."""
    if graph is not None:
        step.device.record(MAIN, READY)
        step.device.wait(BESIDE, READY)
        step._policy(BESIDE)
    sound(step, asks and graph is None, graph)


def policy_that_nobody_waits_for(sound: Any, step: Any, graph: Any) -> None:
    sound(step, graph)
    step._policy(BESIDE)


def event_from_outside(sound: Any, step: Any, graph: Any) -> None:
    step.device.events["elsewhere"] = Mark()
    step.device.wait(MAIN, "elsewhere")
    sound(step, graph)


def decide_by_other_limits(sound: Any, graph: Any, stream: str, damage: Any, limits: Any, skipped: Any) -> None:
    sound(graph, stream, damage, graph._device.memory(limits.nbytes), skipped)


def write_where_the_first_token_was(sound: Any, *given: Any) -> None:
    """An address computed by the host is the same at every launch."""
    *others, position = given
    sound(*others, SimulatedMemory(position.data.copy()))


NUMBERS = "numbers"
LOST, UNJOINED = "nobody waits for the end of beside", "beside has no place in the recording"
MISTAKES: list[tuple[Any, str, Callable[..., Any], str, Any]] = [
    (DeviceStep, "launch", launch_and_wait, "overlapped", check_overlap),
    (SimulatedDevice, "wait", wait_for_the_layers_beside, "overlapped", check_overlap),
    (SimulatedDevice, "wait", wait_except(BESIDE, recorded=False), "overlapped, beside first", NUMBERS),
    (SimulatedDevice, "wait", wait_except(MAIN), "device", LOST),
    (SimulatedDevice, "wait", wait_except(BESIDE), "device, beside first", UNJOINED),
    (SimulatedDevice, "wait_for_event", nothing, "overlapped", NUMBERS),
    (SimulatedDevice, "wait_for_event", nothing, "sync", NUMBERS),
    (SimulatedDevice, "engine", engine_with_the_layers_scratch, "overlapped", check_scratch),
    (SimulatedEngine, "bind", bind_apart, "overlapped, portable", NUMBERS),
    (SimulatedEngine, "bind", bind_apart, "overlapped, portable", check_memory),
    (DeviceStep, "_bind", bind_to_one_buffer, "overlapped", NUMBERS),
    (DeviceStep, "_bind_part", new_rows(0), "overlapped", NUMBERS),
    (DeviceStep, "_bind_part", new_rows(2), "overlapped", NUMBERS),
    (DeviceStep, "_bind_part", new_rows(0), "device", NUMBERS),
    (SimulatedDevice, "copy_rows", copy_late, "overlapped", NUMBERS),
    (DeviceStep, "launch", policy_inside_a_branch, "device", UNJOINED),
    (DeviceStep, "_launch_before_units", policy_starts_with_the_step, "device, beside first", NUMBERS),
    (DeviceStep, "_record", policy_that_nobody_waits_for, "device", LOST),
    (DeviceStep, "_record", event_from_outside, "device", "was recorded elsewhere"),
    (SimulatedGraph, "decide", decide_by_other_limits, "device", NUMBERS),
    (SimulatedGraph, "write_rows", write_where_the_first_token_was, "device", NUMBERS),
]
"""(whose method, its name, what it does instead, where, what sees it)"""


@pytest.mark.parametrize(("kind", "method", "mistake", "where", "seen_by"), MISTAKES)
def test_mistake(
    kind: Any,
    method: str,
    mistake: Callable[..., Any],
    where: str,
    seen_by: Any,
    simulated: MakeSimulated,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is seen by what checks it when all is well."""
    monkeypatch.setattr(kind, method, partialmethod(mistake_of, mistake, getattr(kind, method)))
    dialect, first = "portable" if "portable" in where else "trt10", BESIDE if "beside" in where else MAIN
    made = simulated(dialect, where.partition(",")[0], first)
    if seen_by == NUMBERS:
        assert host.differs(made)
    elif isinstance(seen_by, str):
        with pytest.raises(AssertionError, match=seen_by):
            one_token(made, host)
    else:
        log = one_token(made, host)
        with pytest.raises(AssertionError):
            seen_by(log if seen_by is check_overlap else made.device.ran)


def mistake_of(instance: Any, mistake: Callable[..., Any], sound: Any, *given: Any, **named: Any) -> Any:
    return mistake(sound, instance, *given, **named)
