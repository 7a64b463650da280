"""Progress of long work: a bar on a terminal, plain lines elsewhere; on stderr, so stdout holds only the result."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from dash_export.artifacts import Progress

PLAIN_LINES = 10
"""Lines that a step of known length prints where there is no terminal; a slow step also prints one every MINUTE."""
MINUTE, PERIOD = 60.0, 1800.0
"""Seconds. A bar's time left is estimated from the last PERIOD: a step may take minutes."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Yield the progress callback for the library."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (*Bar.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    with Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=PERIOD) as bar:
        task = bar.add_task(title, total=None)
        yield lambda name, done, total: bar.update(
            task, description=f"{title}: {name}", completed=done, total=total or None
        )


def _lines(title: str) -> Progress:
    last, said = (0, 0), time.monotonic()
    began, base, before, seen = said, 0, (0, 0), said

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last, said, began, base, before, seen
        now = time.monotonic()
        if total != before[1] or done < before[0]:  # other work: its first step, or that of a resumed one, began then
            began, base = seen, done - 1
        before, seen = (done, total), now
        left = (now - began) * (total - done) / max(1, done - base)
        part = (total, done * PLAIN_LINES // total if total else 0)
        if total == 0 or (done and (part != last or now - said >= MINUTE)):
            until = f", {left / MINUTE:.0f} minutes left" if left >= 1.5 * MINUTE else ""
            with suppress(OSError):  # a full disk under the log must not end work of hours
                click.echo(f"{title}: {name}" + (f" ({done}/{total}{until})" if total else ""), err=True)
            said = now
        last = part

    return progress
