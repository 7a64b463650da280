"""Frontier and skip map as figures (matplotlib, extra `profile`): white paper, Okabe-Ito colours, no pyplot state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dash_export.decision import Action, Unit
from dash_export.names import REPORT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dash_export.evaluation.frontier import Point

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # names of files, bundles and tokens may hold a dollar sign
    "svg.hashsalt": "dash-export",
    "svg.fonttype": "path",
}
# Colours that stay apart for colour-blind eyes (Okabe and Ito); the marker says it again for a printer without colours.
LOOKS = {"dense": ("#000000", "*"), "static": ("#0072B2", "s"), "token": ("#D55E00", "o")}
OTHER_LOOKS = (("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P"), ("#999999", "X"))
"""Of other builds, one after the other."""
RUN, SKIP, ALWAYS = "#9ecae1", "#D55E00", "#e3e3e3"
DPI = 200


def frontier_figure(points: Sequence[Point], title: str, caption: str) -> Figure:
    """KL and perplexity against decode time: a curve per kind, a mark per other build; bars are 95 % intervals."""
    names = list(dict.fromkeys(point.name for point in points))
    others = [name for name in names if name not in LOOKS]
    looks = LOOKS | {name: OTHER_LOOKS[at % len(OTHER_LOOKS)] for at, name in enumerate(others)}
    with matplotlib.rc_context(STYLE):
        rows = -(-len(names) // 4)
        figure = Figure(figsize=(9.2, 4.4 + 0.3 * rows), layout="constrained")
        axes_of: dict[str, Axes] = figure.subplot_mosaic(
            [["legend", "legend"], ["kl", "perplexity"]], height_ratios=[0.3 * rows, 4.0]
        )
        left, right, legend = axes_of["kl"], axes_of["perplexity"], axes_of["legend"]
        legend.set_axis_off()
        handles: dict[str, Any] = {}
        for name in names:
            curve = sorted((point for point in points if point.name == name), key=lambda point: point.time)
            for axes, figure_name in ((left, "kl"), (right, "perplexity")):
                handles[name] = _curve(axes, curve, looks[name], figure_name)
        measured = all(point.timing is not None for point in points)
        for axes, name in ((left, "KL from dense (nats per token)"), (right, "perplexity")):
            axes.set_xlabel(f"decode time per token, fraction of dense ({'measured' if measured else 'predicted'})")
            axes.set_ylabel(name)
        left.set_ylim(bottom=0)
        _dense_line(right, points)
        figure.suptitle(title, fontsize=10, fontweight="bold")
        # In a place of its own: no corner of the panels is sure to be empty.
        legend.legend(handles.values(), handles.keys(), loc="center", ncols=4, fontsize=9)
        figure.supxlabel(caption, fontsize=7, color="#555555")
    return figure


def _curve(axes: Axes, curve: Sequence[Point], look: tuple[str, str], name: str) -> Any:
    (colour, marker), dense = look, curve[0].name == "dense"
    figures = [getattr(point.quality, name) for point in curve]
    x, y = [point.time for point in curve], [figure.value for figure in figures]
    across = up = None
    if all(point.timing is not None for point in curve) and not dense:
        sides = [(p.time - p.timing.low, p.timing.high - p.time) for p in curve if p.timing is not None]
        across = np.maximum(np.array(sides).T, 0)
    # The spread between windows is the same for every kind in perplexity: bars there would only hide the curves.
    if name == "kl" and not dense:
        up = np.maximum(np.array([(f.value - f.low, f.high - f.value) for f in figures]).T, 0)
    drawn = axes.errorbar(
        x, y, yerr=up, xerr=across, color=colour, marker=marker, markersize=10 if dense else 5, linewidth=1.4,
        elinewidth=0.8, capsize=2, zorder=3 if curve[0].name == "token" else 2, clip_on=False,
    )  # fmt: skip
    return drawn.lines[0]


def _dense_line(axes: Axes, points: Sequence[Point]) -> None:
    """Dense perplexity and 5 % above it, the distance one reads by."""
    dense = next((p.quality.perplexity.value for p in points if p.name == "dense"), None)
    if dense is None:
        return
    for value, text, side in ((dense, "dense", "top"), (1.05 * dense, "dense + 5 %", "bottom")):
        axes.axhline(value, color="#777777", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            text, (0.0, value), xycoords=("axes fraction", "data"), xytext=(3, -2 if side == "top" else 2),
            textcoords="offset points", va=side, fontsize=7, color="#555555",
        )  # fmt: skip


def skip_map_figure(
    tokens: Sequence[str], actions: npt.NDArray[np.int8], units: Sequence[Unit], title: str, caption: str
) -> Figure:
    """Tokens down with their text, layers across; actions int8 [tokens, layers]. On top the share of tokens that skip
    each unit's layers, at the side the layers each token runs.
    """
    count, layers = actions.shape
    colours = {"run": RUN, "skip": SKIP, "always runs": ALWAYS}
    gated = [layer for unit in units for layer in unit.layers]
    shown = np.where(actions == Action.SKIP, 1, np.where(np.isin(np.arange(layers), gated), 0, 2)[None])
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        width, height = 2.6 + 0.19 * layers, 1.9 + 0.16 * count
        figure = Figure(figsize=(width, height), layout="constrained")
        ratios = {"width_ratios": [0.19 * layers, 1.1], "height_ratios": [0.7, 0.16 * count]}
        grid = figure.subplots(2, 2, gridspec_kw=ratios)
        top, corner, heat, side = grid[0, 0], grid[0, 1], grid[1, 0], grid[1, 1]
        corner.set_axis_off()
        heat.imshow(
            shown, aspect="auto", cmap=ListedColormap(list(colours.values())), vmin=0, vmax=2, interpolation="none"
        )
        heat.set_xticks(np.arange(layers + 1) - 0.5, minor=True)
        heat.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        heat.grid(which="minor", color="white", linewidth=0.6)
        heat.tick_params(which="both", length=0)
        heat.spines[:].set_visible(False)
        heat.set_yticks(range(count), [visible(token) for token in tokens], fontsize=7, family="monospace")
        step = 1 if layers <= 40 else 5
        heat.set_xticks(range(0, layers, step), [str(layer) for layer in range(0, layers, step)], fontsize=6)
        heat.set_xlabel("layer", fontsize=8)
        top.bar(range(layers), 100 * (actions == Action.SKIP).mean(axis=0), color=SKIP, width=0.8)
        top.set_xlim(-0.5, layers - 0.5)
        top.set_ylim(0, 100)
        top.set_yticks([0, 50, 100], ["0", "50", "100 %"], fontsize=6)
        top.set_xticks([])
        top.set_ylabel("tokens\nskipping", fontsize=7)
        ran = layers - (actions == Action.SKIP).sum(axis=1)
        side.barh(range(count), ran, color="#555555", height=0.8)
        side.set_ylim(count - 0.5, -0.5)
        side.set_xlim(0, layers)
        side.set_yticks([])
        side.set_xticks([0, layers], ["0", str(layers)], fontsize=6)
        side.set_xlabel("layers run", fontsize=7)
        figure.suptitle(f"{title}\n{caption}", fontsize=9)
        legend = [Patch(color=colour, label=name) for name, colour in colours.items()]
        corner.legend(handles=legend, loc="center", fontsize=7)
    return figure


def visible(token: str, longest: int = 14) -> str:
    """A token's text on one line: spaces at its ends and line breaks as signs, nothing that cannot be printed."""
    text = token.replace("\n", "↵").replace("\t", "→").replace("\r", "")
    if text.startswith(" "):
        text = f"␣{text[1:]}"
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def render(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": REPORT} if kind == "svg" else {"Software": REPORT}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token of a script the font lacks
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata, facecolor="white")
    return buffer.getvalue()
