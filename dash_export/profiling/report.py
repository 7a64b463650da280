"""The report: one HTML file with everything inside, figures as pictures in data URIs, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from dash_export.decision import Action
from dash_export.evaluation.pictures import render, skip_map_figure
from dash_export.evaluation.settings import label
from dash_export.names import REPORT
from dash_export.profiling.figures import breakdown_figure, dial_figure, distribution_figure, segments_figure
from dash_export.profiling.measure import SETTLE, Lane
from dash_export.profiling.results import PARTS, Profile
from dash_export.profiling.wording import believable, conditions, course_line, lane_names, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report.html.jinja"
MAP_TOKENS = 64
"""Rows of a skip map: what fits a printed page."""


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, with what it shows in words."""

    source: str
    caption: str


def render_report(found: Profile, lanes: Sequence[Lane]) -> str:
    """HTML. `lanes` are those of the profile, in its order."""
    names = lane_names(found)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["mb"] = lambda count: f"{count / 1e6:.1f}"
    return environment.get_template(TEMPLATE).render(
        made_by=REPORT,
        title=title(found),
        found=found,
        conditions=conditions(found),
        course=course_line(found.course),
        parts=PARTS,
        rows=[
            {"name": name, "lane": lane, "note": believable(lane.check),
             "whole": sum(part.mean for part in lane.parts.values())}
            for name, lane in zip(names, found.lanes, strict=True)
        ],
        breakdown=_picture(
            breakdown_figure(found.lanes, names),
            "Where a token's time goes, mean of tokens with timed launches; the diamond is the mean without them.",
        ),
        distribution=_picture(
            distribution_figure(found.lanes, names), "Time per token, tokens without timed launches."
        ),
        segments=[
            _picture(
                segments_figure(lane, found.lanes[0]),
                f"{name}: what each segment adds to a token, and how often it is skipped.",
            )
            for name, lane in zip(names, found.lanes, strict=True)
        ],
        maps=[
            _picture(_skip_map(lane, found.model), f"{name}: the skip map of the first window that was decoded.", "png")
            for name, lane in zip(names, lanes, strict=True)
            if lane.entrant.setting.kind != "dense"
        ],
        dial=_dial(found, lanes, names),
    )  # fmt: skip


def _skip_map(lane: Lane, model: str) -> Figure:
    start = lane.recording.actions[0][SETTLE : SETTLE + MAP_TOKENS]
    ids = lane.recording.decoded[SETTLE : SETTLE + MAP_TOKENS]
    pieces = [lane.runtime.text.decode([token]) for token in ids]
    mean = (start == Action.RUN).sum(axis=1).mean()
    caption = f"{mean:.1f} of {start.shape[1]} layers run per token, mean over {len(pieces)} tokens"
    return skip_map_figure(pieces, start, lane.units, f"{model}: {label(lane.entrant.setting)}", caption)


def _dial(found: Profile, lanes: Sequence[Lane], names: Sequence[str]) -> Picture | None:
    build = lanes[0].runtime.build
    if not build.dial:
        return None
    return _picture(
        dial_figure(found.lanes, names, build),
        "The dial that the build calibrated, and where each setting came out on this clock. Across: measured, median "
        "and quartiles of rounds. Up: what the dial says at the number of layers run; the divergence on this text was "
        "not measured (dash-export frontier does).",
    )


def _picture(figure: Figure, caption: str, kind: str = "svg") -> Picture:
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return Picture(f"data:{media};base64,{base64.b64encode(render(figure, kind)).decode()}", caption)
