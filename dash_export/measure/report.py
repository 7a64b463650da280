"""A profile as one HTML file: figures as data URIs, no script, nothing fetched."""

import base64
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dash_export.measure.breakdown import PARTS, conditions, shares
from dash_export.measure.html import render_page
from dash_export.measure.pictures import breakdown_figure, render, skip_map_figure
from dash_export.measure.probe import Lane

MAP_TOKENS = 64
"""Most rows (tokens) of a skip map: these fit a printed page."""


def render_report(found: dict[str, Any], lanes: Sequence[Lane]) -> str:
    """Return the profile `found` as HTML. `lanes`: the lanes of this profile, in its order."""
    return render_page(
        "report.html.jinja",
        found=found,
        conditions=conditions(found),
        shares=shares,
        parts=PARTS,
        breakdown=_source(breakdown_figure(found["lanes"], PARTS)),
        maps={
            lane.candidate.label: _source(_skip_map(lane, found["model"]), "png")
            for lane in lanes
            if lane.candidate.setting.kind != "dense"
        },
    )


def _skip_map(lane: Lane, model: str) -> Figure:
    first = slice(min(MAP_TOKENS, lane.wall.shape[1]))  # tokens of the first window
    pieces = [lane.candidate.runtime.text.decode([token]) for token in lane.ids[first].tolist()]
    return skip_map_figure(pieces, lane.actions[first], lane.units, f"{model}: {lane.candidate.label}")


def _source(figure: Figure, kind: str = "svg") -> str:
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{media};base64,{base64.b64encode(render(figure, kind)).decode()}"
