"""Progress of long work: a bar on a terminal, plain lines elsewhere; on stderr, so stdout holds only the result."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from dash_export.artifacts import Progress

PLAIN_LINES = 10
"""How many lines a measured step prints where there is no terminal."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Yields the callback for the library. Calls may come from several threads."""
    with _bar(title) if sys.stderr.isatty() else _lines(title) as progress:
        yield progress


@contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def progress(name: str, done: int, total: int) -> None:
            bar.update(task, description=f"{title}: {name}", completed=done, total=total or None)

        yield progress


@contextmanager
def _lines(title: str) -> Iterator[Progress]:
    lock = threading.Lock()
    last = (0, 0)

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last
        with lock:
            part = (total, done * PLAIN_LINES // total if total else 0)
            if total == 0 or (part != last and done):
                click.echo(f"{title}: {name}" + (f" ({done}/{total})" if total else ""), err=True)
            last = part

    yield progress
