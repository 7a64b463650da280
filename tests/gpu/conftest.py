"""A target that this machine's GPU can build and run. One command: `pytest tests/gpu`. A device without onnx is given a
bundle of SmolLM2 that was lowered elsewhere (`$DASH_EXPORT_GPU_BUNDLE`), and skips what compares with a CPU.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from dash_export import DashRuntime
from dash_export.backends.cuda.cuda_devices import cuda_devices
from dash_export.backends.maker import backend_of
from dash_export.building import build
from dash_export.bundle.recipe import load_recipe, recipe_names
from dash_export.errors import BackendError

BUNDLE = "DASH_EXPORT_GPU_BUNDLE"
TARGET = "DASH_EXPORT_GPU_TARGET"
"""Environment variable: the target to test; by default the first of the device's own that this machine can build."""


@pytest.fixture(scope="session")
def target() -> str:
    """Skips, with the reason, where there is none."""
    try:
        device = cuda_devices()[0]
    except BackendError as error:
        pytest.skip(f"no GPU here: {error}")
    if os.environ.get(TARGET):
        return os.environ[TARGET]
    recipes = [recipe for recipe in map(load_recipe, recipe_names()) if recipe.engine is not None]
    recipes.sort(key=lambda recipe: recipe.backend == "onnxruntime_cuda")  # TensorRT before it
    backends = {recipe.name: backend_of(recipe) for recipe in recipes}
    obstacles = {
        name: own.build_obstacle() or own.run_obstacle() or own.refused_version(own.version())
        for name, own in backends.items()
    }
    fitting = [name for name, obstacle in obstacles.items() if obstacle is None]
    if not fitting:
        pytest.skip(f"no target can be built and run on {device.name} ({device.capability}): {obstacles}")
    return fitting[0]


@pytest.fixture(scope="session")
def gpu_bundle(request: pytest.FixtureRequest) -> Path:
    """SmolLM2 with its trained policy: a copy that was carried here, or exported here."""
    carried = os.environ.get(BUNDLE)
    root: Path = Path(carried) if carried else request.getfixturevalue("smollm2_bundle")
    return root


@pytest.fixture(scope="session")
def gpu_runtime(target: str, gpu_bundle: Path) -> Callable[[str], DashRuntime]:
    """`gpu_runtime(dispatch)`: that bundle on the device."""
    build(gpu_bundle, target)

    @cache
    def runtime(dispatch: str) -> DashRuntime:
        return DashRuntime.load(gpu_bundle, target, dispatch=dispatch)

    return runtime


@pytest.fixture(scope="session")
def cpu_runtime(request: pytest.FixtureRequest) -> DashRuntime:
    """The same in float32 on the CPU, which is compared with the oracle elsewhere."""
    for package in ("onnxruntime", "onnx", "gguf"):
        pytest.importorskip(package, reason=f"no {package} here to compare with; `build` has compared with references")
    runtime: DashRuntime = request.getfixturevalue("smollm2_runtime")("cpu-fp32")
    return runtime
