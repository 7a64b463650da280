"""The order of CUDA's calls while a step is recorded, with a runtime that only notes them; `tests/gpu` has the real
one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dash_export.errors import BackendError
from dash_export.runtime.device import cuda_graph
from dash_export.runtime.device.base import Decisions
from dash_export.runtime.device.cuda import Cuda, CudaMemory, CudaStream
from dash_export.runtime.device.cuda_graph import IF, IF_ELSE, CudaGraphs, CudaRecording

real = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
OK = real.cudaError_t.cudaSuccess


class Noted:
    """`cuda.bindings.runtime` whose functions note that they were called and give the next number."""

    def __init__(self, version: int, failing: str = "") -> None:
        self.version, self.failing = version, failing
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda") or not callable(getattr(real, name)) or isinstance(getattr(real, name), type):
            return getattr(real, name)
        if name.endswith(("_v2", "_v3")):
            raise AttributeError(name)  # as in CUDA 13

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name == self.failing:
                return (real.cudaError_t.cudaErrorStreamCaptureUnsupported, None)
            if name == "cudaStreamGetCaptureInfo":
                active = real.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive
                return (OK, active, 7, "graph", ["node"], [], 1)
            if name == "cudaDriverGetVersion":
                return (OK, self.version)
            if name == "cudaGraphAddNode":
                arguments[-1].conditional.phGraph_out = ["run body", "skip body"]
            return (OK, len(self.calls))

        return call

    def cudaGraphNodeParams(self) -> Any:  # noqa: N802
        return SimpleNamespace(conditional=SimpleNamespace())


def graphs(version: int, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> tuple[CudaGraphs, Noted, list[Any]]:
    """Its graphs, what they called, and the kernels they launched."""
    noted, kernels = Noted(version, failing), []
    cuda = Cuda.__new__(Cuda)
    cuda.rt = noted
    cuda.device = SimpleNamespace(name="a card", capability="9.0")  # type: ignore[assignment]

    def launch(name: str, *arguments: Any) -> tuple[Any]:
        noted.calls.append(name)
        kernels.append(arguments)
        return (real.cudaError_t(0),)

    driver = SimpleNamespace(
        cuModuleLoadData=lambda _: (OK, "module"),
        cuModuleGetFunction=lambda _, name: (OK, name.decode()),
        cuLaunchKernel=launch,
    )
    monkeypatch.setattr(cuda_graph, "compile_kernels", lambda _: b"code")
    monkeypatch.setattr(cuda_graph, "import_module", lambda _: driver)
    return CudaGraphs(cuda), noted, kernels


UNITS = 2


def record(made: CudaGraphs, fill: Any = lambda _: None) -> np.ndarray:
    """A step with two decisions and a branch about the second; its handles."""
    main = CudaStream(made.cuda, "main")
    memories: list[Any] = [CudaMemory(16 * index, 8) for index in range(4)]
    handles = np.full((UNITS, 2), 7, np.uint64)

    def step(recording: CudaRecording) -> None:
        decided = recording.decide(main, Decisions(*memories, handles))
        recording.branch(main, decided[1], fill, fill)

    made.record(main, step).launch(main)
    return handles


BODY = ["cudaStreamBeginCaptureToGraph", "cudaStreamEndCapture"]
NODE = ["cudaStreamGetCaptureInfo", "cudaGraphAddNode", "cudaStreamUpdateCaptureDependencies"]


def test_one_node_with_an_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made, noted, kernels = graphs(IF_ELSE, monkeypatch)
    before = len(noted.calls) + 1
    handles = record(made)
    assert noted.calls[before:-2] == [
        "cudaStreamBeginCapture",
        "cudaStreamGetCaptureInfo",
        *["cudaGraphConditionalHandleCreate"] * UNITS,
        "decide",
        *NODE,
        *BODY,
        *BODY,
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphLaunch",
    ]
    assert sorted(noted.calls[-2:]) == ["cudaGraphDestroy", "cudaGraphExecDestroy"], "freed with its object"
    values, types = kernels[0][-2]
    assert len(values) == len(types) == 5
    assert values[-1] == UNITS
    assert handles[:, 0].all()
    assert not handles[:, 1].any(), "no handle for the other side"


def test_two_nodes_where_there_is_no_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made, noted, _ = graphs(IF, monkeypatch)
    assert len(set(record(made).ravel())) == 2 * UNITS
    assert noted.calls.count("cudaGraphConditionalHandleCreate") == 2 * UNITS
    assert noted.calls.count("cudaGraphAddNode") == 2


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"the driver has CUDA 12\.2, and graphs with decisions need 12\.4"):
        graphs(12020, monkeypatch)


def test_what_fails_leaves_no_capture_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the body nor of the step."""
    made, noted, _ = graphs(IF_ELSE, monkeypatch)

    def refuse(_: CudaStream) -> None:
        raise BackendError("TensorRT could not launch layer_05.")

    with pytest.raises(BackendError, match="layer_05"):
        record(made, refuse)
    assert noted.calls[-3:] == ["cudaStreamEndCapture", "cudaStreamEndCapture", "cudaGraphDestroy"]


@pytest.mark.parametrize(
    "name", ["cudaStreamBeginCapture", "cudaGraphAddNode", "cudaGraphInstantiate", "cudaGraphLaunch"]
)
def test_a_call_that_fails_says_which_and_where(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, *_ = graphs(IF_ELSE, monkeypatch, name)
    with pytest.raises(BackendError, match=r"CUDA on a card failed (begin|adding|making|launching).*\(900\)"):
        record(made)
