"""The drivers of real devices, as far as they go without one; `tests/gpu` has the rest."""

from __future__ import annotations

import ast
import gc
import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import compile_kernels
import pytest

from dash_export.backends.base import BACKENDS, load_backend
from dash_export.backends.cuda import cuda, cuda_graph, kernels
from dash_export.backends.cuda.cuda import Cuda
from dash_export.backends.cuda.cuda_devices import cuda_devices
from dash_export.backends.cuda.cuda_graph import CudaGraph
from dash_export.backends.cuda.kernels import PTX
from dash_export.backends.tensorrt import tensorrt, trt_api
from dash_export.bundle.layout import TIMING_CACHE
from dash_export.errors import BackendError
from tests.backends.bindings import check_names, used
from tests.standin.trt import Engine

if TYPE_CHECKING:
    from dash_export.bundle.bundle import Bundle
    from tests.backends.cuda.conftest import MakeOnCard
    from tests.standin.cuda import Card

rt = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
OK = rt.cudaError_t.cudaSuccess

# --- no name is guessed


def held() -> dict[str, Any]:
    """Variable in the source -> what it holds."""
    rtx = pytest.importorskip("tensorrt_rtx", reason="needs the RTX bindings: pip install 'dash-export[rtx]'")
    return {
        "rt": rt,
        "driver": import_module("cuda.bindings.driver"),
        "trt": rtx,
        "engine": rtx.ICudaEngine,
        "context": rtx.IExecutionContext,
        "runtime": rtx.Runtime,
    }


def test_every_name_is_in_the_installed_bindings() -> None:
    known = held()
    asked = set[tuple[str, str]]().union(*(used(module, known) for module in (cuda, cuda_graph, kernels, tensorrt)))
    assert {("rt", "cudaMemcpy2DAsync"), ("context", "execute_async_v3")} <= asked
    check_names(asked, known)


def argument_count(function: Any) -> int:
    """cuda-bindings are compiled; the first line of a docstring is the signature."""
    inside, depth, count = function.__doc__.splitlines()[0].partition("(")[2].rpartition(")")[0], 0, 0
    for letter in inside:
        depth += (letter in "[(") - (letter in "])")
        count += letter == "," and depth == 0
    return count + bool(inside.strip())


@pytest.mark.parametrize(("module", "least"), [(cuda, 10), (cuda_graph, 8), (kernels, 2)])
def test_calls_have_as_many_arguments_as_the_bindings_take(module: Any, least: int) -> None:
    chosen = {"add": "cudaGraphAddNode", "follow": "cudaStreamUpdateCaptureDependencies"}  # by version
    libraries, checked = held().values(), 0
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else chosen.get(getattr(node.func, "id", ""), "")
        named = next((getattr(each, name) for each in libraries if name and hasattr(each, name)), None)
        if named is None or not name.startswith(("cuda", "cu", "nvrtc")) or isinstance(named, type):
            continue
        if name in chosen.values():
            named = getattr(rt, f"{name}_v2", named)
        assert len(node.args) == argument_count(named), name
        checked += 1
    assert checked >= least


def test_shipped_kernels_are_those_of_the_source() -> None:
    """For every driver of CUDA 12 or newer: PTX 8.0 is what the first of them takes, and every card from 7.5 on."""
    shipped, source = PTX.read_text(), compile_kernels.SOURCE.read_text()
    assert re.findall(r"\.(version|target) (\S+)", shipped) == [("version", "8.0"), ("target", "sm_75")]
    pytest.importorskip("nvidia.cuda_nvrtc", reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12==12.0.76")
    assert compile_kernels.compiled(source) == shipped, "python tools/compile_kernels.py"
    with pytest.raises(ValueError, match='identifier "number" is undefined'):
        compile_kernels.compiled(source.replace("bool skips", "number skips"))


def test_a_driver_that_refuses_the_kernels(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = rt.cudaError_t.cudaErrorUnsupportedPtxVersion  # as the driver numbers it
    driver = SimpleNamespace(cuModuleLoadData=lambda _: (refused, None))
    monkeypatch.setattr(kernels, "import_module", lambda _: driver)
    with pytest.raises(BackendError, match=r"UnsupportedPtxVersion \(222\)\. It needs a driver of CUDA 12\.0"):
        recorded(card)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in ("onnxruntime", "openvino")])
def test_without_a_device_every_backend_says_what_is_missing(name: str) -> None:
    assert callable(BACKENDS[name].part("load"))
    try:
        cuda_devices()
    except BackendError:
        with pytest.raises(BackendError, match=r"driver|not installed|lists no device"):
            load_backend(name, 0)
    else:
        pytest.skip("this machine has a device")


@pytest.mark.parametrize(
    ("driver", "known", "good"), [(12060, 12080, True), (12060, 13000, False), (13000, 12090, True)]
)
def test_bindings_of_a_newer_cuda_than_the_driver(driver: int, known: int, good: bool, card: Card) -> None:
    """Their first call would fail with a number."""
    card.version, cuda.require_bindings().CUDART_VERSION = driver, known
    if good:
        Cuda()
    else:
        with pytest.raises(BackendError, match=r"is for CUDA 13, and the driver of a card has CUDA 12\.6: pip install"):
            Cuda()
    assert card.calls["cudaSetDevice"] == good


# --- on the stand-in, what no step does


def recorded(card: Card, fill: Any = None) -> CudaGraph:
    """A step of two decisions and a branch about the second."""
    device = Cuda()
    places = [device.memory(16) for _ in range(3)]

    def step(graph: CudaGraph) -> None:
        graph.decide("main", *places)
        graph.branch("main", 1, fill or (lambda _: None), lambda _: None)

    card.forget()
    graph = CudaGraph(device, "main", 2, step)
    graph.launch("main")
    return graph


def test_what_fails_leaves_no_recording_open(card: Card) -> None:

    def refuse(_: str) -> None:
        assert card.recording()
        raise BackendError("TensorRT could not launch layer_05.")

    with pytest.raises(BackendError, match="layer_05"):
        recorded(card, refuse)
    assert not card.recording()
    assert (card.calls["cudaStreamEndCapture"], card.calls["cudaGraphDestroy"]) == (2, 1)


@pytest.mark.parametrize("integrated", [False, True])
def test_too_little_memory_is_told_before_anything_is_loaded(
    integrated: bool, on_card: MakeOnCard, card: Card, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is the host's, files that are kept in it count as taken, and give it back."""
    card.integrated, card.total = integrated, 500_000
    said = r"The engines take \d+ MB and a session's cache \d+ MB, and 0 of 0 MB of a card are free"
    if integrated:
        card.total = 2_000_000
        card.cudaMemGetInfo = lambda: (OK, 0, card.total)  # type: ignore[method-assign]
        on_card("portable")
        assert "Memory that files are kept in" in caplog.text
        assert card.calls["cudaSetDeviceFlags"] == 1
        return
    with pytest.raises(BackendError, match=said):
        on_card("portable")
    card.total = 8 << 30
    on_card("portable")


def test_kernels_are_kept(on_card: MakeOnCard, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by one process, read by the next, and written again only where there are more: soon, and at its end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_card("rtx").runtime.generate([1, 2, 3], 2)
    ((keep, kernels, file),) = card.at_exit
    (beside,), slept = card.beside, list[bool]()

    def sleep(_: float) -> None:
        slept.append(file.is_file())
        if len(slept) == 2:
            kernels.kernels.add("another")

    monkeypatch.setattr(trt_api.time, "sleep", sleep)
    beside()
    assert slept == [False, True, True], "as long as there are new ones"
    assert "another" in file.read_text()
    file.unlink()
    keep(kernels, file)
    assert file == tmp_path / "dash-export" / "tensorrt_rtx-10.16.0-12.0.kernels"
    assert set(file.read_text().split()) >= {"layer_00", "policy", "bypass_04-04"}
    trt_api.load_toolkit.cache_clear()
    on_card("rtx").runtime.session()
    read = file.read_bytes()
    os.utime(file, (0, 0))
    for keep, kernels, _ in card.at_exit:
        assert set(kernels.serialize().split()) <= set(read.split())
        keep(kernels, file)
    assert file.stat().st_mtime == 0
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    keep(kernels, file)  # the end of a process is no place for complaints
    assert not (tmp_path / "elsewhere").exists()


def test_a_dropped_graph_is_given_back(card: Card) -> None:
    graph = recorded(card)
    del graph
    gc.collect()
    assert (card.calls["cudaGraphDestroy"], card.calls["cudaGraphExecDestroy"]) == (1, 1)


@pytest.mark.parametrize(
    "name", ["cudaStreamBeginCapture", "cudaGraphAddNode", "cudaGraphInstantiate", "cudaGraphLaunch"]
)
def test_a_call_that_fails_says_which_and_where(name: str, card: Card) -> None:
    card.failing[name] = rt.cudaError_t.cudaErrorStreamCaptureUnsupported
    with pytest.raises(BackendError, match=r"CUDA on a card failed (begin|adding|making|launching).*\(900\)"):
        recorded(card)


# --- TensorRT


@pytest.mark.usefixtures("card")
def test_engines_of_another_version_or_card_are_refused(device_bundle: Bundle) -> None:
    device, build = tensorrt.TensorRT("tensorrt"), device_bundle.load_build("trt10")
    device.accept(build, "rebuild me")
    with pytest.raises(BackendError, match=r"by tensorrt 10\.3\.0 and this machine has 10\.16\.0.*rebuild me"):
        device.accept(replace(build, backend_version="10.3.0"), "rebuild me")
    assert build.recipe.engine is not None
    for others in (("9.0", "9.1"), ("10.0",), ("12.1",)):  # older and newer than the card
        recipe = replace(build.recipe, engine=replace(build.recipe.engine, capabilities=others))
        with pytest.raises(BackendError, match=rf"for compute capability {', '.join(others)}, and a card has 12\.0"):
            device.accept(replace(build, recipe=recipe), "rebuild me")


@pytest.mark.usefixtures("card")
def test_engines_are_tuned_for_what_runs(device_bundle: Bundle) -> None:
    """A prompt's chunk and a token have a profile each, whose best size that is. Times of kernels are kept: every
    engine's were added to those of the engines before it.
    """
    for target, together in (("trt10", []), ("trt10-together", [((2, 1, 64), (4, 1, 64), (4, 1, 64))])):
        build = device_bundle.load_build(target)
        file = device_bundle.path(build.engines["layer_01"].file)
        profiles = tensorrt.TensorRT("tensorrt").engine(file, "main")._engine.profiles  # type: ignore[attr-defined]
        sizes = [each["hidden"] for each in profiles]
        assert sizes == [((1, 1, 64),) * 3, ((1, 1, 64), (1, 16, 64), (1, 16, 64)), *together]
        assert (file.parent / TIMING_CACHE).read_bytes() == b"t" * len(build.engines)
    file = device_bundle.path(device_bundle.load_build("portable-together").engines["layer_01"].file)
    (profile,) = tensorrt.TensorRT("tensorrt").engine(file, "main")._engine.profiles  # type: ignore[attr-defined]
    assert profile["hidden"] == ((1, 1, 64), (1, 1, 64), (4, 16, 64)), "one of all: tuned for a token"


@pytest.mark.usefixtures("card")
def test_engines_of_one_stream_share_one_block_of_the_largest_size(
    device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"layer_01": 512, "layers_02-03": 1536, "layer_04": 1024, "policy": 256, "layer_05": 2048}
    monkeypatch.setattr(Engine, "get_device_memory_size_for_profile_v2", lambda engine, _: sizes[engine.name])
    device, engines = tensorrt.TensorRT("tensorrt"), device_bundle.load_build("trt10").engines

    def engine(name: str, stream: str = "main") -> Any:
        return device.engine(device_bundle.path(engines[name].file), stream)

    launches = [each.bind(1, {}, {}) for each in [engine(name) for name in ("layer_01", "layers_02-03", "layer_04")]]
    ((address, size),) = {(launch.memory[1].address, launch.memory[1].nbytes) for launch in launches}
    assert size == 1536
    own, later = engine("policy", "beside").bind(0, {}, {}), engine("layer_05").bind(1, {}, {})
    assert (own.memory[1].nbytes, own.memory[1].address == address) == (256, False)
    assert (later.memory[1].nbytes, later.memory[1].address == address) == (2048, False)
    assert launches[0].memory[1].address == address, "who is bound to the smaller one keeps it"


@pytest.mark.usefixtures("card")
def test_a_lazy_context_is_not_taken_for_what_is_recorded(device_bundle: Bundle) -> None:
    file = device_bundle.path(device_bundle.load_build("rtx").engines["layer_01"].file)
    engine = tensorrt.TensorRT("tensorrt_rtx").engine(file, "main")
    contexts = [engine.bind(1, {"hidden": (1, tokens, 64)}, {}).context for tokens in (5, 16, 7)]  # type: ignore[attr-defined]
    assert [context.captures for context in contexts] == [False, True, False]
    assert contexts[0] is contexts[2]


@pytest.mark.usefixtures("card")
def test_a_dropped_context_is_bound_anew(device_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes TensorRT milliseconds, and every length of prompt wants its own binding."""
    made, sound = [], Engine.create_execution_context
    monkeypatch.setattr(Engine, "create_execution_context", lambda *given: made.append(sound(*given)) or made[-1])
    file = device_bundle.path(device_bundle.load_build("trt10").engines["layer_01"].file)
    engine = tensorrt.TensorRT("tensorrt").engine(file, "main")
    first, second = (engine.bind(1, {"hidden": (1, length, 64)}, {}) for length in (5, 6))
    assert len(made) == 2
    del first
    third = engine.bind(1, {"hidden": (1, 9, 64)}, {})
    assert len(made) == 2
    assert made[0].shapes["hidden"] == (1, 9, 64)
    with pytest.raises(BackendError, match=r"does not take hidden \[1, 17, 64\]: build it again"):
        engine.bind(1, {"hidden": (1, 17, 64)}, {})
    assert len(made) == 3, "two are in use"
    del second, third
