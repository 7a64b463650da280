"""Pictures: drawn without a display, the same bytes every time, whatever a token says."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from dash_export.core.units import Unit
from dash_export.measure.exchange import Point
from tests.measure.test_exchange import point

pytest.importorskip("matplotlib", reason="matplotlib comes with the extra 'profile'")
from dash_export.measure.pictures import frontier_figure, render, skip_map_figure, visible


def points(*builds: str) -> list[Point]:
    kinds = (
        ("dense", 1.0, 0.0),
        ("static", 0.95, 0.3),
        ("static", 0.9, 0.5),
        ("token", 0.96, 0.1),
        ("token", 0.91, 0.2),
    )
    own = [point(kind, time, kl, spread=0.2) for kind, time, kl in kinds]
    return own + [point("dense", 0.8, 0.4, spread=0.2, build=build) for build in builds]


def texts(figure: object) -> list[str]:
    """Every text of a figure."""
    return [text.get_text() for text in figure.findobj(lambda item: hasattr(item, "get_text"))]  # type: ignore[attr-defined]


def test_bytes_are_the_same_every_time() -> None:
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        one, other = (render(frontier_figure(points("other"), "t", "c"), kind) for _ in range(2))
        assert one == other
        assert one.startswith(begins)


def test_skip_map_of_hostile_tokens() -> None:
    tokens = ["$x_1$", " $", "\n", "\x1b[31m", "漢字", "<&>", "\\frac{", " a very long token indeed", ""]
    actions = np.zeros((len(tokens), 5), np.int8)
    actions[::2, 2:4] = 1
    figure = skip_map_figure(tokens, actions, (Unit(2, 3),), "model $y^: token")
    assert render(figure, "png").startswith(b"\x89PNG")
    ET.fromstring(render(figure, "svg"))
    heat = next(axes for axes in figure.axes if axes.get_xlabel() == "layer")
    # 0 runs, 1 is skipped, 2 is never asked.
    np.testing.assert_array_equal(heat.collections[0].get_array()[0], [2, 2, 1, 1, 2])
    labels = [label.get_text() for label in heat.get_yticklabels()]
    assert labels[:4] == ["$x_1$", "␣$", "↵", "�[31m"]
    assert "skip" in texts(figure)


def test_visible() -> None:
    assert visible(" a") == "␣a"
    assert visible("a\nb\tc") == "a↵b→c"
    assert visible("x" * 40) == f"{'x' * 13}…"


def test_a_backend_of_another_environment() -> None:
    """Notebooks set MPLBACKEND for the commands in their cells, to one that need not be installed where we are."""
    environment = os.environ | {"MPLBACKEND": "module://not_installed_here"}
    subprocess.run([sys.executable, "-c", "import dash_export.measure.pictures"], env=environment, check=True)
