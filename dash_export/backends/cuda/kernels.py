"""Kernels that no engine has: kernels.cu, shipped as PTX for every driver of CUDA 12. Not yet run on a GPU."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from dash_export.errors import BackendError

BINS, PART = 512, 512
"""Bins of a distribution, by how likely a token is; tokens whose weights are added up first. As in kernels.cu."""
PTX = Path(__file__).with_suffix(".ptx")


@cache
def load_kernels() -> dict[str, Any]:
    """Return the kernels by name, loaded into this process once. Raises BackendError where the driver refuses them."""
    driver: Any = import_module("cuda.bindings.driver")
    text = PTX.read_bytes()
    code, module = driver.cuModuleLoadData(text + b"\0")
    if int(code):
        raise BackendError(
            f"The driver does not load {PTX.name}: {code.name} ({int(code)}). It needs a driver of CUDA 12.0 and a "
            "card of compute capability 7.5 or newer."
        )
    names = [line.split()[2].rstrip(b"(") for line in text.splitlines() if line.startswith(b".visible .entry")]
    return {name.decode(): driver.cuModuleGetFunction(module, name)[1] for name in names}
