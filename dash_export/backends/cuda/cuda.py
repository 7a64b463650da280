"""The driver of a device on CUDA, through `cuda-bindings` alone. Not yet run on a GPU.

A stream does all that it is given in order, some time later. Only events order the work of different streams. The host
knows that work has ended only by waiting for an event or a stream. All streams are non-blocking, so nothing waits for
the legacy default stream.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import no_layer_times
from dash_export.backends.cuda.cuda_devices import CudaDevice, cuda_devices
from dash_export.backends.cuda.kernels import load_kernels
from dash_export.bundle.records import Build
from dash_export.errors import BackendError

if TYPE_CHECKING:
    from dash_export.backends.cuda.cuda_graph import CudaGraph
    from dash_export.backends.cuda.device_encoder import DeviceEncoder
    from dash_export.backends.cuda.engines import DeviceEngines
    from dash_export.bundle.bundle import Bundle

logger = logging.getLogger(__name__)
MAIN, BESIDE = "main", "beside"
"""Names of streams: layers run on MAIN; the policy on BESIDE, first where both want the card, unless `sync`."""
Launch = Callable[[str], None]
"""Enqueue a bound engine on the stream of that name. Launches of engines loaded for different streams may overlap."""
LESS_MEMORY = "Use a smaller kv_capacity or prefill_chunk in the recipe, int4 weights, or fewer sessions."
# aarch64 wheels after 12.8.0 contain the CUDA runtime of ARM servers; 12.8.0 implements the API over the driver alone.
INSTALL = (
    "pip install cuda-bindings==12.8.0 (JetPack 6), 'cuda-bindings>=12.6,<13' (CUDA 12) or cuda-bindings (CUDA 13)"
)


def require_bindings() -> Any:
    """Import CUDA's runtime API. Raises BackendError that says how to install it."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(f"The package cuda-bindings is missing or does not load ({error}): {INSTALL}") from error


class CudaMemory:
    """Bytes on the device, zeroed when allocated, or a view of some; freed when the last view is gone."""

    def __init__(self, address: int, nbytes: int, whole: CudaMemory | None = None) -> None:
        self.address, self.nbytes, self._whole = address, nbytes, whole

    def part(self, offset: int, nbytes: int | None = None) -> CudaMemory:
        """Return a view of `nbytes` from `offset` on, or to the end; the view keeps the whole memory alive."""
        return CudaMemory(self.address + offset, self.nbytes - offset if nbytes is None else nbytes, self)


class DeviceEngine(Protocol):
    """A compiled engine of a backend, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, CudaMemory]) -> Launch:
        """Fix all inputs' shapes, and all addresses. An output may share its input's memory (KV cache)."""


class Cuda:
    """CUDA runtime on the first device: the common part of all backends on CUDA."""

    records = True
    """Whether what engines do can become part of a graph."""

    def __init__(self) -> None:
        """Open the first device. Raises BackendError that names what is missing: driver, device or bindings."""
        self.device: CudaDevice = cuda_devices()[0]
        self.name = f"{self.device.name} (compute capability {self.device.capability})"
        self.rt: Any = require_bindings()
        known = int(getattr(self.rt, "CUDART_VERSION", 0)) // 1000
        if known > float(self.device.driver):
            raise BackendError(
                f"The package cuda-bindings is for CUDA {known}, and the driver of {self.device.name} has CUDA "
                f"{self.device.driver}: {INSTALL}"
            )
        self(self.rt.cudaSetDevice(self.device.index))
        if self.device.integrated:  # a wait sleeps here by default; a token waits once, for a few ms: spin instead
            self(self.rt.cudaSetDeviceFlags(self.rt.cudaDeviceScheduleSpin))
        self.engines: dict[tuple[Path, str], Any] = {}
        self._streams: dict[str, int] = {}
        self._events: dict[str, Any] = {}

    def __call__(self, result: tuple[Any, ...], what: str = "") -> Any:
        """Return the value of a call (code, *values). Raises BackendError with CUDA's own words when it failed."""
        code, *values = result
        if code != self.rt.cudaError_t.cudaSuccess:
            name = self.rt.cudaGetErrorString(code)[1]
            text = name.decode() if isinstance(name, bytes) else str(name)
            raise BackendError(f"CUDA on {self.device.name} failed{what}: {text} ({int(code)}).")
        return tuple(values) if len(values) > 1 else values[0] if values else None

    def accept(self, build: Build, rebuild: str) -> None:
        """Raise BackendError with the command `rebuild` where the build's engines were not compiled for this device and
        this version. Without a backend's own checks accept every build.
        """

    def check_room(self, engines: Mapping[Path, int], cache: int) -> None:
        """Check for free memory before anything is loaded. `engines`: bytes of each engine file (loaded ones do not
        count); `cache`: bytes of one session's cache. Raises BackendError where so much is not free; only warns where
        host and device share their memory.
        """
        loaded = {path for path, _ in self.engines}
        weights = sum(nbytes for path, nbytes in engines.items() if path not in loaded)
        free, total = self.room()
        if weights + cache <= free:
            return
        said = (
            f"The engines take {weights / 1e6:.0f} MB and a session's cache {cache / 1e6:.0f} MB, and "
            f"{free / 1e6:.0f} of {total / 1e6:.0f} MB of {self.device.name} are free. {LESS_MEMORY}"
        )
        if not self.device.integrated:
            raise BackendError(said)
        logger.warning("%s Memory that files are kept in may be given back meanwhile.", said)

    def engine(self, path: Path, stream: str) -> DeviceEngine:
        """Return an engine that will run on the stream of that name, with that stream's scratch memory."""
        key = (path, stream)
        if key not in self.engines:
            self.engines[key] = self.load(path, stream)
        return self.engines[key]  # type: ignore[no-any-return]

    def load(self, path: Path, stream: str) -> Any:
        """Load an engine of the backend. Raises BackendError when the backend refuses the file."""
        raise NotImplementedError

    def load_build(self, bundle: Bundle, build: Build, dispatch: str) -> DeviceEngines | DeviceEncoder:
        """Load all engines of a build. Raises BackendError where they do not fit this device."""
        from dash_export.backends.cuda.device_encoder import DeviceEncoder
        from dash_export.backends.cuda.engines import DeviceEngines

        self.accept(build, bundle.build_command(build.target))
        if bundle.manifest.model.decides == "input":
            return DeviceEncoder(bundle, build, self)
        return DeviceEngines(bundle, build, self, dispatch)

    def layer_times(self, _launch: Launch, _run: Callable[[], object]) -> dict[str, float]:
        """Return the median microseconds of each layer of a bound engine, in the order they ran, while `run` launches
        it. That binding is of no use afterwards. Raises BackendError where the backend does not tell.
        """
        no_layer_times()

    # --- memory

    def room(self) -> tuple[int, int]:
        """Return the bytes that are free on the device, and all."""
        free, total = self(self.rt.cudaMemGetInfo())
        return int(free), int(total)

    def memory(self, nbytes: int) -> CudaMemory:
        """Return new memory. Raises BackendError that says how much was asked for and how much is free."""
        rt, size = self.rt, max(nbytes, 1)
        code, address = rt.cudaMalloc(size)
        if code == rt.cudaError_t.cudaErrorMemoryAllocation:
            rt.cudaGetLastError()  # a failed allocation is not sticky
            free, total = self.room()
            raise BackendError(
                f"{self.device.name} is out of memory: {size / 1e6:.1f} MB were asked for and {free / 1e6:.1f} of "
                f"{total / 1e6:.0f} MB are free. {LESS_MEMORY}"
            )
        memory = CudaMemory(int(self((code, address))), nbytes)
        weakref.finalize(memory, rt.cudaFree, memory.address)
        self(rt.cudaMemsetAsync(memory.address, 0, size, self.stream("setup")))
        self.synchronize("setup")
        return memory

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return page-locked host memory, zeroed."""
        rt = self.rt
        address = int(self(rt.cudaHostAlloc(max(nbytes, 1), rt.cudaHostAllocDefault)))
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        array: npt.NDArray[np.uint8] = np.ctypeslib.as_array(buffer)
        array[:] = 0
        # Views keep the ctypes object alive, and with it the memory.
        weakref.finalize(buffer, rt.cudaFreeHost, address)
        return array

    def copy(self, stream: str, to: Any, source: Any) -> None:
        """Enqueue a copy of all of `source` to `to`: memory of the device, or a pinned host array, which must not
        change until the stream has passed the copy.
        """
        rt = self.rt
        kind = rt.cudaMemcpyKind.cudaMemcpyDefault
        self(rt.cudaMemcpyAsync(_address(to), _address(source), source.nbytes, kind, self.stream(stream)))

    def copy_rows(
        self, stream: str, to: CudaMemory, pitch: int, source: CudaMemory, source_pitch: int, width: int, rows: int
    ) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes, `source_pitch` bytes apart in `source`, `pitch` in `to`."""
        rt, handle = self.rt, self.stream(stream)
        kind = rt.cudaMemcpyKind.cudaMemcpyDefault
        self(rt.cudaMemcpy2DAsync(to.address, pitch, source.address, source_pitch, width, rows, kind, handle))

    def kernel(
        self,
        name: str,
        stream: str,
        blocks: tuple[int, int, int],
        threads: int,
        memories: Sequence[CudaMemory],
        numbers: Sequence[tuple[int, Any]],
    ) -> None:
        """Enqueue one of `kernels`. `numbers`: its arguments after the memories, with their types."""
        driver: Any = import_module("cuda.bindings.driver")
        pointers: list[tuple[int, Any]] = [(memory.address, ctypes.c_void_p) for memory in memories]
        arguments, kernel, (x, y, z) = tuple(zip(*pointers, *numbers, strict=True)), load_kernels()[name], blocks
        (code,) = driver.cuLaunchKernel(kernel, x, y, z, threads, 1, 1, 0, self.stream(stream), arguments, 0)
        if int(code):
            raise BackendError(f"CUDA could not launch {name}: {code.name} ({int(code)}).")

    # --- order

    def stream(self, name: str) -> int:
        """Return the handle of the stream of that name; create the stream at first use."""
        if name not in self._streams:
            _, first = self(self.rt.cudaDeviceGetStreamPriorityRange())
            flags, priority = self.rt.cudaStreamNonBlocking, first if name == BESIDE else 0
            self._streams[name] = int(self(self.rt.cudaStreamCreateWithPriority(flags, priority)))
        return self._streams[name]

    def _event(self, name: str, timed: bool = False) -> Any:
        if name not in self._events:
            flags = self.rt.cudaEventDefault if timed else self.rt.cudaEventDisableTiming
            self._events[name] = self(self.rt.cudaEventCreateWithFlags(flags))
        return self._events[name]

    def record(self, stream: str, event: str) -> None:
        """Enqueue the event: it happens when the stream has done its work so far."""
        self(self.rt.cudaEventRecord(self._event(event), self.stream(stream)))

    def stamp(self, stream: str, event: str) -> None:
        """Enqueue the event as `record` does, with the time: an event of that name is for `between` alone."""
        self(self.rt.cudaEventRecord(self._event(event, timed=True), self.stream(stream)))

    def between(self, first: str, second: str) -> float:
        """Return the microseconds from one stamp to another, by the device's clock. Both must have happened."""
        begin, end = self._event(first, timed=True), self._event(second, timed=True)
        return 1e3 * float(self(self.rt.cudaEventElapsedTime(begin, end), f" between {first} and {second}"))

    def wait(self, stream: str, event: str) -> None:
        """Make later work of this stream wait for the event; the host does not wait."""
        self(self.rt.cudaStreamWaitEvent(self.stream(stream), self._event(event), 0))

    def wait_for_event(self, event: str) -> None:
        """Block the host until the event's stream has passed the event."""
        self(self.rt.cudaEventSynchronize(self._event(event)), f" before {event}")

    def synchronize(self, stream: str) -> None:
        """Block the host until the stream has done all its work."""
        self(self.rt.cudaStreamSynchronize(self.stream(stream)), f" on the stream {stream}")

    def graph(self, stream: str, units: int, step: Callable[[CudaGraph], None]) -> CudaGraph:
        """Record what `step` enqueues; it begins and ends in `stream`. Raises BackendError where that is impossible."""
        from dash_export.backends.cuda.cuda_graph import CudaGraph

        return CudaGraph(self, stream, units, step)


class PromptMemory:
    """Memory of one session's prompts. Every step of many tokens asks for the same buffers in the same order, so each
    step takes over the buffers of the step before, whatever its length. A buffer that is too small is replaced by one
    of at least twice its size.
    """

    def __init__(self, device: Cuda) -> None:
        self._device, self._kept, self._asked = device, list[Any](), 0

    def again(self) -> PromptMemory:
        """Start again with the first buffer."""
        self._asked = 0
        return self

    def memory(self, nbytes: int) -> Any:
        return self._next(self._device.memory, nbytes).part(0, nbytes)

    def pinned(self, nbytes: int) -> Any:
        return self._next(self._device.pinned, nbytes)[:nbytes]

    def _next(self, make: Callable[[int], Any], nbytes: int) -> Any:
        place, self._asked = self._asked, self._asked + 1
        if place == len(self._kept):
            self._kept.append(make(nbytes))
        elif self._kept[place].nbytes < nbytes:
            self._kept[place] = make(max(nbytes, 2 * self._kept[place].nbytes))
        return self._kept[place]


class Mirror:
    """An array on the device (`memory`) and in pinned memory: `host`, the first of `hosts`."""

    def __init__(
        self, device: Cuda | PromptMemory, shape: tuple[int, ...], dtype: npt.DTypeLike, hosts: int = 1
    ) -> None:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.hosts: list[npt.NDArray[Any]] = [device.pinned(nbytes).view(dtype).reshape(shape) for _ in range(hosts)]
        self.host = self.hosts[0]
        self.memory: Any = device.memory(nbytes)


def _address(place: Any) -> int:
    return int(place.address if isinstance(place, CudaMemory) else place.ctypes.data)
