"""Progress of long work: a bar on a terminal, plain lines elsewhere; on stderr, so stdout holds only the result."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import click

from dash_export.files.artifacts import Progress

PLAIN_LINES = 10
"""Lines that a step of known length prints where there is no terminal; slow work prints one every EVERY seconds."""
EVERY, PERIOD = 20.0, 1800.0
"""Seconds. A bar's time left is estimated from the last PERIOD: a step may take minutes."""


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Yield the progress callback for the library."""
    if not sys.stderr.isatty():
        with _lines(title) as progress:
            yield progress
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


@contextmanager
def _lines(title: str) -> Iterator[Progress]:
    last, said = (0, 0), time.monotonic()
    begun = (0, 0, said)  # total, done and time of a step's first report
    doing, ended = "", threading.Event()

    def tell(text: str) -> None:
        nonlocal said
        with suppress(OSError):  # a full disk under the log must not end work of hours
            click.echo(f"{title}: {text}", err=True)
        said = time.monotonic()

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last, begun, doing
        now = time.monotonic()
        if total != begun[0]:
            begun = total, done, now
        part = (total, done * PLAIN_LINES // total if total else 0)
        doing = name + (f" ({done}/{total})" if total else "")
        if total == 0 or (done and (part != last or now - said >= EVERY)):
            left = (now - begun[2]) / max(1, done - begun[1]) * (total - done)
            timed = f"{doing[:-1]}, about {_duration(left)} left)" if done > begun[1] and left > 5 else doing
            tell(timed)
        last = part

    def repeat() -> None:
        while not ended.wait(1.0):
            if doing and time.monotonic() - said >= EVERY - 1:
                tell(f"{doing}, still at it")

    repeater = threading.Thread(target=repeat, daemon=True)  # one step may take minutes
    repeater.start()
    try:
        yield progress
    finally:
        ended.set()
        repeater.join()


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
