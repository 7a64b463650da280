"""ONNX Runtime on a CPU. All engines share one thread pool: thirty sessions with a pool each are seven times slower."""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

# The library reads this when it loads: no telemetry leaves the device.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
if platform.machine().lower() in ("x86_64", "amd64"):
    # Compute a token's attention scores whole, as products of one row with many, not tile by tile: a decoded token
    # takes 3 % less time at 512 cached tokens and 13 % less at 4,096, and prefill no more while the scores are few
    # (`decode.SCORES`). Each session reads this when it is made. On other processors nobody has measured it.
    os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")

import numpy.typing as npt
import onnxruntime as ort

from dash_export.backends.base import Launch
from dash_export.backends.host.cpus import allowed_processors, usable_cores
from dash_export.backends.onnxruntime.huge_pages import keep_freed_memory, on_huge_pages
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build
from dash_export.errors import BackendError, PolicyError

if TYPE_CHECKING:
    from dash_export.backends.host.decode import EngineSet
    from dash_export.backends.host.encoder_pass import EncoderEngines


logger = logging.getLogger(__name__)

_pool_threads: int | None = None
_pool_lock = Lock()
# Without shared options every run makes its own: two of the ten microseconds that a run costs on cold caches.
_RUN_OPTIONS = ort.RunOptions()
_BUILD_AGAIN = "The engine does not fit its bundle: build the target again."


def start_thread_pool(threads: int) -> int:
    """Create the process-wide pool once and return its size; `threads` 0: one per physical core. ONNX Runtime cannot
    change the pool: a later, different wish is logged, and so is one for more threads than processors, which is cut.
    Raises BackendError where the pool cannot be created.
    """
    global _pool_threads
    if threads > (most := len(allowed_processors())):
        logger.warning("%d threads on %d processors would wait for each other: %d are taken", threads, most, most)
        threads = most
    wanted = threads or usable_cores()
    with _pool_lock:
        if _pool_threads is None:
            try:
                ort.set_global_thread_pool_sizes(wanted, 1)
            except Exception as error:
                raise BackendError(
                    f"ONNX Runtime's thread pool could not be created ({error}). "
                    "Load the DashRuntime before any other ONNX Runtime session of this process."
                ) from error
            _pool_threads = wanted
    if wanted != _pool_threads and threads:
        logger.warning("ONNX Runtime already runs with %d threads here; %d is not applied", _pool_threads, wanted)
    return _pool_threads


def session_options(own_threads: bool = False) -> ort.SessionOptions:
    """Return options for a session with threads of its own, or on the process-wide pool, which is there then."""
    if not own_threads:
        start_thread_pool(0)
    options = ort.SessionOptions()
    options.use_per_session_threads = own_threads
    options.log_severity_level = 3
    return options


@contextmanager
def ort_errors(graph: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises inside the block into a BackendError that names the graph."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"ONNX Runtime {ort.__version__} refuses {graph}: {error}") from error


_HEADS = re.compile(rb"\x2a(.)\x0a(.)(\w*num_heads)\x18([\x80-\xff]?[\x01-\x7f])\xa0\x01\x02", re.DOTALL)
"""A node's attribute that is a number of heads, from 1 to 16,383, as protobuf encodes it."""


def check_heads(path: Path) -> None:
    """Raise BackendError for an absurd number of heads, or 0: ONNX Runtime cuts it to 32 bits and divides by it."""
    with ort_errors(path.name):
        graph = path.read_bytes()
    sound = 0
    for length, name_length, name, count in _HEADS.findall(graph):
        sound += length[0] == len(name) + len(count) + 6 and name_length[0] == len(name)
    if sound != graph.count(b"num_heads"):
        raise BackendError(f"{path.name} has an attention of no heads, or of more than there are. {_BUILD_AGAIN}")


class OrtEngine:
    """One InferenceSession, shared between sessions of the runtime."""

    def __init__(self, path: Path, options: ort.SessionOptions) -> None:
        self._name = path.name
        check_heads(path)
        with ort_errors(path.name):
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
            # Inside `ort_errors`, because a name may be no valid text.
            self._shapes = {item.name: item.shape for item in (*inputs, *outputs)}
            self.inputs = tuple(item.name for item in inputs)
            self.outputs = tuple(item.name for item in outputs)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run once on arrays that are copied, and return all outputs. Raises BackendError where a run fails."""
        with ort_errors(self._name):
            return dict(zip(self.outputs, self.session.run(None, inputs), strict=True))

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        """Fix the addresses of all inputs and outputs. An output may share its input's memory (KV cache). Raises
        BackendError where the graph wants an array that is not there, or another shape of it.
        """
        binding = self.session.io_binding()
        for names, arrays, bind in (
            (self.inputs, inputs, binding.bind_input),
            (self.outputs, outputs, binding.bind_output),
        ):
            for name in names:
                if name not in arrays:
                    raise BackendError(f"{self._name} wants {name}, which this runtime does not have. {_BUILD_AGAIN}")
                array, expected = arrays[name], self._shapes[name]
                shape = fitted_shape(array.shape, expected)
                if shape is None:
                    raise BackendError(f"{self._name} wants {name} {expected}, not {list(array.shape)}. {_BUILD_AGAIN}")
                bind(name, "cpu", 0, array.dtype, shape, array.ctypes.data)
        launch = _Launch(self.session._sess.run_with_iobinding, binding._iobinding, _RUN_OPTIONS)
        launch.memory = (inputs, outputs, binding)
        launch.engine = f"The engine {self._name} in ONNX Runtime {ort.__version__}"
        return launch


def fitted_shape(shape: tuple[int, ...], expected: Sequence[int | str | None]) -> tuple[int, ...] | None:
    """Return an array's shape as a graph wants it, or None where it does not fit. A lowered graph may have one
    dimension of rows in the place of [batch, sequence].
    """
    if len(shape) == len(expected) and all(
        type(size) is not int or size == given for size, given in zip(expected, shape, strict=True)
    ):
        return shape
    rows = [index for index, size in enumerate(expected) if type(size) is not int]
    if len(rows) != 1 or any(size != 1 for size in expected[: rows[0]]):
        return None
    inner = tuple(expected[rows[0] + 1 :])
    outer = len(shape) - len(inner)
    if outer < 1 or shape[outer:] != inner:
        return None
    return (1,) * rows[0] + (prod(shape[:outer]), *shape[outer:])


class _Launch(partial[None]):
    """Bound run: a C call without a Python frame of its own. The binding holds bare addresses, so `memory` keeps the
    arrays alive. `engine` names the engine for `backend_errors`.
    """

    memory: object = None
    engine = ""


class OrtBackend:
    """Engines on the CPU execution provider, sharing threads and the allocator."""

    def __init__(self, threads: int) -> None:
        start_thread_pool(threads)
        self._engines: dict[Path, OrtEngine] = {}
        self._options = session_options()
        # ONNX Runtime looks up an arena and its patterns at every run, thirty times a token: plain malloc is faster.
        self._options.enable_cpu_mem_arena = False
        self._options.enable_mem_pattern = False

    def load(self, path: Path) -> OrtEngine:
        """Load an engine file; each file is loaded only once. Raises BackendError where ONNX Runtime refuses it."""
        path = path.resolve()
        if path not in self._engines:
            self._engines[path] = OrtEngine(path, self._options)
        return self._engines[path]

    def load_build(self, bundle: Bundle, build: Build, dispatch: str) -> EngineSet | EncoderEngines:
        """Load all engines of a build. Raises PolicyError for a dispatch mode that needs streams."""
        if dispatch != "sync":
            raise PolicyError(f"Dispatch {dispatch!r} needs the streams of a GPU target: leave it out.")
        from dash_export.backends.host.decode import EngineSet
        from dash_export.backends.host.encoder_pass import EncoderEngines

        kind = EncoderEngines if bundle.manifest.model.decides == "input" else EngineSet
        keep_freed_memory()
        with on_huge_pages(build.recipe.runtime.huge_pages):
            return kind(bundle, build, self)


def create(_name: str, threads: int) -> OrtBackend:
    return OrtBackend(threads)
