"""Backends: each loads engine files and makes them runnable. One module per backend; the recipe's `backend` names it.

A host backend (ort_engine.py) loads an engine, binds it to fixed memory once, and launches it again and again. A GPU
backend is a `Cuda` (device/cuda.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from traceback import walk_tb
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from dash_export.errors import BackendError

if TYPE_CHECKING:
    from dash_export.backends.cuda.cuda import Cuda
    from dash_export.backends.onnxruntime.ort_engine import OrtBackend

_P = ParamSpec("_P")
_T = TypeVar("_T")

# backend -> (module that implements it, package it needs, extra that installs it)
BACKENDS = {
    "onnxruntime": ("dash_export.backends.onnxruntime.ort_engine", "onnxruntime", "cpu"),
    "onnxruntime_cuda": ("dash_export.backends.cuda.onnxruntime_cuda", "onnxruntime", "gpu"),
    "tensorrt": ("dash_export.backends.tensorrt.tensorrt", "tensorrt", "tensorrt"),
    "tensorrt_rtx": ("dash_export.backends.tensorrt.tensorrt", "tensorrt_rtx", "rtx"),
}
Launch = Callable[[], None]
"""Run one engine on the memory it was bound to. The call returns when the outputs are there (CPU) or when the work is
enqueued (CUDA).
"""


def require_backend(name: str) -> None:
    """Raise BackendError that names the extra to install when the backend's package is not installed."""
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r} in this version. Known: {', '.join(BACKENDS)}.")
    _, package, extra = BACKENDS[name]
    if find_spec(package) is None:
        raise BackendError(
            f"The backend {name!r} is not installed on this machine. Run: pip install 'dash-export[{extra}]'"
        )


def load_backend(name: str, threads: int) -> OrtBackend | Cuda:
    """Import and start a backend; for GPU targets it is a Cuda. Raises BackendError that names the missing package or
    device.
    """
    require_backend(name)
    return import_module(BACKENDS[name][0]).create(name, threads)  # type: ignore[no-any-return]


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
