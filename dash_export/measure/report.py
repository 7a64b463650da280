"""A profile as one HTML file: figures as data URIs, no script, nothing fetched."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from dash_export.bundle.layout import REPORT
from dash_export.measure.breakdown import PARTS, conditions, shares
from dash_export.measure.pictures import breakdown_figure, render, skip_map_figure
from dash_export.measure.probe import Lane

TEMPLATE = "report.html.jinja"
MAP_TOKENS = 64
"""Most rows (tokens) of a skip map: these fit a printed page."""


def render_report(found: dict[str, Any], lanes: Sequence[Lane]) -> str:
    """Return the profile `found` as HTML. `lanes`: the lanes of this profile, in its order."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["mb"] = lambda count: f"{count / 1e6:.1f}"
    return environment.get_template(TEMPLATE).render(
        made_by=REPORT,
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
