"""The order of launches, events and waits, and the mistakes that these tests are there to see."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dash_export.backends.cuda.bound import READY
from dash_export.backends.cuda.cuda import BESIDE, MAIN, Cuda
from dash_export.backends.cuda.cuda_graph import BODY, CudaGraph
from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.tensorrt.tensorrt import TensorRT, TensorRTEngine
from dash_export.backends.tensorrt.trt_api import Toolkit
from dash_export.bundle.layout import past_names, present_names
from dash_export.core.rule import DENSE, ForcedRule
from tests.backends.cuda.conftest import BUILDS, IDS, Host, MakeOnCard, OnCard
from tests.standin.cuda import Call

BEFORE = ("layer_00", "layer_01")
"""The segments before the first unit; the policy reads what enters the second."""
SIDES = {"layers_02-03": "bypass_02-03", "layer_04": "bypass_04-04"}


def one_token(made: OnCard, host: Host) -> list[Call]:
    """What the host did for one decoded token under a policy."""
    session = made.runtime.session_under(host.rule)
    session.prefill(IDS[:20])
    session.decode_one(int(IDS[20]))
    made.card.forget()
    session.decode_one(int(IDS[21]))
    return made.card.log


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
    units = [(BODY, of) for pair in SIDES.items() for of in pair]
    assert ran == [*((MAIN, name) for name in BEFORE), (BESIDE, "policy"), *units, (MAIN, "layer_05")]
    done = Counter(what for _, what, _ in log)
    assert (done["decide"], done["branch"]) == (1, 2 * len(SIDES)), "one for each side"
    policy = log.index((BESIDE, "run", "policy"))
    assert log[policy - 1] == (BESIDE, "wait", READY)
    decided = [(BESIDE, "record", "decided"), (MAIN, "wait", "decided"), (MAIN, "decide", "")]
    assert log[policy + 1 : policy + 4] == decided
    assert log.index((MAIN, "record", READY)) < log.index((MAIN, "run", BEFORE[1]))
    assert not [call for call in log if call[0] == "host"]


def check_scratch(made: OnCard) -> None:
    """Engines that share scratch memory run on one stream."""
    names = made.card.names()
    streams = {(context.scratch, names[stream].replace(BODY, MAIN)) for stream, context in made.card.ran}
    assert len({scratch for scratch, _ in streams}) == len(streams), streams


def check_memory(made: OnCard) -> None:
    """A cache is read and written under one address, a hidden state is not; both sides of a unit write one buffer."""
    outputs: dict[str, int] = {}
    for _, context in made.card.ran:
        places = context.places
        for layer in range(6):
            for past, present in zip(past_names(layer), present_names(layer), strict=True):
                assert past not in places or present not in places or places[past] == places[present]
        if "hidden_out" in places and context.shapes["position_ids"] == (1, 1):
            assert places["hidden_out"] != places.get("hidden")
            outputs[context.engine.name] = places["hidden_out"]
    assert all(outputs.get(bypass, outputs[run]) == outputs[run] for run, bypass in SIDES.items() if run in outputs)


def decode_step(made: OnCard) -> DeviceStep:
    engines = made.runtime.engines
    assert isinstance(engines, DeviceEngines)
    cache = engines.cache(0)
    cache.reserve(30)
    return engines.step(cache, 1)


@pytest.mark.parametrize("target", BUILDS)
def test_sound(target: str, on_card: MakeOnCard, host: Host) -> None:
    made = on_card(target)
    check_overlap(one_token(made, host))
    check_scratch(made)
    check_memory(made)
    made.card.ran.clear()
    recorded = on_card(target, "device")
    assert one_token(recorded, host) == [(MAIN, "launch", "graph"), ("host", "synchronize", MAIN)]
    freed = ("cudaFree", "cudaFreeHost", "cudaGraphDestroy", "cudaGraphExecDestroy")  # of the session before
    calls = {name: many for name, many in made.card.calls.items() if name not in freed}
    assert calls == {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}, "and nothing that no log has"
    check_recording(made.card.named(made.card.recorded[-1].log))
    check_scratch(recorded)
    check_memory(recorded)
    in_turn = one_token(on_card(target, "sync"), host)
    assert {stream for stream, _, _ in in_turn} == {MAIN, "host"}
    assert [of for _, what, of in in_turn if what == "run"][:3] == [*BEFORE, "policy"]


@pytest.mark.parametrize("skipped", [[False, False], [True, False], [True, True]])
def test_launches_of_a_token(skipped: list[bool], on_card: MakeOnCard) -> None:
    """One per segment, whatever a unit's size, and one of the policy; new rows are two copies per layer, skipped or
    not, of engines that leave them to the runtime.
    """
    for target, copies in (("trt10", 2 * 6), ("portable", 0)):
        made = on_card(target)
        made.card.forget()
        decode_step(made).decode(1, ForcedRule(np.array(skipped)[:, None]))
        units = [pair[which] for pair, which in zip(SIDES.items(), skipped, strict=True)]
        ran = [of for _, what, of in made.card.log if what == "run"]
        assert sorted(ran) == sorted([*BEFORE, "policy", *units, "layer_05"])
        done = Counter(what for _, what, _ in made.card.log)
        assert (done["upload"], done["copy_rows"], done["download"]) == (2, copies, 2)


def test_nobody_asks_a_policy_whose_answer_is_not_wanted(on_card: MakeOnCard) -> None:
    """A token whose actions are known is one launch, of a graph that has no decision in it."""
    made = on_card("trt10")
    step = decode_step(made)
    step.decode(1, DENSE)
    made.card.forget()
    step.decode(1, DENSE)
    assert made.card.log == [(MAIN, "launch", "graph"), ("host", "synchronize", MAIN)]
    (graph,) = made.card.recorded
    log = made.card.named(graph.log)
    assert [of for _, what, of in log if what == "run"] == [*BEFORE, *SIDES, "layer_05"]
    assert not {"decide", "branch"} & {what for _, what, _ in log}


# --- mistakes: each wraps a sound method, which it is given first, then that one's arguments


def launch_and_wait(sound: Any, step: DeviceStep, *given: Any, **named: Any) -> None:
    sound(step, *given, **named)
    step.device.synchronize(MAIN)


def wait_for_the_layers_beside(sound: Any, device: Cuda, stream: str, event: str) -> None:
    device.record(MAIN, event)
    sound(device, stream, event)


def wait_except(stream: str, recorded: bool = True) -> Callable[..., None]:
    def wait(sound: Any, device: Cuda, on: str, event: str) -> None:
        if device.rt.on.recording() != recorded or on != stream:
            sound(device, on, event)

    return wait


def nothing(sound: Any, *given: Any) -> None:
    pass


def engine_with_the_layers_scratch(sound: Any, device: Cuda, path: Any, _stream: str) -> Any:
    return sound(device, path, MAIN)


def bind_apart(sound: Any, engine: TensorRTEngine, profile: int, shapes: Any, memory: Any) -> Any:
    """A cache that is not aliased."""
    apart = {name: engine._device.memory(place.nbytes) for name, place in memory.items() if name.startswith("present")}
    return sound(engine, profile, shapes, memory | apart)


def bind_to_one_buffer(sound: Any, step: DeviceStep, engine: Any, memory: dict[str, Any]) -> Any:
    return sound(step, engine, memory | dict.fromkeys(("hidden", "hidden_out"), step._hidden[0]))


def new_rows(kept: int) -> Callable[..., Any]:
    """Only so many of a segment's are written."""

    def bind_part(sound: Any, *given: Any) -> Any:
        part = sound(*given)
        return replace(part, new_rows=part.new_rows[:kept], copies=part.copies[:kept])

    return bind_part


def copy_late(sound: Any, device: Cuda, _stream: str, *given: Any) -> None:
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


def policy_that_nobody_waits_for(sound: Any, step: Any, *given: Any) -> None:
    sound(step, *given)
    step._policy(BESIDE)


def event_from_outside(sound: Any, step: Any, *given: Any) -> None:
    step.device.record("late", "elsewhere")
    step.device.wait(MAIN, "elsewhere")
    sound(step, *given)


def decide_by_other_limits(sound: Any, graph: Any, stream: str, damage: Any, limits: Any, skipped: Any) -> None:
    graph.kept = graph._cuda.memory(limits.nbytes)
    sound(graph, stream, damage, graph.kept, skipped)


def write_where_the_first_token_was(sound: Any, graph: Any, *given: Any) -> None:
    """An address computed by the host is the same at every launch."""
    *others, position = given
    copy = graph._cuda.memory(position.nbytes)
    graph._cuda.copy("late", copy, position)
    graph._cuda.synchronize("late")
    vars(graph).setdefault("kept", []).append(copy)
    sound(graph, *others, copy)


def memory_that_is_not_pinned(_sound: Any, _device: Cuda, nbytes: int) -> Any:
    return np.zeros(nbytes, np.uint8)


def kernels_that_stand_in(_sound: Any, _toolkit: Toolkit, engine: Any, *_: Any) -> Any:
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy("USER_MANAGED")
    return engine.create_execution_context(config)


NUMBERS = "numbers"
LOST, ELSEWHERE = "Unjoined: nobody waits for the end of beside", "Isolation: the event was recorded elsewhere"
MISTAKES: list[tuple[Any, str, Callable[..., Any], str, Any]] = [
    (DeviceStep, "launch", launch_and_wait, "overlapped", check_overlap),
    (Cuda, "wait", wait_for_the_layers_beside, "overlapped", check_overlap),
    (Cuda, "wait", wait_except(BESIDE, recorded=False), "overlapped, beside first", NUMBERS),
    (Cuda, "wait", wait_except(MAIN), "device", LOST),
    (Cuda, "wait", wait_except(BESIDE), "device, beside first", ELSEWHERE),
    (Cuda, "wait_for_event", nothing, "overlapped", NUMBERS),
    (Cuda, "wait_for_event", nothing, "sync", NUMBERS),
    (TensorRT, "engine", engine_with_the_layers_scratch, "overlapped", check_scratch),
    (TensorRT, "engine", engine_with_the_layers_scratch, "overlapped, by chance", "shares its scratch memory"),
    (TensorRTEngine, "bind", bind_apart, "overlapped, portable", NUMBERS),
    (TensorRTEngine, "bind", bind_apart, "overlapped, portable", check_memory),
    (DeviceStep, "_bind", bind_to_one_buffer, "overlapped", "is written while it is read"),
    (DeviceStep, "_bind_part", new_rows(0), "overlapped", NUMBERS),
    (DeviceStep, "_bind_part", new_rows(2), "overlapped", NUMBERS),
    (DeviceStep, "_bind_part", new_rows(0), "device", NUMBERS),
    (Cuda, "copy_rows", copy_late, "overlapped", NUMBERS),
    (DeviceStep, "launch", policy_inside_a_branch, "device", LOST),
    (DeviceStep, "_launch_before_units", policy_starts_with_the_step, "device, beside first", NUMBERS),
    (DeviceStep, "_record", policy_that_nobody_waits_for, "device", LOST),
    (DeviceStep, "_record", event_from_outside, "device", ELSEWHERE),
    (Cuda, "pinned", memory_that_is_not_pinned, "device", "memory that is not pinned"),
    (DeviceStep, "_warm_up", nothing, "device", "is recorded before its first launch"),
    (Toolkit, "context", kernels_that_stand_in, "device, rtx", "or its kernels LAZY"),
    (CudaGraph, "decide", decide_by_other_limits, "device", NUMBERS),
    (CudaGraph, "write_rows", write_where_the_first_token_was, "device", NUMBERS),
]
"""(whose method, its name, what it does instead, where, what sees it)"""


@pytest.mark.parametrize(("kind", "method", "mistake", "where", "seen_by"), MISTAKES)
def test_mistake(
    kind: Any,
    method: str,
    mistake: Callable[..., Any],
    where: str,
    seen_by: Any,
    on_card: MakeOnCard,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is seen by what checks it when all is well."""
    sound = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda instance, *given, **named: mistake(sound, instance, *given, **named))
    target = next((target for target in BUILDS if target in where), "trt10")
    first = BESIDE if "beside" in where else 1 if "chance" in where else MAIN
    made = on_card(target, where.partition(",")[0], first)
    if seen_by == NUMBERS:
        assert host.differs(made)
    elif isinstance(seen_by, str):
        with pytest.raises(AssertionError, match=seen_by):
            one_token(made, host)
    else:
        log = one_token(made, host)
        with pytest.raises(AssertionError):
            seen_by(log if seen_by is check_overlap else made)
