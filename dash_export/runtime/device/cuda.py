"""Memory, streams and events on CUDA, through `cuda-bindings` alone. Only non-blocking streams are used: nothing waits
for the legacy default stream.
"""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any, Protocol

import numpy.typing as npt

from dash_export.errors import BackendError
from dash_export.runtime.cuda_devices import CudaDevice, cuda_devices

INSTALL = "pip install 'cuda-bindings>=12.6,<13' (CUDA 12, JetPack 6) or cuda-bindings (CUDA 13)"


def require_bindings() -> Any:
    """CUDA's runtime API. Raises BackendError that says how to install it."""
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise BackendError(f"The package cuda-bindings is missing or does not load ({error}): {INSTALL}") from error


class Cuda:
    """The CUDA runtime on one device. A failing call raises BackendError with CUDA's own words."""

    def __init__(self) -> None:
        """Asks the driver first. Raises BackendError that says what is missing: driver, device or bindings."""
        self.device: CudaDevice = cuda_devices()[0]
        self.rt: Any = require_bindings()
        self(self.rt.cudaSetDevice(self.device.index))

    def __call__(self, result: tuple[Any, ...], what: str = "") -> Any:
        """The value of a call (code, *values). Raises BackendError when it failed."""
        code, *values = result
        if code != self.rt.cudaError_t.cudaSuccess:
            name = self.rt.cudaGetErrorString(code)[1]
            text = name.decode() if isinstance(name, bytes) else str(name)
            raise BackendError(f"CUDA on {self.device.name} failed{what}: {text} ({int(code)}).")
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        """An address. Raises BackendError that says what was asked and what is free."""
        code, address = self.rt.cudaMalloc(nbytes)
        if code == self.rt.cudaError_t.cudaErrorMemoryAllocation:
            self.rt.cudaGetLastError()  # a failed allocation is not sticky
            free, total = self.rt.cudaMemGetInfo()[1:]
            raise BackendError(
                f"{self.device.name} is out of memory: {nbytes / 1e6:.1f} MB were asked for and {free / 1e6:.1f} of "
                f"{total / 1e6:.0f} MB are free. Use a smaller kv_capacity or prefill_chunk in the recipe, int4 "
                "weights, or fewer sessions."
            )
        return int(self((code, address)))


class CudaMemory:
    """Bytes on the device, or a view of some; freed when the last view is gone."""

    def __init__(self, address: int, nbytes: int, whole: CudaMemory | None = None) -> None:
        self.address, self.nbytes, self._whole = address, nbytes, whole

    def part(self, offset: int, nbytes: int) -> CudaMemory:
        if not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are not inside {self.nbytes}")
        return CudaMemory(self.address + offset, nbytes, self)


class CudaEvent:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name
        self.handle = cuda(cuda.rt.cudaEventCreateWithFlags(cuda.rt.cudaEventDisableTiming))
        weakref.finalize(self, cuda.rt.cudaEventDestroy, self.handle)

    def wait(self) -> None:
        self._cuda(self._cuda.rt.cudaEventSynchronize(self.handle), f" before {self.name}")


class Enqueues(Protocol):
    """A context as CUDA's streams want it."""

    name: str

    def enqueue(self, stream: int) -> None:
        """Launch on the stream of that handle. Raises BackendError."""
        ...


class CudaStream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name
        self._kind = cuda.rt.cudaMemcpyKind.cudaMemcpyDefault
        self._stream = cuda(cuda.rt.cudaStreamCreateWithFlags(cuda.rt.cudaStreamNonBlocking))
        self.handle = int(self._stream)

    def run(self, context: Enqueues) -> None:
        context.enqueue(self.handle)

    def upload(self, to: CudaMemory, source: npt.NDArray[Any]) -> None:
        self._copy(to.address, source.ctypes.data, source.nbytes)

    def download(self, to: npt.NDArray[Any], source: CudaMemory) -> None:
        self._copy(to.ctypes.data, source.address, to.nbytes)

    def copy(self, to: CudaMemory, source: CudaMemory) -> None:
        self._copy(to.address, source.address, source.nbytes)

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        self._cuda(self._cuda.rt.cudaMemcpyAsync(to, source, nbytes, self._kind, self._stream))

    def copy_rows(
        self, to: CudaMemory, pitch: int, source: CudaMemory, source_pitch: int, width: int, rows: int
    ) -> None:
        rt = self._cuda.rt
        self._cuda(
            rt.cudaMemcpy2DAsync(to.address, pitch, source.address, source_pitch, width, rows, self._kind, self._stream)
        )

    def clear(self, memory: CudaMemory) -> None:
        self._cuda(self._cuda.rt.cudaMemsetAsync(memory.address, 0, memory.nbytes, self._stream))

    def record(self, event: CudaEvent) -> None:
        self._cuda(self._cuda.rt.cudaEventRecord(event.handle, self._stream))

    def wait(self, event: CudaEvent) -> None:
        self._cuda(self._cuda.rt.cudaStreamWaitEvent(self._stream, event.handle, 0))

    def synchronize(self) -> None:
        self._cuda(self._cuda.rt.cudaStreamSynchronize(self._stream), f" on the stream {self.name}")
