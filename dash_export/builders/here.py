"""What this machine can compile and run, and why not: asked before any work begins."""

from __future__ import annotations

from importlib.util import find_spec

from dash_export.builders.trt_api import EXTRAS
from dash_export.errors import BackendError, NotHereError
from dash_export.runtime.backends import BACKENDS, require_backend
from dash_export.runtime.cuda_devices import CudaDevice, cuda_devices
from dash_export.targets import Recipe


def require_builder(recipe: Recipe) -> None:
    """Raises BackendError that names the extra when the CPU backend is missing, NotHereError when this machine cannot
    compile for the recipe's GPU.
    """
    if recipe.engine is None:
        require_backend(recipe.backend)
        return
    reason = obstacle(recipe)
    if reason is not None:
        raise NotHereError(f"Engines for {recipe.name} cannot be compiled on this machine: {reason}")


def obstacle(recipe: Recipe) -> str | None:
    """Why this machine cannot compile a GPU recipe, in one sentence; None where it can.

    TensorRT-RTX compiles ahead of time anywhere; TensorRT only for the device it runs on; ONNX Runtime takes graphs.
    """
    if recipe.backend in EXTRAS and find_spec(recipe.backend) is None:
        return f"the package {recipe.backend} is not installed (pip install 'dash-export[{EXTRAS[recipe.backend]}]')."
    return _no_such_device(recipe) if recipe.backend == "tensorrt" else None


def runs_here(recipe: Recipe) -> bool:
    """Whether this machine can run what was compiled, so that its costs can be measured."""
    if recipe.engine is None:
        return True
    known = recipe.backend in BACKENDS and find_spec(BACKENDS[recipe.backend][1]) is not None
    return known and _no_such_device(recipe) is None


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
