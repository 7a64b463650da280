"""Steps with events around them, and what `profile` makes of their times."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dash_export.backends.cuda.bound import POLICY
from dash_export.backends.cuda.cuda import Cuda
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.cuda.timed_step import PiecesStep, TimedStep
from dash_export.backends.tensorrt.tensorrt import TensorRT
from dash_export.commands.profile import _print
from dash_export.core.kinds import Setting
from dash_export.core.rule import DENSE
from dash_export.errors import BackendError
from dash_export.measure.breakdown import profile
from dash_export.measure.candidates import Candidate
from dash_export.measure.report import render_report
from dash_export.measure.trace import chrome_trace
from tests.backends.cuda.conftest import DISPATCH, IDS, Host, MakeOnCard
from tests.tiny import TEXT


@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("kind", [TimedStep, PiecesStep])
def test_events_change_nothing(dispatch: str, kind: type[TimedStep], host: Host, on_card: MakeOnCard) -> None:
    made = on_card("portable", dispatch, "beside")
    made.runtime.engines.step_kind = kind  # type: ignore[union-attr]
    assert not host.differs(made)
    assert not host.differs(made, DENSE)


def test_when_pieces_ran(host: Host, on_card: MakeOnCard) -> None:
    """One after another on the layers' stream; the policy while the segment that hides it does, or before."""
    made = on_card("portable", "overlapped", "main")
    engines = made.runtime.engines
    engines.step_kind = PiecesStep  # type: ignore[union-attr]
    session = made.runtime.session_under(host.rule)
    session.prefill(IDS[:20])
    session.decode_one(int(IDS[20]), DENSE)
    step = session.bound(1)
    assert isinstance(step, PiecesStep)
    assert POLICY not in step.launched, "nobody asked it, though it has been recorded"
    session.decode_one(int(IDS[21]))
    assert step.launched.keys() == {POLICY, *range(len(step.parts))}
    ran = [step.ran(place) for place in range(len(step.parts))]
    assert all(begun < ended for begun, ended in ran)
    assert all(one[1] <= other[0] + 1000 for one, other in pairwise(ran))
    first = engines.first  # type: ignore[union-attr]
    asked = step.ran(POLICY)
    assert ran[first - 2][1] <= asked[0] + 1000
    assert asked[1] <= ran[first][0] + 1000
    assert 0 < (ran[-1][1] - step.began) / 1e3 <= step.device_us + 1


def test_profile(on_card: MakeOnCard, capsys: pytest.CaptureFixture[str]) -> None:
    made = on_card("portable", "device", "main")
    runtime = made.runtime
    lanes = [Candidate(runtime, Setting("dense")), Candidate(runtime, Setting("token", trade_off=0.5))]
    found, measured = profile(lanes, TEXT, "own", 12, 3, 2)
    dense, token = ({row["name"]: row for row in lane["device"]} for lane in found["lanes"])
    assert token.keys() - dense.keys() == {"policy"}
    assert all(row[kind]["p50"] > 0 for row in token.values() for kind in ("device", "host"))
    assert 0 < found["lanes"][0]["peak_memory"] < made.card.total
    engines = sum(row["device"]["mean"] for row in dense.values())
    assert engines < 1e3 * found["lanes"][0]["token_ms"]["mean"]
    _print(found)
    assert "dense: microseconds per engine, by events of the device" in capsys.readouterr().out
    assert "by events of the device" in render_report(found, measured)
    events = chrome_trace(measured, "tiny", 8)["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"stream of the layers", "stream of the policy", "host: launches, decisions, sampling"} <= names
    assert [(event["pid"], event["tid"]) for event in events if event.get("cat") == "policy"] == [(2, 4)] * 3
    assert runtime.engines.step_kind is DeviceStep  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["trt10", "portable", "rtx", "trt10-together"])
def test_layers_inside_engines(target: str, on_card: MakeOnCard, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every engine of a token, each alone and without a graph. A context never loses a profiler, so nothing else
    gets one of these.
    """
    made = on_card(target, "device", "beside")
    found, lanes = profile([Candidate(made.runtime, Setting("dense"))], TEXT, "own", 12, 3, 2, layers=True)
    engines = {row["name"]: row for row in found["engines"]}
    assert [*engines] == [
        "layer_00", "layer_01", "policy", "layers_02-03", "bypass_02-03", "layer_04", "bypass_04-04", "layer_05"
    ]  # fmt: skip
    for row in engines.values():
        assert row["device_us"] > 0
        assert [*row["layers"].values()] == pytest.approx(range(1, len(row["layers"]) + 1)), "as the stand-in tells"
    assert (
        len(engines["policy"]["layers"]) < len(engines["layer_04"]["layers"]) < len(engines["layers_02-03"]["layers"])
    )
    profiled = [context for _, context in made.card.ran if context.profiler is not None]
    assert len(set(map(id, profiled))) == 8
    assert made.card.ran[-1][1].profiler is None, "what runs later has contexts of its own"
    _print(found)
    whole = sum(engines["layer_04"]["layers"].values())
    told = capsys.readouterr().out
    assert (
        f"layer_04: {engines['layer_04']['device_us']:.1f} microseconds; under the profiler its layers take {whole:.1f}"
        in told
    )
    assert f" {len(engines['layer_04']['layers']) - 10} others" in told
    events = [event for event in chrome_trace(lanes, "tiny", 8, found["engines"])["traceEvents"] if event["pid"] == 2]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [*tracks.values()] == [*engines]
    layers = [event for event in events if event["ph"] == "X"]
    for track, name in tracks.items():
        ends = np.cumsum([0, *engines[name]["layers"].values()])
        assert [event["ts"] for event in layers if event["tid"] == track] == pytest.approx(ends[:-1])


def test_nothing_about_layers(on_card: MakeOnCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT that is silent; and a backend on CUDA without such a profiler."""
    engines: Any = on_card("trt10").runtime.engines
    for engine in engines.device.engines.values():
        engine._engine.layers = []
    with pytest.raises(BackendError, match=r"TensorRT 10\.16\.0 said nothing about an engine's layers"):
        engines.layer_times(8, 2)
    monkeypatch.setattr(TensorRT, "layer_times", Cuda.layer_times)
    with pytest.raises(BackendError, match=r"Only TensorRT .* Leave --layers out"):
        engines.layer_times(8, 2)
