"""What every backend on CUDA has in common: streams by name, events, device and pinned memory, recorded steps."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import numpy as np

from dash_export.errors import BackendError
from dash_export.runtime.device.base import Bytes
from dash_export.runtime.device.blocks import aligned
from dash_export.runtime.device.cuda import Cuda, CudaEvent, CudaMemory, CudaStream
from dash_export.runtime.device.cuda_graph import CudaGraph, CudaGraphs, CudaRecording


class CudaResources:
    """What every backend on CUDA has in common: streams by name, events, device and pinned memory."""

    def __init__(self) -> None:
        self.cuda = Cuda()
        self.name = f"{self.cuda.device.name} (compute capability {self.cuda.device.capability})"
        self.moves = 0
        self._streams: dict[str, CudaStream] = {}
        self._graphs: CudaGraphs | None = None

    def graph_obstacle(self) -> str | None:
        try:
            self._graphs = self._graphs or CudaGraphs(self.cuda)
        except BackendError as error:
            return str(error)
        return None

    def record(self, stream: CudaStream, step: Callable[[CudaRecording], None]) -> CudaGraph:
        obstacle = self.graph_obstacle()
        if self._graphs is None:
            raise BackendError(str(obstacle))
        return self._graphs.record(stream, step)

    def stream(self, name: str) -> CudaStream:
        if name not in self._streams:
            self._streams[name] = CudaStream(self.cuda, name)
        return self._streams[name]

    def event(self, name: str) -> CudaEvent:
        return CudaEvent(self.cuda, name)

    def memory(self, nbytes: int) -> CudaMemory:
        size = aligned(max(nbytes, 1))
        memory = CudaMemory(self.cuda.allocate(size), nbytes)
        weakref.finalize(memory, self.cuda.rt.cudaFree, memory.address)
        setup = self.stream("setup")
        setup.clear(memory)
        setup.synchronize()
        return memory

    def pinned(self, nbytes: int) -> Bytes:
        rt = self.cuda.rt
        address = int(self.cuda(rt.cudaHostAlloc(max(nbytes, 1), rt.cudaHostAllocDefault)))
        buffer = (ctypes.c_uint8 * nbytes).from_address(address)
        array: Bytes = np.ctypeslib.as_array(buffer)
        array[:] = 0
        # Views keep the ctypes object alive, and with it the memory.
        weakref.finalize(buffer, rt.cudaFreeHost, address)
        return array
