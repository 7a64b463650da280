"""The order of launches, events and waits, and the mistakes that these tests are there to see."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.names import past_names, present_names
from dash_export.runtime.device import ranges
from dash_export.runtime.device.base import Context
from dash_export.runtime.device.engines import MAIN, POLICY, DeviceEngines
from dash_export.runtime.device.step import DeviceStep, Kind, Part
from dash_export.runtime.rules import DENSE
from tests.runtime.device.conftest import IDS, MakeSimulated, Simulated
from tests.runtime.device.simulated import Call, SimulatedContext, SimulatedDevice, SimulatedStream
from tests.runtime.device.test_step import TOLERANCE, decoded, rule_of

GATED = (2, 3, 4)


def one_token(made: Simulated, host: DashRuntime) -> list[Call]:
    """What the host did for one decoded token under a policy."""
    session = made.runtime.session_under(rule_of(host))
    session.prefill(IDS[:20])
    session.decode_one(int(IDS[20]))
    made.device.log.clear()
    session.decode_one(int(IDS[21]))
    return list(made.device.log)


def check_overlap(log: list[Call]) -> None:
    """Policy l+1 is launched before anybody waits for layer l; nothing but decisions is waited for inside a token."""
    waits = [index for index, (stream, what, _) in enumerate(log) if stream == "host"]
    assert [log[index] for index in waits[:-1]] == [("host", "wait", f"decided layer_{layer:02d}") for layer in GATED]
    assert log[waits[-1]] == ("host", "synchronize", MAIN)
    assert waits[-1] == len(log) - 1
    for layer, wait in zip(GATED, waits, strict=False):
        before = [call for call in log[:wait] if call[1] == "run"]
        assert (POLICY, "run", f"policy_{layer:02d}") in before
        # The layer before the gated one has been launched when the host begins to wait for the decision.
        assert before[-2][0] == MAIN
        assert before[-2][2].endswith(f"_{layer - 1:02d}")
        # The policy waits for what made its input, the output of the layer two before, and for nothing else.
        waited = [of for stream, what, of in log[:wait] if (stream, what) == (POLICY, "wait")]
        assert waited == [f"done layer_{ahead - 2:02d}" for ahead in GATED if ahead <= layer]


def check_scratch(ran: list[tuple[str, SimulatedContext]]) -> None:
    """No two streams share scratch memory."""
    streams: dict[str, set[str]] = {}
    for stream, context in ran:
        streams.setdefault(context.scratch, set()).add(stream)
    assert all(len(names) == 1 for names in streams.values()), streams


def check_aliases(step: DeviceStep) -> None:
    """A cache is read and written under one address."""
    for part in step.parts:
        memory = step._memory_of(part, "run")
        for layer in part.engines.segment.layers:
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


def test_ranges_have_names(simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a timeline shows of one token: every launch and every wait, none inside another."""
    open_, seen = [], []

    class Annotation:
        def __init__(self, name: str, domain: str) -> None:
            assert domain == "dash-export"
            self.name = name

        def __enter__(self) -> None:
            assert not open_
            open_.append(self.name)
            seen.append(self.name)

        def __exit__(self, *_: object) -> None:
            open_.pop()

    monkeypatch.setattr(ranges, "_nvtx", SimpleNamespace(annotate=Annotation))
    made = simulated("trt10")
    log = one_token(made, host)
    ran = [of for _, what, of in log if what == "run"]
    ours = seen[-(len(ran) + len(GATED) + 1) :]
    assert [name for name in ours if not name.startswith(("decide", "end"))] == ran
    assert [name for name in ours if name.startswith("decide")] == [f"decide layer_{layer:02d}" for layer in GATED]
    assert ours[-1] == "end of step"


def test_nothing_is_waited_for_without_a_policy(simulated: MakeSimulated) -> None:
    made = simulated("trt10", "plain")
    step = decode_step(made)
    step.decode(1, DENSE)
    assert [call for call in made.device.log if call[0] == "host"] == [("host", "synchronize", MAIN)]


def test_a_static_set_asks_no_policy(simulated: MakeSimulated) -> None:
    made = simulated()
    made.runtime.generate(IDS[:10].tolist(), 4, policy="static", skip=[3])
    assert not [context for _, context in made.device.ran if context.name.startswith("policy")]


# --- mistakes


def test_layer_awaited_before_the_policy_is_launched(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = DeviceStep._launch

    def waiting(step: DeviceStep, part: Part, kind: str) -> None:
        sound(step, part, kind)
        part.done.wait()

    monkeypatch.setattr(DeviceStep, "_launch", waiting)
    with pytest.raises(AssertionError):
        check_overlap(one_token(simulated(), host))


def test_a_policy_that_waits_for_the_layer_beside_it(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = DeviceStep._look_ahead

    def late(step: DeviceStep, part: Part, asks: bool) -> None:
        if step.policy is not step.main:
            step.policy.wait(part.done)
        sound(step, part, asks)

    monkeypatch.setattr(DeviceStep, "_look_ahead", late)
    with pytest.raises(AssertionError):
        check_overlap(one_token(simulated(), host))


def test_a_missing_event(simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedStream, "wait", lambda *_: None)
    assert differs(simulated(first="policy"), host)


def test_a_decision_taken_without_waiting(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hasty(step: DeviceStep, part: Part) -> np.ndarray:
        return np.asarray(step._results.host[f"damage {part.layer}"][0, :, 0])

    monkeypatch.setattr(DeviceStep, "_decision", hasty)
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

    def apart(step: DeviceStep, part: Part, kind: Kind) -> dict[str, object]:
        memory = dict(sound(step, part, kind))
        for layer in part.engines.segment.layers if isinstance(kind, str) else ():
            for name in present_names(layer):
                memory[name] = step.device.memory(memory[name].nbytes)
        return memory  # type: ignore[return-value]

    monkeypatch.setattr(DeviceStep, "_memory_of", apart)
    made = simulated("portable")
    assert differs(made, host)
    with pytest.raises(AssertionError):
        check_aliases(decode_step(made))


def test_new_rows_not_written(simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceStep, "_write_rows", lambda *_: None)
    assert differs(simulated("trt10"), host)


def test_skip_graph_writes_over_what_the_layer_reads(
    simulated: MakeSimulated, host: DashRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hidden state buffer instead of two."""
    sound: Callable[..., Context] = DeviceStep.context

    def single(step: DeviceStep, part: Part, kind: str) -> Context:
        step.hidden[1] = step.hidden[0]
        return sound(step, part, kind)

    monkeypatch.setattr(DeviceStep, "context", single)
    assert differs(simulated(), host)
