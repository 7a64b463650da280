"""What this machine can compile and run, and why not: asked before any work begins."""

from __future__ import annotations

from importlib.util import find_spec

from dash_export.builders.trt_api import EXTRAS, PORTABLE_SINCE
from dash_export.errors import BackendError, NotHereError
from dash_export.runtime.backends import require_backend
from dash_export.runtime.cuda_devices import CudaDevice, cuda_devices
from dash_export.runtime.device.cuda import require_bindings
from dash_export.targets import Recipe

JETSONS = ("8.7", "11.0")
"""Compute capabilities of Orin and Thor, whose TensorRT comes with JetPack and not from PyPI."""


def require_builder(recipe: Recipe) -> None:
    """Raises BackendError that says what to install when a package is missing or what this processor cannot do,
    NotHereError when only another machine can compile for the recipe.
    """
    if recipe.engine is None:
        require_backend(recipe.backend)
        return
    reason = obstacle(recipe)
    if reason is not None:
        kind = NotHereError if needs_another_machine(recipe) else BackendError
        raise kind(f"Engines for {recipe.name} cannot be compiled on this machine: {reason}")


def needs_another_machine(recipe: Recipe) -> bool:
    """Whether nothing that could be installed here helps, so that `build` writes a kit."""
    return recipe.backend == "tensorrt" and _no_such_device(recipe) is not None


def obstacle(recipe: Recipe) -> str | None:
    """Why this machine cannot compile a recipe, in one sentence; None where it can.

    TensorRT-RTX compiles ahead of time anywhere; TensorRT only for the device it runs on, so without the device no
    installing helps; ONNX Runtime on CUDA takes graphs as they are.
    """
    if recipe.engine is None:
        return run_obstacle(recipe)
    if recipe.backend == "tensorrt" and (reason := _no_such_device(recipe)) is not None:
        return reason
    if recipe.backend in EXTRAS and find_spec(recipe.backend) is None:
        return f"the package {recipe.backend} is not installed ({how_to_install(recipe)})."
    return None


def how_to_install(recipe: Recipe) -> str:
    """What to type for the compiler of a recipe of TensorRT or TensorRT-RTX."""
    if recipe.backend == "tensorrt" and recipe.engine is not None and set(JETSONS) & set(recipe.engine.capabilities):
        return "sudo apt install python3-libnvinfer, and in a virtual environment --system-site-packages"
    return f"pip install 'dash-export[{EXTRAS[recipe.backend]}]'"


def too_old(recipe: Recipe, version: str) -> str | None:
    """Why TensorRT of this version cannot compile the recipe's dialect; None where it can."""
    if recipe.backend != "tensorrt" or recipe.dialect != "portable":
        return None
    if tuple(int(part) for part in version.split(".")[:2]) >= PORTABLE_SINCE:
        return None
    return (
        f"TensorRT {version} has no KV cache update: the portable dialect needs "
        f"{'.'.join(map(str, PORTABLE_SINCE))} or newer. Copy engines/{recipe.name}.toml and set dialect = 'trt10'."
    )


def runs_here(recipe: Recipe) -> bool:
    """Whether this machine can run what was compiled, so that its costs can be measured."""
    return run_obstacle(recipe) is None


def run_obstacle(recipe: Recipe) -> str | None:
    """Why this machine cannot run what was compiled for a recipe, in one sentence; None where it can."""
    if recipe.engine is not None and (reason := _no_such_device(recipe)) is not None:
        return reason
    try:
        require_backend(recipe.backend)
        if recipe.engine is not None:
            require_bindings()
    except BackendError as error:
        return str(error)
    return None


def device_here() -> CudaDevice | None:
    """The first CUDA device, or None."""
    try:
        return cuda_devices()[0]
    except BackendError:
        return None


def _no_such_device(recipe: Recipe) -> str | None:
    assert recipe.engine is not None
    wanted = ", ".join(recipe.engine.capabilities)
    try:
        device = cuda_devices()[0]
    except BackendError as error:
        return f"it needs a device of compute capability {wanted}. {error}"
    if device.capability not in recipe.engine.capabilities:
        return f"it needs compute capability {wanted}, and {device.name} has {device.capability}."
    return None
