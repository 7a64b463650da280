"""ONNX Runtime on a CPU. One thread pool for the whole process: thirty sessions with a pool each are seven times slower."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Read when the library loads: no telemetry leaves the device.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy.typing as npt
import onnxruntime as ort

from dash_export.errors import BackendError
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.cpus import physical_cores

logger = logging.getLogger(__name__)

_pool_threads: int | None = None


def start_thread_pool(threads: int) -> int:
    """Create the process-wide pool, once. ONNX Runtime cannot change it afterwards; a later, different wish is logged."""
    global _pool_threads
    wanted = threads or physical_cores()
    if _pool_threads is None:
        try:
            ort.set_global_thread_pool_sizes(wanted, 1)
        except Exception as error:
            raise BackendError(
                f"ONNX Runtime's thread pool could not be created ({error}). "
                "Load the DashRuntime before any other ONNX Runtime session of this process."
            ) from error
        _pool_threads = wanted
    elif wanted != _pool_threads and threads:
        logger.warning("this process already runs ONNX Runtime with %d threads; %d is not applied", _pool_threads, wanted)
    return _pool_threads


class OrtEngine:
    """One InferenceSession."""

    def __init__(self, path: Path, options: ort.SessionOptions) -> None:
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a family of its own plus RuntimeError
            raise BackendError(f"ONNX Runtime {ort.__version__} refuses {path.name}: {error}") from error
        self.inputs = tuple(item.name for item in self.session.get_inputs())
        self.outputs = tuple(item.name for item in self.session.get_outputs())

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        binding = self.session.io_binding()
        for name in self.inputs:
            array = inputs[name]
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for name in self.outputs:
            array = outputs[name]
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        run, raw = self.session._sess.run_with_iobinding, binding._iobinding
        # The binding holds bare addresses: the closure keeps the arrays alive.
        kept = (inputs, outputs, binding)

        def launch(_kept: object = kept) -> None:
            run(raw, None)

        return launch


class OrtBackend:
    """Engines on the CPU execution provider, sharing threads and the allocator."""

    name = "onnxruntime"
    version = ort.__version__

    def __init__(self, threads: int) -> None:
        self.threads = start_thread_pool(threads)
        self._engines: dict[Path, OrtEngine] = {}
        self._options = ort.SessionOptions()
        self._options.use_per_session_threads = False
        self._options.log_severity_level = 3
        self._options.add_session_config_entry("session.use_env_allocators", "1")

    def load(self, path: Path) -> OrtEngine:
        path = path.resolve()
        if path not in self._engines:
            self._engines[path] = OrtEngine(path, self._options)
        return self._engines[path]


def create(threads: int) -> OrtBackend:
    return OrtBackend(threads)
