"""Steps with events around them, and what `profile` makes of their times."""

from itertools import pairwise

import pytest

from dash_export.backends.cuda.bound import POLICY
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.cuda.timed_step import PiecesStep, TimedStep
from dash_export.commands.profile import _print
from dash_export.core.kinds import Setting
from dash_export.core.rule import DENSE
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
    runtime = on_card("portable", "device", "main").runtime
    lanes = [Candidate(runtime, Setting("dense")), Candidate(runtime, Setting("token", trade_off=0.5))]
    found, measured = profile(lanes, TEXT, "own", 12, 3, 2)
    dense, token = ({row["name"]: row for row in lane["device"]} for lane in found["lanes"])
    assert token.keys() - dense.keys() == {"policy"}
    assert all(row[kind]["p50"] > 0 for row in token.values() for kind in ("device", "host"))
    assert found["lanes"][0]["peak_memory"] > 0
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
