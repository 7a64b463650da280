"""The trace: Chrome's format, one event per launch and decision, nothing overlapping on a track."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise

from dash_export.profiling.measure import Lane
from dash_export.profiling.trace import TRACKS, chrome_trace
from tests.profiling.conftest import TRACED


def test_events(lanes: list[Lane]) -> None:
    trace = json.loads(json.dumps(chrome_trace(lanes, "tiny")))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert len(names) == len(lanes) * (1 + len(TRACKS))
    assert {event["pid"] for event in events} == {1, 2, 3, 4}
    for process, lane in enumerate(lanes, 1):
        count = Counter(event["cat"] for event in events if event["pid"] == process)
        assert count["token"] == count["sampling"] == count["decision"] == TRACED
        assert count["run"] + count["bypass"] == TRACED * len(lane.runtime.build.segments)
        assert count["bypass"] == sum(int(token.skipped.sum()) for token in lane.trace)
    deciding = [event for event in events if event["cat"] == "decision" and event["pid"] > 1]
    damages = [event["args"]["damage"] for event in deciding if "damage" in event["args"]]
    assert len(damages) == TRACED
    assert all(damage.keys() == {"2-3", "4"} and min(damage.values()) >= 0 for damage in damages)
    assert [event["args"]["skipped"] for event in deciding[:TRACED]] == ["2-3"] * TRACED
    names = {event["name"] for event in events if event["cat"] == "bypass"}
    assert "bypass_02-03" in names


def test_nothing_overlaps_on_a_track(lanes: list[Lane]) -> None:
    tracks = defaultdict(list)
    for event in chrome_trace(lanes, "tiny")["traceEvents"]:
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            began = round(event["ts"] * 1000)
            tracks[event["pid"], event["tid"]].append((began, began + round(event["dur"] * 1000)))
    assert len(tracks) == len(lanes) * len(TRACKS)
    for spans in tracks.values():
        spans.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(spans))
