"""What the decode loop asks of a backend: load an engine, bind it to fixed memory once, launch it again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from traceback import walk_tb
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy.typing as npt

from dash_export.errors import BackendError

_P = ParamSpec("_P")
_T = TypeVar("_T")

Launch = Callable[[], None]
"""Runs one engine on the memory it was bound to; returns when its outputs are there (CPU) or it is enqueued (CUDA)."""


class Engine(Protocol):
    """A loaded engine, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        """Fix the addresses of every input and output. An output may share its input's memory (KV cache)."""
        ...


class Backend(Protocol):
    def load(self, path: Path) -> Engine:
        """Load an engine file; the same file is loaded once. Raises BackendError when the backend refuses it."""
        ...


def backend_errors(step: Callable[_P, _T]) -> Callable[_P, _T]:
    """`step`, in which what a launch raises becomes a BackendError that names the engine.

    A launch is a C call that has no frame: which one it was says the local `launch` of the frame that the error comes
    from. So the loops over launches pay nothing for it, and what a rule of the caller's raises stays as it is.
    """

    @wraps(step)
    def guarded(*args: _P.args, **named: _P.kwargs) -> _T:
        try:
            return step(*args, **named)
        except Exception as error:
            *_, (frame, _) = walk_tb(error.__traceback__)
            engine = getattr(frame.f_locals.get("launch"), "engine", None)
            if engine is None:
                raise
            raise BackendError(
                f"{engine} failed ({error}). Where memory ran out, free some or use a shorter context; otherwise build "
                "the target again with this version."
            ) from error

    return guarded
