"""Plain text that a user gives: to learn from, to measure on, to answer."""

from __future__ import annotations

from pathlib import Path

from dash_export.artifacts import read_bounded
from dash_export.errors import RequestError

MAX_BYTES = 1 << 30


def bounded_text(path: Path, limit: int) -> str:
    """A regular UTF-8 file of at most `limit` bytes, its line ends as `\\n`. Raises OSError and UnicodeDecodeError."""
    return read_bounded(path, limit).decode().replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, *, pipe: bool = False) -> str:
    """A UTF-8 text file of at most MAX_BYTES; `pipe`: or what a shell's `<(command)` says. Raises RequestError."""
    try:
        return path.read_text(encoding="utf-8") if pipe and path.is_fifo() else bounded_text(path, MAX_BYTES)
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}). Give a plain text file."
        ) from error
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RequestError(f"There is no text file {path}.") from error
    except (OSError, ValueError) as error:  # a NUL byte in the name
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
