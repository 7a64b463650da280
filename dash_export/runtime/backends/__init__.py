"""Backends: how an engine file becomes something that runs. One module each, chosen by the recipe's `backend`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from dash_export.errors import BackendError
from dash_export.runtime.backends.base import Backend
from dash_export.runtime.device.base import Device

# backend -> (module that implements it, package it needs, extra that installs it)
BACKENDS = {
    "onnxruntime": ("dash_export.runtime.backends.onnxruntime", "onnxruntime", "cpu"),
    "onnxruntime_cuda": ("dash_export.runtime.device.onnxruntime_cuda", "onnxruntime", "gpu"),
    "tensorrt": ("dash_export.runtime.device.tensorrt", "tensorrt", "tensorrt"),
    "tensorrt_rtx": ("dash_export.runtime.device.tensorrt_rtx", "tensorrt_rtx", "rtx"),
}


def require_backend(name: str) -> None:
    """Raises BackendError that names the extra when the backend's package is not installed."""
    if name not in BACKENDS:
        raise BackendError(f"There is no backend {name!r} in this version. Known: {', '.join(BACKENDS)}.")
    _, package, extra = BACKENDS[name]
    if find_spec(package) is None:
        raise BackendError(
            f"The backend {name!r} is not installed on this machine. Run: pip install 'dash-export[{extra}]'"
        )


def load_backend(name: str, threads: int) -> Backend | Device:
    """Import and start a backend: a Device for GPU targets. Raises BackendError that names what is missing, package or
    device.
    """
    require_backend(name)
    module = BACKENDS[name][0]
    return import_module(module).create(threads)  # type: ignore[no-any-return]
