"""Stamps change nothing but the clock, and a token's parts are its whole; the trace; what the machine tells."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.decode import BoundStep
from dash_export.core.kinds import Setting
from dash_export.measure.breakdown import conditions, lane_profile, shares, spread, this_machine, token_parts
from dash_export.measure.candidates import candidates
from dash_export.measure.intervals import Interval
from dash_export.measure.probe import DECISION, SAMPLING, WHOLE, Lane, Probe, measure
from dash_export.measure.texts import windows
from dash_export.measure.trace import TRACKS, chrome_trace
from tests.measure.test_score import TEXT
from tests.tiny import random_ids

CONTEXT, TOKENS, ROUNDS, TRACED = 12, 6, 2, 3
ONE = Interval(1.0, 1.0, 1.0)


@pytest.fixture(scope="session")
def lanes(tiny_runtime: Callable[..., DashRuntime]) -> list[Lane]:
    """Dense, a static set and the token policy; and the portable build."""
    runtime, portable = tiny_runtime(), tiny_runtime("portable")
    settings = [Setting("dense"), Setting("static", skip=(2, 3)), Setting("token", skipped=1.5)]
    compared = candidates(runtime, settings, [("other", portable)])
    return measure(compared, windows(runtime, TEXT, "text", 2, CONTEXT + 2 + TOKENS), TOKENS, ROUNDS)


def test_a_probe_changes_nothing(runtime: DashRuntime) -> None:
    ids = random_ids(12)
    logits = []
    for probed in (False, True):
        session = runtime.session("token", skipped=1.5)
        session.prefill(ids[:4])
        session.reserve(8)
        step = session.bound(1)
        assert isinstance(step, BoundStep)
        rule = Probe(step, session) if probed else session.rules.rule
        for token in ids[4:].tolist():
            step.decode(token, rule)
            logits.append(step.logits.copy())
    np.testing.assert_array_equal(logits[:8], logits[8:])


def test_every_launch_has_a_stamp_and_so_has_the_decision(lanes: list[Lane]) -> None:
    """In the order of the segments, one after the other; the decision before the first unit, the third."""
    for lane in lanes:
        assert lane.ids.shape == (ROUNDS * TOKENS,)
        assert lane.wall.shape == (ROUNDS, TOKENS)
        order = [WHOLE, 0, 1, DECISION, *range(2, len(lane.segments)), SAMPLING]
        begins, ends = lane.stamps[:, order, 0], lane.stamps[:, order[1:], 1]
        assert (begins[:, 1:-1] <= ends[:, :-1]).all()
        assert (ends[:, :-1] <= begins[:, 2:]).all()
        assert (begins[:, 0] <= begins[:, 1]).all()
        assert (ends[:, -1] <= lane.stamps[:, WHOLE, 1]).all()
        parts = token_parts(lane)
        assert all((values >= 0).all() for values in parts.values())
        np.testing.assert_array_equal(np.sum(list(parts.values()), axis=0), lane.wall.ravel())


def test_figures(lanes: list[Lane]) -> None:
    dense = lanes[0]
    found = [lane_profile(lane, dense, ONE, 0) for lane in lanes]
    assert [profile["label"] for profile in found] == ["dense", "static, skip 2-3", "token, skipped 1.5", "other"]
    assert [profile["layers"]["mean"] for profile in found[:2]] == [6.0, 4.0]
    for profile in found:
        assert profile["token_ms"]["count"] == ROUNDS * TOKENS
        assert [row["name"] for row in profile["segments"]] == [segment.name for segment in dense.segments]
        assert [row["unit"] for row in profile["segments"]] == ["", "", "2-3", "4", ""]
        assert profile["parts"]["deciding"]["mean"] > 0
        assert sum(share for _, share in shares(profile).values()) == pytest.approx(1)
    full, skipped = found[0]["segments"][2], found[1]["segments"][2]
    assert (full["skipped"], full["bypass"], full["owed"]) == (0.0, None, None)
    assert (skipped["skipped"], skipped["run"]) == (1.0, None)
    assert skipped["owed"] == skipped["bypass"]["p50"] / full["run"]["p50"]


def test_trace(lanes: list[Lane]) -> None:
    """Chrome's format, one event per launch and decision, nothing overlapping on a track."""
    trace = json.loads(json.dumps(chrome_trace(lanes, "tiny", TRACED)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    named = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert len(named) == len(lanes) * (1 + len(TRACKS))
    assert {event["pid"] for event in events} == {1, 2, 3, 4}
    for process, lane in enumerate(lanes, 1):
        count = Counter(event["cat"] for event in events if event["pid"] == process)
        assert count["token"] == count["sampling"] == count["decision"] == TRACED
        assert count["run"] + count["bypass"] == TRACED * len(lane.segments)
        assert count["bypass"] == lane.skipped[:TRACED].sum()
    deciding = [event for event in events if event["cat"] == "decision" and event["pid"] > 1]
    damages = [event["args"]["damage"] for event in deciding if "damage" in event["args"]]
    assert len(damages) == TRACED
    assert all(damage.keys() == {"2-3", "4"} and min(damage.values()) >= 0 for damage in damages)
    assert [event["args"]["skipped"] for event in deciding[:TRACED]] == ["2-3"] * TRACED
    assert "bypass_02-03" in {event["name"] for event in events if event["cat"] == "bypass"}
    tracks = defaultdict(list)
    for event in events:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        began = round(event["ts"] * 1000)
        tracks[event["pid"], event["tid"]].append((began, began + round(event["dur"] * 1000)))
    assert len(tracks) == len(lanes) * len(TRACKS)
    for spans in tracks.values():
        assert all(one[1] <= other[0] for one, other in pairwise(sorted(spans)))


def test_spread() -> None:
    assert spread(np.arange(101) * 1000, 1e-3) == {"mean": 50, "p50": 50, "p90": 90, "p99": 99, "count": 101}


def test_a_busy_machine_is_told() -> None:
    course = {"text": "t", "context": 1, "tokens": 1, "windows": 1, "rounds": 1}
    for load, lines in ((0.2, 3), (2.0, 4)):
        machine = this_machine() | {"cores": 2, "load": load}
        assert len(conditions({"model": "m", "machine": machine, "course": course, "lanes": []})) == lines
