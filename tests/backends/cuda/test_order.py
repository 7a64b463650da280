"""The order of launches, events and waits, and the mistakes that these tests are there to see."""

from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from dash_export.backends.cuda.bound import POLICY, READY
from dash_export.backends.cuda.cuda import BESIDE, MAIN, Cuda
from dash_export.backends.cuda.cuda_graph import BODY, CudaGraph
from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.tensorrt.tensorrt import TensorRT, TensorRTEngine
from dash_export.backends.tensorrt.trt_api import Toolkit
from dash_export.bundle.layout import past_names, present_names
from dash_export.core.rule import DENSE, ForcedRule
from tests.backends.cuda.conftest import BUILDS, IDS, Host, MakeOnCard, OnCard
from tests.standin.ordered_streams import Call

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
    """Every engine is a graph of its own, with the copies and cache writes that go with it. The policy is launched
    before the segment that hides it, first where both want the card; it waits for its state and for nothing else, and
    is the one thing that is waited for inside a token.
    """
    waits = [index for index, (stream, _, _) in enumerate(log) if stream == "host"]
    assert [log[index] for index in waits] == [("host", "wait", "decided"), ("host", "synchronize", MAIN)]
    assert waits[-1] == len(log) - 1
    runs = [(stream, of) for stream, what, of in log[: waits[0]] if what == "launch"]
    assert runs == [(MAIN, BEFORE[0]), (BESIDE, "policy"), (MAIN, BEFORE[1])]
    assert [call for call in log if call[1] == "wait" and call[0] == BESIDE] == [(BESIDE, "wait", READY)]
    assert log.count((MAIN, "record", READY)) == 1, "recorded once"
    ready = log.index((MAIN, "record", READY))
    assert log.index((MAIN, "launch", BEFORE[0])) < ready < log.index((MAIN, "launch", BEFORE[1]))
    assert {what for _, what, _ in log} == {"launch", "record", "wait", "synchronize"}


def check_recording(log: list[Call]) -> None:
    """The policy beside the layers before the first unit, one kernel that decides about all, then a branch per unit."""
    ran = [(stream, of) for stream, what, of in log if what == "run"]
    units = [(BODY, of) for pair in SIDES.items() for of in pair]
    assert ran == [(MAIN, BEFORE[0]), (BESIDE, "policy"), (MAIN, BEFORE[1]), *units, (MAIN, "layer_05")]
    done = Counter(what for _, what, _ in log)
    assert (done["decide"], done["branch"]) == (1, 2 * len(SIDES)), "one for each side"
    policy = log.index((BESIDE, "run", "policy"))
    assert log[policy - 1] == (BESIDE, "wait", READY)
    decided = log.index((BESIDE, "record", "decided"))
    assert log[decided + 1 : decided + 3] == [(MAIN, "wait", "decided"), (MAIN, "decide", "")]
    assert policy < log.index((MAIN, "run", BEFORE[1])) < decided
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
    names = made.card.names()
    assert {names[handle]: priority for handle, priority in made.card.priorities.items() if priority} == {BESIDE: -5}
    in_turn = one_token(on_card(target, "sync"), host)
    assert {stream for stream, _, _ in in_turn} == {MAIN, "host"}
    assert [of for _, what, of in in_turn if what == "launch"][:3] == [*BEFORE, "policy"]


@pytest.mark.parametrize("skipped", [[False, False], [True, False], [True, True]])
def test_launches_of_a_token(skipped: list[bool], on_card: MakeOnCard) -> None:
    """One per segment, whatever a unit's size, and one of the policy. Where nothing is recorded, a segment's new rows
    are one more, skipped or not, of engines that leave them to the runtime.
    """
    units = [pair[which] for pair, which in zip(SIDES.items(), skipped, strict=True)]
    rule = ForcedRule(np.array(skipped)[:, None])
    for target, dispatch, waits in product(("trt10", "portable"), ("overlapped", "sync"), (True, False)):
        made = on_card(target, dispatch)
        made.runtime.engines.records = waits  # type: ignore[union-attr]
        step = decode_step(made)
        step.decode(1, rule)
        made.card.forget()
        step.decode(1, rule)
        log, calls = made.card.log, made.card.calls
        ran = [of for _, what, of in log if what == ("launch" if waits else "run")]
        assert sorted(ran) == sorted([*BEFORE, "policy", *units, "layer_05"])
        between = 3 + (dispatch == "overlapped") * 2  # events and waits
        freed = sum(many for name, many in calls.items() if "Free" in name or "Destroy" in name)
        if waits:
            assert calls.total() - freed == len(ran) + between, "no call more"
        else:
            done = Counter(what for _, what, _ in log)
            assert (done["upload"], done["download"]) == (2, 2)
            assert done["write_rows"] == (len(ran) - 1 if target == "trt10" else 0)


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


def policy_after_what_hides_it(sound: Any, step: Any, asks: bool, launch: Any) -> None:
    later: list[Any] = []
    sound(step, asks, lambda place, **named: later.append((place, named)) if place == POLICY else launch(place))
    for place, named in later:
        launch(place, **named)


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
    apart = {name: engine._device.memory(place.nbytes) for name, place in memory.items() if name.startswith("present")}
    return sound(engine, profile, shapes, memory | apart)


def bind_to_one_buffer(sound: Any, step: DeviceStep, engine: Any, memory: dict[str, Any]) -> Any:
    return sound(step, engine, memory | dict.fromkeys(("hidden", "hidden_out"), step._hidden[0]))


def two_new_rows(sound: Any, *given: Any) -> Any:
    part = sound(*given)
    part.new_rows.host = part.new_rows.host[:2]
    return part


def write_late(sound: Any, device: Cuda, name: str, _stream: str, *given: Any) -> None:
    """On a stream that the next token does not wait for."""
    sound(device, name, "late", *given)


def policy_inside_a_branch(sound: Any, step: Any, place: int, bypass: bool = False, stream: str = MAIN) -> None:
    sound(step, place, bypass, stream)
    if stream == BODY:
        step._policy(BESIDE)


def policy_starts_with_the_step(sound: Any, step: Any, asks: bool, launch: Any) -> None:
    """Waiting for something, but not for what made its input: a legal recording with wrong numbers."""
    if asks:
        step.device.record(MAIN, READY)
        step.device.wait(BESIDE, READY)
        launch(POLICY, stream=BESIDE)
    sound(step, False, launch)


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


def write_where_the_first_token_was(sound: Any, device: Cuda, name: str, *given: Any) -> None:
    """An address computed by the host is the same at every launch."""
    if name == "write_rows":
        stream, blocks, threads, (table, position), numbers = given
        copy = device.memory(position.nbytes)
        device.copy("late", copy, position)
        device.synchronize("late")
        vars(device).setdefault("kept", []).append(copy)
        given = stream, blocks, threads, (table, copy), numbers
    sound(device, name, *given)


def memory_that_is_not_pinned(_sound: Any, _device: Cuda, nbytes: int) -> Any:
    return np.zeros(nbytes, np.uint8)


def kernels_that_stand_in(_sound: Any, _toolkit: Toolkit, engine: Any, *_: Any) -> Any:
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy("USER_MANAGED")
    return engine.create_execution_context(config)


NUMBERS = "numbers"
LOST, ELSEWHERE = "Unjoined: nobody waits for the end of beside", "Isolation: the event was recorded elsewhere"
MISTAKES: list[tuple[Any, str, Callable[..., Any], str, Any]] = [
    (DeviceStep, "_launch_piece", launch_and_wait, "overlapped", check_overlap),
    (DeviceStep, "_launch_before_units", policy_after_what_hides_it, "overlapped", check_overlap),
    (Cuda, "wait", wait_for_the_layers_beside, "overlapped", check_overlap),
    (Cuda, "wait", wait_except(BESIDE, recorded=False), "overlapped, beside first", NUMBERS),
    (Cuda, "wait", wait_except(MAIN), "device", LOST),
    (Cuda, "wait", wait_except(BESIDE), "device, beside first", ELSEWHERE),
    (Cuda, "wait_for_event", nothing, "overlapped", NUMBERS),
    (TensorRT, "engine", engine_with_the_layers_scratch, "overlapped, by chance", "shares its scratch memory"),
    (TensorRTEngine, "bind", bind_apart, "overlapped, portable", check_memory),
    (DeviceStep, "_bind", bind_to_one_buffer, "overlapped", "is written while it is read"),
    (DeviceStep, "_bind_part", two_new_rows, "device", NUMBERS),
    (Cuda, "kernel", write_late, "overlapped", NUMBERS),
    (DeviceStep, "launch", policy_inside_a_branch, "device", LOST),
    (DeviceStep, "_launch_before_units", policy_starts_with_the_step, "device, beside first", NUMBERS),
    (DeviceStep, "_launch_before_units", policy_starts_with_the_step, "overlapped, beside first", NUMBERS),
    (DeviceStep, "_record", policy_that_nobody_waits_for, "device", LOST),
    (DeviceStep, "_record", event_from_outside, "device", ELSEWHERE),
    (Cuda, "pinned", memory_that_is_not_pinned, "device", "memory that is not pinned"),
    (DeviceStep, "_warm_up", nothing, "device", "is recorded before its first launch"),
    (Toolkit, "context", kernels_that_stand_in, "device, rtx", "or its kernels LAZY"),
    (CudaGraph, "decide", decide_by_other_limits, "device", NUMBERS),
    (Cuda, "kernel", write_where_the_first_token_was, "device", NUMBERS),
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
