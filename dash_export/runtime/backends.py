"""Backends: each loads engine files and makes them runnable. One module per backend; the recipe's `backend` names it.

A host backend loads an engine, binds it to fixed memory once, and launches it again and again. A GPU backend is a
`Device` (device/base.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy.typing as npt

from dash_export.errors import BackendError
from dash_export.runtime.device.base import Device

_P = ParamSpec("_P")
_T = TypeVar("_T")

# backend -> (module that implements it, package it needs, extra that installs it)
BACKENDS = {
    "onnxruntime": ("dash_export.runtime.ort_engine", "onnxruntime", "cpu"),
    "onnxruntime_cuda": ("dash_export.runtime.device.onnxruntime_cuda", "onnxruntime", "gpu"),
    "tensorrt": ("dash_export.runtime.device.tensorrt", "tensorrt", "tensorrt"),
    "tensorrt_rtx": ("dash_export.runtime.device.tensorrt_rtx", "tensorrt_rtx", "rtx"),
}
Launch = Callable[[], None]
"""Run one engine on the memory it was bound to. The call returns when the outputs are there (CPU) or when the work is
enqueued (CUDA).
"""


class Engine(Protocol):
    """A loaded engine, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        """Fix the addresses of every input and output. An output may share its input's memory (KV cache)."""
        ...


class Backend(Protocol):
    def load(self, path: Path) -> Engine:
        """Load an engine file; each file is loaded only once. Raises BackendError when the backend refuses the file."""
        ...


def require_backend(name: str) -> None:
    """Raise BackendError that names the extra to install when the backend's package is not installed."""
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r} in this version. Known: {', '.join(BACKENDS)}.")
    _, package, extra = BACKENDS[name]
    if find_spec(package) is None:
        raise BackendError(
            f"The backend {name!r} is not installed on this machine. Run: pip install 'dash-export[{extra}]'"
        )


def load_backend(name: str, threads: int) -> Backend | Device:
    """Import and start a backend; for GPU targets it is a Device. Raises BackendError that names the missing package or
    device.
    """
    require_backend(name)
    module = BACKENDS[name][0]
    return import_module(module).create(threads)  # type: ignore[no-any-return]


def backend_errors(step: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return `step` wrapped so that an error from a launch becomes a BackendError that names the engine.

    A launch is a C call without a Python frame, so the last frame of the traceback is its caller's, whose local
    variable `launch` tells the engine. Loops over launches pay nothing for this. An error of the caller's rule comes
    from a frame without `launch` and stays as it is.
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
