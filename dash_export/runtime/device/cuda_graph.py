"""CUDA graphs with decisions in them: capture, conditional nodes, and the two kernels that no engine has.

Conditional nodes need CUDA 12.4 (IF) or 12.8 (IF with ELSE). Their predicate is set by a kernel, which NVRTC compiles
when it is first wanted. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from dash_export.errors import BackendError
from dash_export.runtime.device.base import Decisions
from dash_export.runtime.device.cuda import Cuda, CudaMemory, CudaStream

IF, IF_ELSE = 12040, 12080
"""The first versions of CUDA with such nodes, as the driver gives its own."""

KERNELS = r"""
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(
    cudaGraphConditionalHandle handle, unsigned int value);

// Compares in double, as the host does. A unit's second handle is 0 where its node has an ELSE.
extern "C" __global__ void decide(
    const float* damage, const double* limit, bool* skipped, const cudaGraphConditionalHandle* handles, int units)
{
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
        const bool skips = (double)damage[unit] < limit[unit];
        skipped[unit] = skips;
        cudaGraphSetConditional(handles[2 * unit], !skips);
        if (handles[2 * unit + 1]) cudaGraphSetConditional(handles[2 * unit + 1], skips);
    }
}

// A block per table; rows are of two-byte elements at least.
extern "C" __global__ void write_rows(
    short* to, const short* rows, const long long* position, long long width, long long pitch)
{
    short* row = to + blockIdx.x * pitch + *position * width;
    for (long long i = threadIdx.x; i < width; i += blockDim.x) row[i] = rows[blockIdx.x * width + i];
}
"""


def compile_kernels(capability: str) -> bytes:
    """Machine code for a compute capability, such as "9.0"; no device is asked. Raises BackendError."""
    try:
        nvrtc: Any = import_module("cuda.bindings.nvrtc")
        program = _checked(nvrtc.nvrtcCreateProgram(KERNELS.encode(), b"dash_export.cu", 0, [], []))
        option = f"--gpu-architecture=sm_{capability.replace('.', '')}".encode()
        (code,) = nvrtc.nvrtcCompileProgram(program, 1, [option])
        if int(code):
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise BackendError(f"NVRTC does not compile for {capability}: {log.decode(errors='replace').strip()}")
        cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"NVRTC, which compiles two small kernels, is missing or fails ({error}): pip install nvidia-cuda-nvrtc "
            "(CUDA 13) or nvidia-cuda-nvrtc-cu12 (CUDA 12)"
        ) from error
    return cubin


def _checked(result: tuple[Any, ...]) -> Any:
    code, *values = result
    if int(code):
        raise RuntimeError(f"{code.name} ({int(code)})")
    return values[0] if values else None


class CudaGraphs:
    """What records on one device."""

    def __init__(self, cuda: Cuda) -> None:
        """Raises BackendError that says what is missing."""
        self.cuda = cuda
        self.version: int = cuda(cuda.rt.cudaDriverGetVersion())
        if self.version < IF:
            raise BackendError(
                f"the driver has CUDA {self.version // 1000}.{self.version % 1000 // 10}, and graphs with decisions "
                "need 12.4"
            )
        self.driver: Any = import_module("cuda.bindings.driver")
        try:
            module = _checked(self.driver.cuModuleLoadData(compile_kernels(cuda.device.capability)))
            self.kernels = {
                name: _checked(self.driver.cuModuleGetFunction(module, name.encode()))
                for name in ("decide", "write_rows")
            }
        except RuntimeError as error:
            raise BackendError(f"the driver does not load the kernels: {error}") from error
        self.body = CudaStream(cuda, "body")

    def record(self, stream: CudaStream, step: Callable[[CudaRecording], None]) -> CudaGraph:
        """Raises BackendError where something in `step` cannot be recorded."""
        cuda, rt = self.cuda, self.cuda.rt
        # Relaxed: Python may free some memory meanwhile, which stricter modes take for a mistake.
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        cuda(rt.cudaStreamBeginCapture(stream.handle, mode), " beginning to record")
        try:
            step(CudaRecording(self))
        except BaseException as error:
            code, graph = rt.cudaStreamEndCapture(stream.handle)
            if code == rt.cudaError_t.cudaSuccess:
                rt.cudaGraphDestroy(graph)
            if isinstance(error, RuntimeError):  # what the bindings raise for arguments they do not take
                raise BackendError(f"the bindings of CUDA refuse a call: {error}") from error
            raise
        graph = cuda(rt.cudaStreamEndCapture(stream.handle), " at the end of a recording")
        try:
            return CudaGraph(cuda, graph)
        except BackendError:
            rt.cudaGraphDestroy(graph)
            raise

    def launch(self, name: str, stream: int, blocks: int, threads: int, arguments: Sequence[tuple[Any, Any]]) -> None:
        """`arguments`: (value, ctypes type)."""
        parameters = tuple(zip(*arguments, strict=True))
        code = self.driver.cuLaunchKernel(self.kernels[name], blocks, 1, 1, threads, 1, 1, 0, stream, parameters, 0)[0]
        if int(code):
            raise BackendError(f"CUDA on {self.cuda.device.name} could not launch {name}: {code.name} ({int(code)}).")


class CudaRecording:
    """A capture that is going on."""

    def __init__(self, graphs: CudaGraphs) -> None:
        self._graphs, self._cuda, self._rt = graphs, graphs.cuda, graphs.cuda.rt

    def decide(self, stream: CudaStream, decisions: Decisions) -> list[list[Any]]:
        """Returns, per unit, the handles of the conditional nodes to come: one with an ELSE, or one for each side."""
        graph = self._state(stream)[0]
        count, values = 1 if self._graphs.version >= IF_ELSE else 2, decisions.host_handles
        units = [
            [self._cuda(self._rt.cudaGraphConditionalHandleCreate(graph, 0, 0)) for _ in range(count)] for _ in values
        ]
        for value, handles in zip(values, units, strict=True):
            value[:] = [int(handle) for handle in (*handles, 0)[:2]]
        memories: tuple[Any, ...] = (decisions.damage, decisions.limit, decisions.skipped, decisions.handles)
        arguments: list[tuple[int, Any]] = [(each.address, ctypes.c_void_p) for each in memories]
        self._graphs.launch("decide", stream.handle, 1, 32, [*arguments, (len(units), ctypes.c_int)])
        return units

    def branch(
        self,
        stream: CudaStream,
        decided: list[Any],
        run: Callable[[CudaStream], None],
        skip: Callable[[CudaStream], None],
    ) -> None:
        if len(decided) == 1:
            self._node(stream, decided[0], [run, skip])
        else:
            self._node(stream, decided[0], [run])
            self._node(stream, decided[1], [skip])

    def write_rows(
        self, stream: CudaStream, to: CudaMemory, pitch: int, rows: CudaMemory, width: int, position: CudaMemory
    ) -> None:
        addresses: list[tuple[int, Any]] = [(each.address, ctypes.c_void_p) for each in (to, rows, position)]
        sizes = [(size // 2, ctypes.c_longlong) for size in (width, pitch)]
        self._graphs.launch("write_rows", stream.handle, rows.nbytes // width, 64, addresses + sizes)

    def _state(self, stream: CudaStream) -> tuple[Any, Any]:
        """The graph in the making, and the nodes that the stream's next one will depend on."""
        info = getattr(self._rt, "cudaStreamGetCaptureInfo_v3", self._rt.cudaStreamGetCaptureInfo)
        code, status, _, graph, nodes, *_ = info(stream.handle)
        self._cuda((code,), " while recording")
        if status != self._rt.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
            raise BackendError(f"The stream {stream.name} is not being recorded: something in the step ended it.")
        return graph, nodes

    def _node(self, stream: CudaStream, handle: Any, bodies: list[Callable[[CudaStream], None]]) -> None:
        """A conditional node after what is in `stream`, and its bodies."""
        rt, cuda = self._rt, self._cuda
        graph, before = self._state(stream)
        params = rt.cudaGraphNodeParams()
        params.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = handle
        params.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        params.conditional.size = len(bodies)
        # Bindings of CUDA 12 call these forms, which know of edges with data, _v2; those of CUDA 13 have no others.
        # A plain edge's data is all zero; CUDA 12 takes no None for it.
        add = getattr(rt, "cudaGraphAddNode_v2", rt.cudaGraphAddNode)
        follow = getattr(rt, "cudaStreamUpdateCaptureDependencies_v2", rt.cudaStreamUpdateCaptureDependencies)
        plain = [rt.cudaGraphEdgeData() for _ in before]
        node = cuda(add(graph, before, plain, len(before), params), " adding a branch")
        flags = rt.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        cuda(follow(stream.handle, [node], [rt.cudaGraphEdgeData()], 1, flags), " after a branch")
        body = self._graphs.body
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        for made, fill in zip(params.conditional.phGraph_out[: len(bodies)], bodies, strict=True):
            cuda(rt.cudaStreamBeginCaptureToGraph(body.handle, made, None, None, 0, mode), " beginning a branch")
            try:
                fill(body)
            finally:
                ended = rt.cudaStreamEndCapture(body.handle)
            cuda(ended, " at the end of a branch")


class CudaGraph:
    """An executable graph, and the one it was made of, which owns the bodies of its conditional nodes; freed with this
    object.
    """

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        self._cuda = cuda
        self._handle = cuda(cuda.rt.cudaGraphInstantiate(graph, 0), " making a graph of a recording")
        weakref.finalize(self, cuda.rt.cudaGraphExecDestroy, self._handle)
        weakref.finalize(self, cuda.rt.cudaGraphDestroy, graph)

    def launch(self, stream: CudaStream) -> None:
        self._cuda(self._cuda.rt.cudaGraphLaunch(self._handle, stream.handle), " launching a step")
