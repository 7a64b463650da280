"""Progress of long work: a bar on a terminal, plain lines elsewhere; on stderr, so stdout holds only the result."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from dash_export.artifacts import Progress

PLAIN_LINES = 10
"""Lines that a measured step prints where there is no terminal; but a long one prints one every MINUTE."""
MINUTE = 60.0


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
    last, said = (0, 0), time.monotonic()
    first, before = (0, said), 0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last, said, first, before
        with lock:
            now = time.monotonic()
            part = (total, done * PLAIN_LINES // total if total else 0)
            if total != last[0] or done < before:  # other work, or the same once more
                first = (done, now)
            before = done
            if total == 0 or (done and (part != last or now - said >= MINUTE)):
                shown = f" ({done}/{total}{_left(done, total, *first, now)})" if total else ""
                click.echo(f"{title}: {name}{shown}", err=True)
                said = now
            last = part

    yield progress


def _left(done: int, total: int, first: int, began: float, now: float) -> str:
    """Minutes left, of what goes on for minutes, at the pace since it began (or was resumed)."""
    if now - began < MINUTE or done <= first:
        return ""
    minutes = (now - began) / (done - first) * (total - done) / 60
    return f", {minutes:.0f} minutes left"
