"""The report's figures (matplotlib, extra `profile`): on white paper, Okabe-Ito colours, readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dash_export.evaluation.pictures import LOOKS, OTHER_LOOKS, STYLE
from dash_export.manifest import Build
from dash_export.profiling.results import PARTS, LaneProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    "always": ("#999999", ""),
    "run": ("#0072B2", ""),
    "bypass": ("#D55E00", "//"),
    "deciding": ("#009E73", ".."),
    "sampling": ("#CC79A7", "\\\\"),
    "host": ("#000000", ""),
}
_DASHES = ("-", "--", ":", "-.")
WIDTH = 9.2


def breakdown_figure(lanes: Sequence[LaneProfile], names: Sequence[str]) -> Figure:
    """One bar per lane: mean milliseconds per token, part by part; a diamond is the mean of tokens without a probe."""
    with matplotlib.rc_context(STYLE | {"hatch.linewidth": 0.6}):
        figure = Figure(figsize=(WIDTH, 1.7 + 0.45 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(lanes))
        left = np.zeros(len(lanes))
        for part, meaning in PARTS.items():
            widths = np.array([lane.parts[part].mean for lane in lanes]) / 1e3
            if widths.any():
                colour, hatch = _COLOURS[part]
                axes.barh(
                    rows, widths, left=left, height=0.62, color=colour, hatch=hatch, label=meaning, edgecolor="white",
                    linewidth=0.4,
                )  # fmt: skip
            left += widths
        bare = [lane.token_ms.mean for lane in lanes]
        axes.plot(bare, rows, "D", color="white", markeredgecolor="black", markersize=5, label="without timed launches")
        for row, total in enumerate(left):
            axes.annotate(
                f"{total:.2f} ms", (max(total, bare[row]), row), xytext=(7, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
        _lane_axis(axes, names)
        axes.set_xlim(0, 1.12 * max([*left.tolist(), *bare]))
        axes.set_xlabel("milliseconds per token, mean")
        figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _lane_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")


def _look(lane: LaneProfile, lanes: Sequence[LaneProfile]) -> tuple[str, str]:
    """Colour and marker: of a kind, or of another build."""
    others = [other.build for other in lanes if other.build]
    return OTHER_LOOKS[others.index(lane.build) % len(OTHER_LOOKS)] if lane.build else LOOKS[lane.setting.kind]


def distribution_figure(lanes: Sequence[LaneProfile], names: Sequence[str]) -> Figure:
    """The share of tokens that took at most so long, one curve per lane; marks at p50, p90 and p99."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4 + 0.1 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        handles = []
        for number, lane in enumerate(lanes):
            colour, marker = _look(lane, lanes)
            again = sum(_look(other, lanes) == (colour, marker) for other in lanes[:number])
            look: dict[str, Any] = {
                "color": colour, "marker": marker, "markerfacecolor": "white" if again % 2 else colour, "markersize": 6,
                "linestyle": _DASHES[again % len(_DASHES)], "linewidth": 1.3,
            }  # fmt: skip
            handles.append(Line2D([], [], **look))
            times = np.sort(lane.samples_ms)
            axes.step(
                times, 100 * np.arange(1, len(times) + 1) / len(times), where="post",
                **look | {"marker": ""},
            )  # fmt: skip
            marks = lane.token_ms
            axes.plot(
                [marks.p50, marks.p90, marks.p99], [50, 90, 99], **look | {"linestyle": "none"}, clip_on=False
            )  # fmt: skip
        # The axis ends where the slowest lane's p99 is; what lies beyond is counted, not hidden.
        right = 1.15 * max(lane.token_ms.p99 for lane in lanes)
        axes.set_xlim(0, right)
        beyond = sum(int((np.array(lane.samples_ms) > right).sum()) for lane in lanes)
        axes.set_ylim(0, 100)
        axes.set_yticks([0, 25, 50, 75, 90, 99])
        axes.set_xlabel("milliseconds per token" + (f" (off the axis: {beyond} of the tokens)" if beyond else ""))
        axes.set_ylabel("% of tokens at or below")
        figure.legend(
            handles, names, loc="outside upper center", ncols=3, fontsize=8,
            title="marks at p50, p90, p99", title_fontsize=7, handlelength=3.5,
        )  # fmt: skip
    return figure


def segments_figure(lane: LaneProfile, dense: LaneProfile) -> Figure:
    """What each segment adds to a token (its mean times how often), run and bypass; a tick is dense's."""
    with matplotlib.rc_context(STYLE | {"hatch.linewidth": 0.6}):
        figure = Figure(
            figsize=(WIDTH, 4.2 if any(row.skipped for row in lane.segments) else 3.2), layout="constrained"
        )
        skips = any(row.skipped for row in lane.segments)
        share, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3.2]) if skips else (None, figure.subplots())
        rows = np.arange(len(lane.segments))
        run = np.array([(1 - row.skipped) * (row.run.mean if row.run else 0.0) for row in lane.segments])
        bypass = np.array([row.skipped * (row.bypass.mean if row.bypass else 0.0) for row in lane.segments])
        bottom = np.zeros(len(rows))
        for part, heights in (("run", run), ("bypass", bypass)):
            if heights.any():
                colour, hatch = _COLOURS[part]
                axes.bar(
                    rows, heights, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4,
                    label=part,
                )  # fmt: skip
            bottom += heights
        if lane is not dense:
            full = [row.run.mean if row.run else 0.0 for row in dense.segments]
            if not lane.build:
                axes.plot(rows, full, "_", color="black", markersize=9, markeredgewidth=1.5, label="dense")
        axes.set_ylabel("µs per token, mean")
        axes.set_xticks(rows, [row.name for row in lane.segments], rotation=90, fontsize=7)
        axes.grid(False, axis="x")
        axes.set_xlim(-0.7, len(rows) - 0.3)
        if share is not None:
            share.bar(rows, [100 * row.skipped for row in lane.segments], color=_COLOURS["bypass"][0])
            share.set_ylim(0, 100)
            share.set_ylabel("% of tokens\nskipping")
            share.grid(False, axis="x")
        figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def dial_figure(lanes: Sequence[LaneProfile], names: Sequence[str], build: Build) -> Figure:
    """The build's calibrated dial, divergence against decode time, and where each lane came out on the clock."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8 + 0.1 * len(lanes)), layout="constrained")
        axes = figure.subplots()
        colour, marker = LOOKS["token"]
        curve = sorted(build.dial, key=lambda point: -point.time)
        axes.plot(
            [point.time for point in curve], [point.kl for point in curve], color=colour, marker=marker,
            markersize=3.5, linewidth=1, label="token: the build's dial (predicted)",
        )  # fmt: skip
        for number, (lane, name) in enumerate(zip(lanes, names, strict=True)):
            colour, marker = _look(lane, lanes)
            where = lane.ratio
            kl = _dial_kl(lane, build)
            if kl is None:
                style = _DASHES[number % len(_DASHES)]
                axes.axvline(where.value, color=colour, linestyle=style, linewidth=1, label=f"{name}: measured time")
                continue
            bars = [[max(0.0, where.value - where.low)], [max(0.0, where.high - where.value)]]
            axes.errorbar(
                [where.value], [kl], xerr=bars, color=colour, marker=marker, markersize=9, markeredgecolor="black",
                capsize=3, linestyle="none", label=f"{name}: measured time", zorder=4, clip_on=False,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("decode time per token, fraction of dense")
        axes.set_ylabel("KL from dense on the\ncalibration text (nats per token)")
        figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _dial_kl(lane: LaneProfile, build: Build) -> float | None:
    """What the dial says of a token lane's divergence, at the layers it ran; None for others but dense."""
    if lane.build or lane.setting.kind == "static":
        return None
    if lane.setting.kind == "dense":
        return 0.0
    points = sorted(build.dial, key=lambda point: point.layers)
    return float(np.interp(lane.layers.mean, [point.layers for point in points], [point.kl for point in points]))
