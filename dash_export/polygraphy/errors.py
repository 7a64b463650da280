"""Our errors in Polygraphy's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polygraphy.logger import G_LOGGER

from dash_export.errors import DashError


@contextmanager
def told_by_polygraphy() -> Iterator[None]:
    """A DashError ends `polygraphy run` with its message and exit code 1, without a traceback."""
    try:
        yield
    except DashError as error:
        G_LOGGER.critical(str(error))
