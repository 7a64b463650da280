"""Pictures of a frontier, a skip map and a profile (matplotlib, extra `profile`).

White paper, Okabe-Ito colours, readable without colour, no pyplot state.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

os.environ["MPLBACKEND"] = "agg"  # a notebook's own, not installed here, breaks the import

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dash_export.bundle.layout import REPORT
from dash_export.core.units import Action, Actions, Unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dash_export.measure.exchange import Point
    from dash_export.measure.image_quality import ImageQuality

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # names of files, bundles and tokens may hold a dollar sign
    "svg.hashsalt": "dash-export",
    "svg.fonttype": "path",
}
# Colours that colour-blind people can tell apart (Okabe and Ito); the markers tell the same without colours.
LOOKS = {"dense": ("#000000", "*"), "static": ("#0072B2", "s"), "token": ("#D55E00", "o")}
OTHER_LOOKS = (("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P"), ("#999999", "X"))
"""Colours and markers of other builds, given out in this order."""
RUN, SKIP, ALWAYS = "#9ecae1", "#D55E00", "#e3e3e3"
PART_LOOKS = {
    "always": ("#999999", ""),
    "run": ("#0072B2", ""),
    "bypass": ("#D55E00", "//"),
    "deciding": ("#009E73", ".."),
    "sampling": ("#CC79A7", "\\\\"),
    "host": ("#000000", ""),
}
WIDTH = 9.2


def render(figure: Figure, kind: str) -> bytes:
    """Return the figure as `png` or `svg`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": REPORT} if kind == "svg" else {"Software": REPORT}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token of a script the font lacks
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, facecolor="white")
    return buffer.getvalue()


def _looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    others = dict.fromkeys(name for name in names if name not in LOOKS)
    return LOOKS | {name: OTHER_LOOKS[at % len(OTHER_LOOKS)] for at, name in enumerate(others)}


@matplotlib.rc_context(STYLE)
def frontier_figure(points: Sequence[Point], title: str, caption: str) -> Figure:
    """Draw KL and perplexity against decode time: a curve per kind, a mark per other build; bars are 95 % intervals."""
    names = list(dict.fromkeys(point.name for point in points))
    how = "measured" if all(point.timing for point in points) else "predicted"
    figure = Figure(figsize=(WIDTH, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, measure in ((left, "kl"), (right, "perplexity")):
        for name, look in _looks(names).items():
            curve = sorted((point for point in points if point.name == name), key=lambda point: point.time)
            if curve:
                _curve(axes, curve, look, measure)
        axes.set_xlabel(f"decode time per token, fraction of dense ({how})")
    left.set_ylim(bottom=0)
    left.set_ylabel("KL from dense (nats per token)")
    dense = points[0].quality.figures["perplexity"].value
    right.axhline(1.05 * dense, color="#777777", linewidth=0.8, linestyle="--", label="dense + 5 %", zorder=1)
    right.set_ylabel("perplexity")
    # Outside: no corner of the panels is sure to be empty.
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside upper center", ncols=4, title=title, title_fontsize=10
    )
    figure.supxlabel(caption, fontsize=7, color="#555555")
    return figure


@matplotlib.rc_context(STYLE)
def image_figure(rows: Sequence[ImageQuality], title: str) -> Figure:
    """Draw 1 - cosine, mean and worst, against time on the clock: a curve per kind."""
    names = list(dict.fromkeys(row.setting.kind for row in rows[1:]))
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("cosine", "worst"), strict=True):
        for name in names:
            colour, mark = _looks(names)[name]
            curve = sorted((row for row in rows if row.setting.kind == name), key=lambda row: row.time)
            lost = [1 - getattr(row, measure) for row in curve]
            axes.plot([row.time for row in curve], lost, color=colour, marker=mark, markersize=5, label=name)
        axes.plot([1.0], [0.0], color="#333333", marker="*", markersize=10, linestyle="", label="dense", clip_on=False)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("time per picture, fraction of dense (measured)")
        axes.set_ylabel(f"1 - cosine, {'mean' if measure == 'cosine' else 'worst picture'}")
    axes.legend(title=title, title_fontsize=8)
    return figure


def _curve(axes: Axes, curve: Sequence[Point], look: tuple[str, str], measure: str) -> None:
    figures = [point.quality.figures[measure] for point in curve]
    bars: dict[str, Any] = {}
    dense = curve[0].name == "dense"
    timings = [point.timing for point in curve if point.timing is not None]
    if timings and not dense:
        bars["xerr"] = np.maximum([(t.ratio - t.low, t.high - t.ratio) for t in timings], 0).T
    # The spread between windows is the same for every kind in perplexity: bars there would only hide the curves.
    if measure == "kl" and not dense:
        bars["yerr"] = np.maximum([(f.value - f.low, f.high - f.value) for f in figures], 0).T
    axes.errorbar(
        [point.time for point in curve], [figure.value for figure in figures], **bars, color=look[0], marker=look[1],
        markersize=10 if dense else 5, linewidth=1.4, elinewidth=0.8, capsize=2, clip_on=False, label=curve[0].name,
        zorder=3 if curve[0].name == "token" else 2,
    )  # fmt: skip


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def skip_map_figure(tokens: Sequence[str], actions: Actions, units: Sequence[Unit], title: str) -> Figure:
    """Draw a skip map, actions [tokens, layers]: tokens down with their text, layers across. On top is the share of
    tokens that skip each layer, at the side the number of layers that each token runs.
    """
    count, layers = actions.shape
    colours = {"run": RUN, "skip": SKIP, "always runs": ALWAYS}
    gated = [layer for unit in units for layer in unit.layers]
    skips = actions == Action.SKIP
    shown = np.where(skips, 1, np.where(np.isin(np.arange(layers), gated), 0, 2)[None])
    figure = Figure(figsize=(2.6 + 0.19 * layers, 1.9 + 0.16 * count), layout="constrained")
    ratios = {"width_ratios": [0.19 * layers, 1.1], "height_ratios": [0.7, 0.16 * count]}
    (top, corner), (heat, side) = figure.subplots(2, 2, gridspec_kw=ratios)
    corner.set_axis_off()
    edges = {"edgecolors": "white", "linewidth": 0.6}
    heat.pcolormesh(shown, cmap=ListedColormap(list(colours.values())), vmin=0, vmax=2, **edges)
    heat.invert_yaxis()
    heat.tick_params(length=0)
    heat.spines[:].set_visible(False)
    heat.set_yticks(np.arange(count) + 0.5, [visible(token) for token in tokens], fontsize=7, family="monospace")
    step = 1 if layers <= 40 else 5
    heat.set_xticks(np.arange(0, layers, step) + 0.5, [str(at) for at in range(0, layers, step)], fontsize=6)
    heat.set_xlabel("layer", fontsize=8)
    top.bar(range(layers), 100 * skips.mean(axis=0), color=SKIP, width=0.8)
    top.set(xlim=(-0.5, layers - 0.5), ylim=(0, 100), xticks=[])
    top.set_yticks([0, 50, 100], ["0", "50", "100 %"], fontsize=6)
    top.set_ylabel("tokens\nskipping", fontsize=7)
    side.barh(range(count), layers - skips.sum(axis=1), color="#555555", height=0.8)
    side.set(xlim=(0, layers), ylim=(count - 0.5, -0.5), yticks=[])
    side.set_xticks([0, layers], ["0", str(layers)], fontsize=6)
    side.set_xlabel("layers run", fontsize=7)
    figure.suptitle(f"{title}\n{layers_run(actions)}", fontsize=9)
    legend = [Patch(color=colour, label=name) for name, colour in colours.items()]
    corner.legend(handles=legend, loc="center", fontsize=7)
    return figure


def layers_run(actions: Actions) -> str:
    """Return a sentence on the mean number of layers run in a skip map."""
    count, layers = actions.shape
    mean = (actions == Action.RUN).sum(axis=1).mean()
    return f"{mean:.1f} of {layers} layers run per token, mean over {count} tokens"


def visible(token: str, longest: int = 14) -> str:
    """Return a token's text on one line: signs for line breaks, tabs, a space in front and what cannot be printed."""
    text = token.replace("\n", "↵").replace("\t", "→").replace("\r", "")
    if text.startswith(" "):
        text = f"␣{text[1:]}"
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


@matplotlib.rc_context(STYLE)
def breakdown_figure(lanes: Sequence[dict[str, Any]], meanings: dict[str, str]) -> Figure:
    """Draw one bar per lane: mean milliseconds per token, part by part (`meanings`)."""
    figure = Figure(figsize=(WIDTH, 1.7 + 0.45 * len(lanes)), layout="constrained")
    axes, names, left = figure.subplots(), [lane["label"] for lane in lanes], np.zeros(len(lanes))
    for part, meaning in meanings.items():
        widths = np.array([lane["parts"][part]["mean"] for lane in lanes]) / 1e3
        colour, hatch = PART_LOOKS[part]
        axes.barh(names, widths, left=left, height=0.62, color=colour, hatch=hatch, label=meaning, edgecolor="white")
        left += widths
    for row, total in enumerate(left):
        axes.annotate(f" {total:.2f} ms", (total, row), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 1.12 * left.max())
    axes.set_xlabel("milliseconds per token, mean")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure
