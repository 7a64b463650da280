"""NVIDIA Polygraphy's `polygraphy run`, taught to run bundles: `--dash` compares and times engines and whole steps.

`plugin` is what Polygraphy loads; `runners` run a bundle and feed it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dash_export.errors import DashError


@contextmanager
def polygraphy_errors() -> Iterator[None]:
    """Let a DashError end `polygraphy run` with its message and exit code 1, without a traceback."""
    from polygraphy.logger import G_LOGGER

    try:
        yield
    except DashError as error:
        G_LOGGER.critical(str(error))
    except ModuleNotFoundError as error:
        G_LOGGER.critical(f"This needs {error.name}. Run: pip install 'dash-export[export]'")
