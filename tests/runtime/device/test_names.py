"""No name of CUDA or TensorRT is guessed: every call of the device backends is in the bindings that are installed."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from dash_export.errors import BackendError
from dash_export.runtime.backends import BACKENDS, load_backend
from dash_export.runtime.cuda_devices import cuda_devices
from dash_export.runtime.device import cuda, tensorrt

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the RTX bindings: pip install 'dash-export[rtx]'")
rt = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

# variable in the source -> what it holds
HELD: dict[str, Any] = {
    "rt": rt,
    "trt": rtx,
    "engine": rtx.ICudaEngine,
    "context": rtx.IExecutionContext,
    "_context": rtx.IExecutionContext,
    "runtime": rtx.Runtime,
}


def used(module: Any) -> set[tuple[str, str]]:
    """(variable, attribute chain) of everything a module asks of the bindings, wherever the variable stands."""
    found = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        chain, inner = [], node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            chain.insert(0, inner.id)
        for index, name in enumerate(chain[:-1]):
            if name in HELD:
                found.add((name, ".".join(chain[index + 1 :])))
                break
    # `engine` and `context` are also our own objects' methods.
    return found - {("engine", "context"), ("context", "enqueue"), ("engine", "dtype")}


USED = sorted(used(cuda) | used(tensorrt))


def test_the_reader_sees_the_calls() -> None:
    assert {("rt", "cudaMemcpy2DAsync"), ("context", "set_input_shape"), ("_context", "execute_async_v3")} <= set(USED)
    assert {variable for variable, _ in USED} == set(HELD)


@pytest.mark.parametrize(("variable", "chain"), USED)
def test_every_name_is_in_the_installed_bindings(variable: str, chain: str) -> None:
    held = HELD[variable]
    for name in chain.split("."):
        assert hasattr(held, name), f"{variable}.{chain}"
        held = getattr(held, name)


def test_calls_have_as_many_arguments_as_the_bindings_take() -> None:
    """cuda-bindings are compiled; the first line of a docstring is the signature."""
    checked = 0
    for node in ast.walk(ast.parse(Path(cuda.__file__).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("cuda"):
            known = getattr(rt, node.func.attr).__doc__
            if known is None:
                continue
            signature = known.splitlines()[0]
            inside = signature.partition("(")[2].rpartition(")")[0]
            assert len(node.args) == len([part for part in inside.split(",") if part.strip()]), signature
            checked += 1
    assert checked >= 12


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "onnxruntime"])
def test_without_a_device_every_backend_says_what_is_missing(name: str) -> None:
    try:
        cuda_devices()
    except BackendError:
        with pytest.raises(BackendError, match=r"driver|not installed|lists no device"):
            load_backend(name, 0)
    else:
        pytest.skip("this machine has a device")


def test_every_backend_has_its_module() -> None:
    for module, _package, _extra in BACKENDS.values():
        assert callable(import_module(module).create)
