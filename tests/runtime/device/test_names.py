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
from dash_export.runtime.device import cuda, cuda_graph, cuda_resources, tensorrt
from dash_export.runtime.device.cuda_graph import KERNELS, compile_kernels

rtx = pytest.importorskip("tensorrt_rtx", reason="needs the RTX bindings: pip install 'dash-export[rtx]'")
rt = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

# variable in the source -> what it holds
HELD: dict[str, Any] = {
    "rt": rt,
    "_rt": rt,
    "nvrtc": import_module("cuda.bindings.nvrtc"),
    "driver": import_module("cuda.bindings.driver"),
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


USED = sorted(used(cuda) | used(cuda_resources) | used(cuda_graph) | used(tensorrt))


def test_the_reader_sees_the_calls() -> None:
    assert {("rt", "cudaMemcpy2DAsync"), ("context", "set_input_shape"), ("_context", "execute_async_v3")} <= set(USED)
    assert {variable for variable, _ in USED} == set(HELD)


@pytest.mark.parametrize(("variable", "chain"), USED)
def test_every_name_is_in_the_installed_bindings(variable: str, chain: str) -> None:
    held = HELD[variable]
    for name in chain.split("."):
        assert hasattr(held, name), f"{variable}.{chain}"
        held = getattr(held, name)


@pytest.mark.parametrize(("module", "least"), [(cuda, 10), (cuda_resources, 1), (cuda_graph, 15)])
def test_calls_have_as_many_arguments_as_the_bindings_take(module: Any, least: int) -> None:
    """cuda-bindings are compiled; the first line of a docstring is the signature."""
    checked = 0
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        held = next((held for held in HELD.values() if hasattr(held, node.func.attr)), None)
        if held is None or not node.func.attr.startswith(("cuda", "cu", "nvrtc")):
            continue
        named = getattr(held, node.func.attr)
        if isinstance(named, type) or named.__doc__ is None:
            continue
        signature = named.__doc__.splitlines()[0]
        assert len(node.args) == argument_count(signature), signature
        checked += 1
    assert checked >= least


def argument_count(signature: str) -> int:
    """Commas outside of brackets, plus one."""
    inside, depth, count = signature.partition("(")[2].rpartition(")")[0], 0, 0
    for letter in inside:
        depth += (letter in "[(") - (letter in "])")
        count += letter == "," and depth == 0
    return count + bool(inside.strip())


def test_calls_by_a_name_that_depends_on_the_version() -> None:
    """`add` and `follow` are chosen by name; both forms take as many arguments as they are given."""
    calls = {
        node.func.id: len(node.args)
        for node in ast.walk(ast.parse(Path(cuda_graph.__file__).read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    for name, function in (("add", "cudaGraphAddNode"), ("follow", "cudaStreamUpdateCaptureDependencies")):
        newest = getattr(rt, f"{function}_v2", getattr(rt, function))
        assert calls[name] == argument_count(newest.__doc__.splitlines()[0])


@pytest.mark.parametrize("capability", ["7.5", "8.7", "9.0", "12.0"])
def test_kernels_compile_without_a_device(capability: str) -> None:
    pytest.importorskip("nvidia.cu13", reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
    code = compile_kernels(capability)
    assert code.startswith(b"\x7fELF")
    assert all(name in code for name in (b"decide", b"write_rows"))


def test_a_kernel_that_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nvidia.cu13", reason="needs NVRTC: pip install nvidia-cuda-nvrtc")
    monkeypatch.setattr(cuda_graph, "KERNELS", KERNELS.replace("const bool skips", "const number skips"))
    with pytest.raises(BackendError, match='identifier "number" is undefined'):
        compile_kernels("9.0")


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
