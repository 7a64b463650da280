"""The trace: Chrome's format, one event per launch and decision, nothing overlapping on a track."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise

from dash_export.profiling.measure import Lane
from dash_export.profiling.trace import TRACKS, chrome_trace
from tests.profiling.conftest import TRACED


def test_events(lanes: list[Lane]) -> None:
    shown = [lane for lane in lanes if lane.replays is None]
    trace = json.loads(json.dumps(chrome_trace(shown, "tiny")))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    names = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert len(names) == len(shown) * (1 + len(TRACKS))
    assert {event["pid"] for event in events} == {1, 2, 3}
    for process, lane in enumerate(shown, 1):
        count = Counter(event["cat"] for event in events if event["pid"] == process)
        segments = lane.runtime.build.segments
        gated = sum(segment.gated for segment in segments)
        assert count["token"] == count["sampling"] == TRACED
        assert count["run"] + count["skip"] == TRACED * len(segments)
        assert count["decision"] == TRACED * gated
        assert count["policy"] == (TRACED * gated if lane.runtime.dispatch == "sync" else 0)
        assert count["skip"] == sum(int((token.actions == 1).sum()) for token in lane.trace)
    deciding = [event for event in events if event["cat"] == "decision" and event["pid"] > 1]
    assert all(event["args"]["damage"] >= 0 for event in deciding)
    assert {event["args"]["action"] for event in deciding} == {"run", "skip"}


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
