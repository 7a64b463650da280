"""Plain text that a user gives: to learn from, to measure on, to answer."""

from __future__ import annotations

from pathlib import Path

from dash_export.errors import RequestError


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises RequestError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Give a plain text file."
        ) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RequestError(f"There is no text file {path}.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from error
