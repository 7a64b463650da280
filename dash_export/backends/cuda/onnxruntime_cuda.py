"""ONNX Runtime's CUDA provider on this runtime's streams and memory: for devices without TensorRT."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from dash_export.backends.cuda.cuda import Cuda, CudaMemory, Launch
from dash_export.backends.onnxruntime.ort_engine import ort_errors
from dash_export.errors import BackendError

PROVIDER = "CUDAExecutionProvider"
TYPES = {"tensor(float)": 1, "tensor(int64)": 7, "tensor(float16)": 10, "tensor(bfloat16)": 16}
"""ONNX element types (TensorProto.DataType) of ONNX Runtime's type names."""


def require_cuda() -> None:
    """Raise BackendError where the installed ONNX Runtime has no CUDA."""
    if PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"The installed onnxruntime {ort.__version__} has no CUDA. It and onnxruntime-gpu overwrite each "
            "other: pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'dash-export[gpu]'"
        )


class OrtCuda(Cuda):
    """Device with a session of ONNX Runtime per engine. All sessions of a stream launch on it; none waits for it."""

    records = False

    def __init__(self) -> None:
        super().__init__()
        require_cuda()
        with redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # of NVIDIA's pip packages, which the loader does not find by itself

    def load(self, path: Path, stream: str) -> OrtCudaEngine:
        return OrtCudaEngine(path, self.device.index, self.stream(stream))


class OrtCudaEngine:
    """A graph file on one device and stream."""

    def __init__(self, path: Path, device: int, stream: int) -> None:
        """Load the file. Raises BackendError when ONNX Runtime refuses it."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1  # the host only works out shapes, and every engine has threads of its own
        cuda = {"device_id": device, "user_compute_stream": str(stream), "use_tf32": "0"}  # fp32 is fp32
        with ort_errors(path.name):
            providers = [(PROVIDER, cuda), "CPUExecutionProvider"]
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        if self._session.get_providers()[0] != PROVIDER:
            raise BackendError(f"ONNX Runtime {ort.__version__} did not start CUDA; see its own message above.")
        self._name, self._device = path.name, device
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._tensors = {item.name: item for item in (*inputs, *outputs)}
        self.inputs, self.outputs = (tuple(item.name for item in items) for items in (inputs, outputs))

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, CudaMemory]) -> Launch:
        del profile  # one session serves all shapes
        session, binding, options = self._session, self._session.io_binding(), ort.RunOptions()
        # Launch without waiting: the host waits for events of the stream, once a token.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        sizes: dict[int | str, int] = {}
        for name, shape in shapes.items():
            sizes |= zip(self._tensors[name].shape, shape, strict=True)
        for names, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for name in names:
                tensor = self._tensors[name]
                fixed = [sizes.get(size, size) if isinstance(size, str) else size for size in tensor.shape]
                with ort_errors(f"{name} {fixed} of {self._name}"):
                    bind(name, "cuda", self._device, TYPES[tensor.type], fixed, memory[name].address)

        def launch(stream: str) -> None:
            del stream  # fixed when the session was made
            with ort_errors(f"{self._name} on CUDA (where memory ran out, free some or use a shorter context)"):
                session.run_with_iobinding(binding, options)

        launch.memory = memory  # type: ignore[attr-defined]  # the binding holds bare addresses
        return launch


def create(_name: str, _threads: int) -> OrtCuda:
    return OrtCuda()
