"""A trace in Chrome's format (open it in ui.perfetto.dev): a process per lane, a track per thread of execution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.decision import Unit, units_text
from dash_export.evaluate.candidates import label
from dash_export.evaluate.probe import Lane, TokenStamps, What
from dash_export.evaluate.profile import engine_bytes
from dash_export.names import REPORT

TRACKS = {1: "tokens", 2: "host: decisions, sampling", 3: "engines (one after another)"}
_TOKENS, _HOST, _ENGINES = TRACKS
_US = 1e-3


def chrome_trace(lanes: Sequence[Lane], title: str, tokens: int) -> dict[str, Any]:
    """JSON object format of the Trace Event Format: complete events, times in microseconds since the first of each
    lane's `tokens` tokens.
    """
    start = min(lane.rounds[0][0].began for lane in lanes)
    events: list[dict[str, Any]] = []
    for process, lane in enumerate(lanes, 1):
        events.append(_named(process, 0, "process_name", label(lane.candidate.setting, lane.candidate.build)))
        events += [_named(process, track, "thread_name", name) for track, name in TRACKS.items()]
        sizes = engine_bytes(lane.runtime)
        for token in lane.rounds[0][:tokens]:
            events += _token_events(lane, token, sizes, process, start)
    return {"displayTimeUnit": "ms", "otherData": {"made_by": REPORT, "title": title}, "traceEvents": events}


def _named(process: int, track: int, what: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": track, "name": what, "args": {"name": name}}


def _token_events(
    lane: Lane, token: TokenStamps, sizes: npt.NDArray[np.int64], process: int, start: int
) -> list[dict[str, Any]]:
    def event(track: int, name: str, kind: str, began: int, ended: int, **facts: object) -> dict[str, Any]:
        return {
            "ph": "X", "pid": process, "tid": track, "name": name, "cat": kind,
            "ts": round((began - start) * _US, 3), "dur": round((ended - began) * _US, 3), "args": facts,
        }  # fmt: skip

    text = lane.runtime.text.decode([token.token])
    skipped = [unit for unit, own in zip(lane.units, token.skipped, strict=True) if own]
    executed = lane.runtime.engines.model.num_layers - sum(len(unit.layers) for unit in skipped)
    events = [
        event(
            _TOKENS, f"{token.position}: {text!r}", "token", token.began, token.ended,
            position=token.position, token=token.token, layers=executed,
        )
    ]  # fmt: skip
    segments = lane.runtime.build.segments
    for index, what, began, ended in token.stamps.tolist():
        if what == What.DECISION:
            facts: dict[str, object] = {"skipped": units_text(skipped)}
            if lane.candidate.setting.asks_network:
                facts["damage"] = dict(zip(map(str, lane.units), token.damage.tolist(), strict=True))
            events.append(event(_HOST, f"skip {units_text(skipped)}", "decision", began, ended, **facts))
            continue
        kind, segment = What(what).name.lower(), segments[index]
        name = segment.name if what == What.RUN else Unit(segment.first, segment.last).bypass
        events.append(event(_ENGINES, name, kind, began, ended, bytes=int(sizes[what, index])))
    events.append(event(_HOST, "sampling", "sampling", token.decoded, token.ended))
    return events
