"""A picture on disk: PNG and SVG (and the figures behind them), written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dash_export.commands.common import check_reports, save_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_base(output: Path) -> Path:
    """`output` without the ending of a picture. Raises RequestError where that is no name of a file."""
    from dash_export.errors import RequestError

    base = output.with_suffix("") if output.suffix in (".png", ".svg", ".json") else output
    if base.name in ("", ".."):
        raise RequestError(f"{output} is a folder: give -o a name for the pictures in it, like {output / 'NAME'}.")
    return base


@contextmanager
def sole_writer(command: str, *outputs: Path | None) -> Iterator[None]:
    """Hold the outputs for one command, from before it measures to what it writes at the end. Raises BusyError."""
    from dash_export.outputs import locked

    with ExitStack() as stack:
        for output in filter(None, outputs):
            stack.enter_context(locked(picture_base(output), command))
        yield


def check_pictures(output: Path, *, report: bool) -> None:
    """Before anything is measured: raises RequestError where `save_pictures` would write over what is not ours."""
    base = picture_base(output)
    kinds = ("png", "svg", "json") if report else ("png", "svg")
    check_reports(*(base.with_name(f"{base.name}.{kind}") for kind in kinds))


def save_pictures(output: Path, figure: Figure, report: str | None = None) -> list[Path]:
    """`output` names the files without their endings; one given is dropped. Returns the files written."""
    from dash_export.evaluate.pictures import render

    base = picture_base(output)
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    if report is not None:  # first: it cannot be drawn anew
        written.append(save_report(base.with_name(f"{base.name}.json"), report + "\n"))
    for kind in ("png", "svg"):
        written.append(save_report(base.with_name(f"{base.name}.{kind}"), render(figure, kind)))
    return written
