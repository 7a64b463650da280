"""A trace in Chrome's format (open it in ui.perfetto.dev): a process per lane, a track per thread of execution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dash_export.build_record import Stretch
from dash_export.decision import Action
from dash_export.evaluation.settings import label
from dash_export.names import REPORT
from dash_export.profiling.measure import Lane, TokenStamps
from dash_export.profiling.probe import What
from dash_export.profiling.traffic import EngineBytes, engine_bytes
from dash_export.runtime.engines import policies_by_segment

TRACKS = {1: "tokens", 2: "host: decisions, sampling", 3: "engines (one after another)"}
_TOKENS, _HOST, _ENGINES = TRACKS
_US = 1e-3


def chrome_trace(lanes: Sequence[Lane], title: str) -> dict[str, Any]:
    """JSON object format of the Trace Event Format: complete events, times in microseconds since the first token."""
    start = min(token.began for lane in lanes for token in lane.trace)
    events: list[dict[str, Any]] = []
    for process, lane in enumerate(lanes, 1):
        events.append(_named(process, 0, "process_name", f"{lane.name}: {label(lane.setting)}"))
        events += [_named(process, track, "thread_name", name) for track, name in TRACKS.items()]
        sizes = engine_bytes(lane.runtime)
        for token in lane.trace:
            events += _token_events(lane, token, sizes, process, start)
    return {"displayTimeUnit": "ms", "otherData": {"made_by": REPORT, "title": title}, "traceEvents": events}


def _named(process: int, track: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": track, "name": what, "args": {"name": name}}


def _token_events(lane: Lane, token: TokenStamps, sizes: EngineBytes, process: int, start: int) -> list[dict[str, Any]]:
    def event(track: int, name: str, kind: str, began: int, ended: int, **facts: object) -> dict[str, Any]:
        return {
            "ph": "X", "pid": process, "tid": track, "name": name, "cat": kind,
            "ts": round((began - start) * _US, 3), "dur": round((ended - began) * _US, 3), "args": facts,
        }  # fmt: skip

    text = lane.runtime.text.decode([token.token])
    executed = int((token.actions == Action.RUN).sum())
    events = [
        event(
            _TOKENS, f"{token.position}: {text!r}", "token", token.began, token.ended,
            position=token.position, token=token.token, layers=executed,
        )
    ]  # fmt: skip
    build, points = lane.runtime.build, lane.runtime.bundle.manifest.policy.decision_points
    segments, policies = build.segments, policies_by_segment(build, points, str)
    for index, count, what, began, ended in token.stamps.tolist():
        segment = segments[index]
        layer = segment.first
        if what == What.DECISION:
            action = Action(int(token.actions[layer])).name.lower()
            facts = {"damage": float(token.damage[layer])} if lane.setting.asks_network else {}
            events.append(
                event(_HOST, f"layer {layer}: {action}", "decision", began, ended, layer=layer, action=action, **facts)
            )
            continue
        kind = What(what).name.lower()
        if what == What.POLICY:
            name = ", ".join(policies[index].values())
        elif count > 1:
            name = Stretch(layer, segments[index + count - 1].last, what == What.SKIP).name
        else:
            name = segment.name if what == What.RUN else f"skip_{layer:02d}"
        size = int(getattr(sizes, kind)[index : index + count].sum())
        events.append(event(_ENGINES, name, kind, began, ended, bytes=size, action=kind))
    events.append(event(_HOST, "sampling", "sampling", token.decoded, token.ended))
    return events
