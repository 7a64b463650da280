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
from dash_export.evaluation.timing import SETTLE
from dash_export.names import REPORT
from dash_export.profiling.figures import breakdown_figure, dial_figure, distribution_figure, segments_figure
from dash_export.profiling.measure import Lane
from dash_export.profiling.results import PARTS, LaneProfile, Profile
from dash_export.profiling.wording import (
    believable,
    conditions,
    course_line,
    lane_names,
    policy_line,
    rarely_line,
    stretches_line,
    title,
)

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
            {"name": name, "lane": lane,
             "notes": [line for line in (policy_line(lane), rarely_line(lane), believable(lane.check)) if line],
             "stretches": stretches_line(lane),
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
                segments_figure(lane, _dense(found, lane)),
                f"{name}: what each segment adds to a token, and how often it is skipped.",
            )
            for name, lane in zip(names, found.lanes, strict=True)
        ],
        maps=[
            _picture(_skip_map(lane, found.model), f"{name}: the skip map of the first window that was decoded.", "png")
            for name, lane in zip(names, lanes, strict=True)
            if lane.setting.kind != "dense"
        ],
        dials=_dials(found, lanes, names),
    )  # fmt: skip


def _dense(found: Profile, lane: LaneProfile) -> LaneProfile:
    return next(other for other in found.lanes if other.bundle == lane.bundle)


def _skip_map(lane: Lane, model: str) -> Figure:
    start = lane.recording.actions[0][SETTLE : SETTLE + MAP_TOKENS]
    ids = lane.recording.decoded[SETTLE : SETTLE + MAP_TOKENS]
    pieces = [lane.runtime.text.decode([token]) for token in ids]
    policy = lane.runtime.bundle.manifest.policy
    mean = (start == Action.RUN).sum(axis=1).mean()
    caption = f"{mean:.1f} of {start.shape[1]} layers run per token, mean over {len(pieces)} tokens"
    return skip_map_figure(pieces, start, policy.gated, f"{model}: {label(lane.setting)}", caption)


def _dials(found: Profile, lanes: Sequence[Lane], names: Sequence[str]) -> list[Picture]:
    """One per bundle that has a dial."""
    pictures = []
    for bundle in dict.fromkeys(lane.bundle for lane in found.lanes):
        chosen = [number for number, lane in enumerate(found.lanes) if lane.bundle == bundle]
        build = lanes[chosen[0]].runtime.build
        if build.dial:
            figure = dial_figure([found.lanes[i] for i in chosen], [names[i] for i in chosen], build)
            pictures.append(
                _picture(
                    figure,
                    f"{bundle}: the dial that the build calibrated, and where each setting came out on this clock. "
                    "Across: measured, median and quartiles of rounds. Up: what the dial says at the number of layers "
                    "run; the divergence on this text was not measured (dash-export frontier does).",
                )
            )
    return pictures


def _picture(figure: Figure, caption: str, kind: str = "svg") -> Picture:
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return Picture(f"data:{media};base64,{base64.b64encode(render(figure, kind)).decode()}", caption)
