"""A profile as sentences, and as one HTML file: figures as data URIs, no script, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dash_export.evaluate.candidates import label
from dash_export.evaluate.probe import Lane
from dash_export.evaluate.profile import PARTS, Profile
from dash_export.names import REPORT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "report.html.jinja"
MAP_TOKENS = 64
"""Rows of a skip map: what fits a printed page."""


def lane_names(found: Profile) -> list[str]:
    """What each lane is called."""
    return [label(lane.setting, lane.build) for lane in found.lanes]


def title(found: Profile) -> str:
    """Model, targets and machine on a line."""
    targets = ", ".join(dict.fromkeys(lane.target for lane in found.lanes))
    return f"{found.model}, {targets}, {found.machine.cpu}, {found.machine.cores} cores"


def conditions(found: Profile) -> list[str]:
    """The machine's state, what was decoded, and a warning where something disturbed."""
    machine, memory, plan = found.machine, found.bandwidth, found.course
    told = [f"power governor: {machine.governor or 'not told'}"]
    if machine.clock_mhz:
        pairs = zip(machine.clock_mhz, found.after_mhz or machine.clock_mhz, strict=False)
        told.append("clock before and after: " + ", ".join(f"{a:.0f}/{b:.0f} MHz" for a, b in pairs))
    if machine.load is not None:
        told.append(f"load before: {machine.load:g}")
    lines = [
        "; ".join(told),
        f"memory, best of passes over {memory.bytes / 1e6:.0f} MB on {memory.cores} cores: "
        f"read {memory.read / 1e9:.1f} GB/s, copy {memory.copy / 1e9:.1f} GB/s",
        f"{plan.text}: {plan.rounds} rounds, settings in turn (windows of text: {plan.windows}); each "
        f"{plan.context} tokens of prompt, then {plan.tokens} known tokens decoded one by one",
    ]
    if machine.busy:
        lines.append("WARNING: other work ran just before. Its share of the processor is in every figure below.")
    return lines


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI, with what it shows in words."""

    source: str
    caption: str


def render_report(found: Profile, lanes: Sequence[Lane]) -> str:
    """HTML. `lanes` are those of the profile, in its order."""
    import jinja2

    from dash_export.evaluate.pictures import breakdown_figure, distribution_figure, segments_figure

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
        parts=PARTS,
        rows=[
            {"name": name, "lane": lane, "whole": sum(part.mean for part in lane.parts.values())}
            for name, lane in zip(names, found.lanes, strict=True)
        ],
        breakdown=_picture(
            breakdown_figure(found.lanes, names, PARTS), "Where a token's time goes, mean of tokens."
        ),
        distribution=_picture(distribution_figure(found.lanes, names), "Time per token."),
        segments=[
            _picture(
                segments_figure(lane, found.lanes[0]),
                f"{name}: what each segment adds to a token, and how often it is skipped.",
            )
            for name, lane in zip(names, found.lanes, strict=True)
        ],
        maps=[
            _picture(_skip_map(lane, found.model), f"{name}: the skip map of the first window that was timed.", "png")
            for name, lane in zip(names, lanes, strict=True)
            if lane.candidate.setting.kind != "dense"
        ],
    )  # fmt: skip


def _skip_map(lane: Lane, model: str) -> Figure:
    from dash_export.evaluate.pictures import layers_run, skip_map_figure

    tokens = lane.rounds[0][:MAP_TOKENS]
    actions = lane.actions(tokens)
    pieces = [lane.runtime.text.decode([token.token]) for token in tokens]
    heading = f"{model}: {label(lane.candidate.setting)}"
    return skip_map_figure(pieces, actions, lane.units, heading, layers_run(actions))


def _picture(figure: Figure, caption: str, kind: str = "svg") -> Picture:
    from dash_export.evaluate.pictures import render

    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return Picture(f"data:{media};base64,{base64.b64encode(render(figure, kind)).decode()}", caption)
