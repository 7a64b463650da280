"""ONNX Runtime's CUDA provider on our streams and memory: for devices without TensorRT."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort

from dash_export.errors import BackendError
from dash_export.manifest import Build
from dash_export.runtime.device.cuda import CudaMemory
from dash_export.runtime.device.cuda_resources import CudaResources

PROVIDER = "CUDAExecutionProvider"
# ONNX element type (TensorProto.DataType) and numpy type of ONNX Runtime's type names. numpy has no bfloat16.
TYPES: dict[str, tuple[int, Any]] = {
    "tensor(float)": (1, np.float32),
    "tensor(int32)": (6, np.int32),
    "tensor(int64)": (7, np.int64),
    "tensor(bool)": (9, np.bool_),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
}


class OrtCuda(CudaResources):
    """A session per engine; all sessions of a stream launch on it, and none waits for it."""

    def __init__(self) -> None:
        super().__init__()
        if PROVIDER not in ort.get_available_providers():
            raise BackendError(
                f"The installed onnxruntime {ort.__version__} has no CUDA. It and onnxruntime-gpu overwrite each "
                "other: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'dash-export[gpu]'"
            )
        self._engines: dict[tuple[Path, str], OrtCudaEngine] = {}

    def graph_obstacle(self) -> str | None:
        return "ONNX Runtime's runs cannot be recorded"

    def accept(self, build: Build, rebuild: str) -> None:
        """Graphs run on every device that has the provider."""

    def engine(self, path: Path, stream: str) -> OrtCudaEngine:
        key = (path, stream)
        if key not in self._engines:
            self._engines[key] = OrtCudaEngine(self, path, stream)
        return self._engines[key]


class OrtCudaEngine:
    """A graph file, loaded when it is first asked for anything."""

    def __init__(self, device: OrtCuda, path: Path, stream: str) -> None:
        self._device, self._path, self._stream = device, path, stream
        self._session: Any = None
        self._types: dict[str, str] = {}
        self._shapes: dict[str, list[int | str]] = {}

    def loaded(self) -> Any:
        """Raises BackendError when ONNX Runtime refuses the file."""
        if self._session is None:
            options = ort.SessionOptions()
            options.log_severity_level = 3
            handle = self._device.stream(self._stream).handle
            cuda = {"device_id": self._device.cuda.device.index, "user_compute_stream": str(handle)}
            try:
                session = ort.InferenceSession(
                    str(self._path), options, providers=[(PROVIDER, cuda), "CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime raises a family of its own
                raise BackendError(f"ONNX Runtime {ort.__version__} refuses {self._path.name}: {error}") from error
            if session.get_providers()[0] != PROVIDER:
                raise BackendError(f"ONNX Runtime {ort.__version__} did not start CUDA; see its own message above.")
            for item in (*session.get_inputs(), *session.get_outputs()):
                self._types[item.name], self._shapes[item.name] = item.type, item.shape
            self._session = session
        return self._session

    def inputs(self) -> Sequence[str]:
        return [item.name for item in self.loaded().get_inputs()]

    def outputs(self) -> Sequence[str]:
        return [item.name for item in self.loaded().get_outputs()]

    def dtype(self, name: str) -> np.dtype[Any]:
        self.loaded()
        found: np.dtype[Any] = np.dtype(TYPES[self._types[name]][1])
        return found

    def context(
        self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, CudaMemory]
    ) -> OrtCudaContext:
        del profile  # one session serves all shapes
        session = self.loaded()
        binding = session.io_binding()
        index = self._device.cuda.device.index
        sizes = {
            symbol: size
            for name, shape in shapes.items()
            for symbol, size in zip(self._shapes[name], shape, strict=True)
            if isinstance(symbol, str)
        }
        for name, bind in [(name, binding.bind_input) for name in self.inputs()] + [
            (name, binding.bind_output) for name in self.outputs()
        ]:
            shape = [sizes[size] if isinstance(size, str) else size for size in self._shapes[name]]
            try:
                bind(name, "cuda", index, TYPES[self._types[name]][0], shape, memory[name].address)
            except Exception as error:  # onnxruntime raises a family of its own
                raise BackendError(
                    f"{self._path.name} does not take {name} {shape} ({error}): build it again."
                ) from error
        return OrtCudaContext(self._path.stem, self._stream, session, binding, memory)


class OrtCudaContext:
    """A bound run. It keeps its memory alive."""

    def __init__(self, name: str, scratch: str, session: Any, binding: Any, memory: Mapping[str, CudaMemory]) -> None:
        self.name, self.scratch = name, scratch
        self._session, self._binding, self._memory = session, binding, memory
        self._options = ort.RunOptions()
        # Only launch: the stream is waited for by events, once a token.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self, stream: int) -> None:
        del stream  # fixed when the session was made
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # onnxruntime raises a family of its own
            raise BackendError(
                f"ONNX Runtime could not run {self.name} on CUDA ({error}). Where memory ran out, free some or use a "
                "shorter context."
            ) from error


def create(_threads: int) -> OrtCuda:
    return OrtCuda()
