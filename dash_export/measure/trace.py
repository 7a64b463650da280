"""A trace in Chrome's format (open it in ui.perfetto.dev): a process per lane, with a track per kind of event."""

from collections.abc import Iterator, Sequence
from typing import Any

from dash_export.bundle.layout import REPORT
from dash_export.bundle.records import POLICY
from dash_export.core.kinds import OWN
from dash_export.core.units import units_text
from dash_export.measure.probe import DECISION, SAMPLING, WHOLE, Lane

TRACKS = {1: "tokens", 2: "host: decisions, sampling", 3: "engines (one after another)"}
ON_DEVICE = {2: "host: launches, decisions, sampling", 3: "stream of the layers", 4: "stream of the policy"}
_TOKENS, _HOST, _ENGINES, _POLICY = 1, 2, 3, 4


def chrome_trace(
    lanes: Sequence[Lane], title: str, tokens: int, engines: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return the JSON object format of the Trace Event Format: complete events of the first `tokens` tokens of each
    lane's first round. Times are microseconds since the earliest of these tokens began. A device's streams are tracks.
    `engines`: those whose layers were timed, a track each.
    """
    start = min(lane.stamps[0, WHOLE, 0] for lane in lanes)
    events = [event for process, lane in enumerate(lanes, 1) for event in _lane_events(lane, process, start, tokens)]
    events += _layer_events(engines, len(lanes) + 1) if engines else []
    return {"displayTimeUnit": "ms", "otherData": {"made_by": REPORT, "title": title}, "traceEvents": events}


def _layer_events(engines: Sequence[dict[str, Any]], process: int) -> Iterator[dict[str, Any]]:
    yield _name(process, 0, "process_name", "layers inside engines, each engine alone under a profiler")
    for track, engine in enumerate(engines, 1):
        yield _name(process, track, "thread_name", engine["name"])
        at = 0.0
        for name, took in engine["layers"].items():
            yield {"ph": "X", "pid": process, "tid": track, "name": name, "cat": "layer", "ts": at, "dur": took}
            at += took


def _name(process: int, track: int, kind: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": track, "name": kind, "args": {"name": name}}


def _lane_events(lane: Lane, process: int, start: int, tokens: int) -> Iterator[dict[str, Any]]:
    tracks = TRACKS if lane.policy is None else TRACKS | ON_DEVICE
    names = [
        (0, "process_name", lane.candidate.label),
        *((track, "thread_name", name) for track, name in tracks.items()),
    ]
    for track, kind, name in names:
        yield _name(process, track, kind, name)

    def event(track: int, name: str, kind: str, stamps: Any, **facts: object) -> dict[str, Any]:
        began, took = ((stamps - (start, stamps[0])) * 1e-3).round(3).tolist()
        return {
            "ph": "X", "pid": process, "tid": track, "name": name, "cat": kind, "ts": began, "dur": took, "args": facts,
        }  # fmt: skip

    layers = (lane.actions == 0).sum(axis=1).tolist()
    for at, stamps in enumerate(lane.stamps[: min(tokens, lane.wall.shape[1])]):
        token, position = int(lane.ids[at]), int(lane.positions[at])
        skipped = [unit for unit, own in zip(lane.units, lane.skipped[at], strict=True) if own]
        facts = {"position": position, "token": token, "layers": layers[at]}
        text = lane.candidate.runtime.text.decode([token])
        yield event(_TOKENS, f"{position}: {text!r}", "token", stamps[WHOLE], **facts)
        decision: dict[str, object] = {"skipped": units_text(skipped)}
        if lane.candidate.setting.kind in ("token", OWN):  # which ask the network
            decision["damage"] = dict(zip(map(str, lane.units), lane.damage[at].tolist(), strict=True))
        yield event(_HOST, f"skip {units_text(skipped)}", "decision", stamps[DECISION], **decision)
        yield event(_HOST, "sampling", "sampling", stamps[SAMPLING])
        bypasses = iter(skipped)
        for index, segment in enumerate(lane.segments):
            bypassed = lane.bypassed[at, index]
            name, kind = (next(bypasses).bypass, "bypass") if bypassed else (segment.name, "run")
            yield event(_ENGINES, name, kind, stamps[index])
            if lane.launches is not None:
                yield event(_HOST, f"launch {name}", "launch", lane.launches[at, index])
        if lane.launches is not None and lane.policy is not None and lane.policy[at, 0]:
            yield event(_HOST, f"launch {POLICY}", "launch", lane.launches[at, -1])
            yield event(_POLICY, POLICY, "policy", lane.policy[at])
