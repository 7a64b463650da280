"""Report files (pictures, figures, traces): written whole or not at all, and only over this program's own reports."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dash_export.bundle.layout import REPORT, check_outside_bundles
from dash_export.errors import RequestError
from dash_export.files.artifacts import open_regular, write_atomic
from dash_export.files.outputs import check_writable, locked
from dash_export.files.replacing import check_movable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEGINNING = 8192


def check_reports(*outputs: Path) -> None:
    """Check the outputs before anything is measured. Raises RequestError for a file that is no report of this
    program's, OutputError for a place in a bundle or a work folder.
    """
    for path in outputs:
        ours = not os.path.lexists(path)
        if not ours and not path.is_symlink():
            try:
                with open_regular(path) as file:
                    beginning = file.read(_BEGINNING)
                ours = REPORT.encode() in beginning or not beginning  # nothing is lost with an empty file
            except OSError:
                pass
        if not ours:
            raise RequestError(f"{path} exists and is no report of ours: it will not be overwritten. Choose another.")
        check_outside_bundles(path)


def save_report(path: Path, content: str | bytes) -> Path:
    """Write a report and return its path. Where `path` has meanwhile become a file that is no report of this program's,
    write to a free name beside it: the content took minutes to measure.
    """
    free = path
    try:
        check_reports(path)
    except RequestError:
        names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
        free = next(name for name in names if not os.path.lexists(name))
        check_reports(free)
        click.echo(f"{path} is no report of ours any more: it is kept, and {free} is written.", err=True)
    try:
        free.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(free, content)
    except OSError as error:  # name the file: a command writes several
        error.filename = error.filename or str(free)
        raise
    return free


@contextmanager
def sole_writer(ctx: click.Context, *files: Path) -> Iterator[None]:
    """Hold the locks of the files from before the command measures until it has written them. Raises RequestError like
    `check_reports`, before any lock file is made, BusyError where another process holds one, and OutputError where a
    file could not be replaced in the end.
    """
    check_reports(*files)
    with ExitStack() as stack:
        for path in files:
            stack.enter_context(locked(path, str(ctx.info_name)))
            check_writable(path.absolute().parent)
            check_movable(path)
        yield


def picture_files(output: Path) -> tuple[Path, ...]:
    """Return NAME.png, NAME.svg and NAME.json. Raises RequestError where NAME is no file's name."""
    base = output.with_suffix("") if output.suffix in (".png", ".svg", ".json") else output
    if base.name in ("", ".."):
        raise RequestError(f"{output} is a folder: give -o a name for the pictures in it, like {output / 'NAME'}.")
    return tuple(base.with_name(f"{base.name}.{kind}") for kind in ("png", "svg", "json"))


def save_pictures(files: Sequence[Path], figure: Figure) -> list[Path]:
    """Write the figure to those files that are pictures by their ending (.png, .svg), and return their paths."""
    from dash_export.measure.pictures import render

    return [save_report(path, render(figure, path.suffix[1:])) for path in files if path.suffix in (".png", ".svg")]
