"""CUDA graphs with decisions in them: capture, conditional nodes, and kernels that no engine has.

A unit is two IF nodes, one for each side (run, skip), which need CUDA 12.4. A kernel sets their predicates. NVRTC
compiles it when it is first needed. Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.errors import BackendError
from dash_export.runtime.device.cuda import Cuda, CudaMemory

IF_NODES = 12040
"""First version of CUDA with IF nodes, as the driver numbers its versions."""
BODY = "body"
"""Name of the stream on which the sides of branches are recorded."""

# No library defines cudaGraphSetConditional: the driver resolves it when it loads the module, so nothing is linked
# (cuda-python tests conditional nodes with such a cubin; XLA sets two handles from one kernel in the same way).
KERNELS = r"""
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(
    cudaGraphConditionalHandle handle, unsigned int value);

// Compares in double, as the host does. A unit's handles: run, skip.
extern "C" __global__ void decide(const float* damage, const double* limit, bool* skipped,
    const cudaGraphConditionalHandle* handles, int units, int numbers)
{
    for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
        bool skips = true;
        for (int at = unit; at < numbers; at += units) skips &= (double)damage[at] < limit[at];
        skipped[unit] = skips;
        cudaGraphSetConditional(handles[2 * unit], !skips);
        cudaGraphSetConditional(handles[2 * unit + 1], skips);
    }
}

// A block per head, layer's K or V, and sequence; rows are of two-byte elements at least. A pair: the first of its
// tables, their new rows.
extern "C" __global__ void write_rows(
    short* const* pairs, const long long* position, long long width, long long pitch)
{
    const long long table = blockIdx.z * gridDim.x + blockIdx.x;
    short* row = pairs[2 * blockIdx.y] + table * pitch + position[blockIdx.z] * width;
    const short* rows = pairs[2 * blockIdx.y + 1] + table * width;
    for (long long i = threadIdx.x; i < width; i += blockDim.x) row[i] = rows[i];
}

// A row of blocks per sequence. `best` is zero, and gets the largest logit, as bits that are ordered as numbers are,
// before the number of its token, counted down: of equals the first wins, as in numpy. -0 + 0 is 0, which equals it.
extern "C" __global__ void likeliest(const float* logits, unsigned long long* best, int vocab)
{
    unsigned long long largest = 0;
    for (int token = blockIdx.x * blockDim.x + threadIdx.x; token < vocab; token += gridDim.x * blockDim.x) {
        const unsigned int bits = __float_as_uint(logits[(long long)blockIdx.y * vocab + token] + 0.0f);
        const unsigned int ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
        const unsigned long long found = (unsigned long long)ordered << 32 | (unsigned int)(0x7fffffff - token);
        if (found > largest) largest = found;
    }
    atomicMax(best + blockIdx.y, largest);
}

// A thread per sequence.
extern "C" __global__ void follow(unsigned long long* best, long long* ids, long long* positions)
{
    ids[threadIdx.x] = 0x7fffffff - (int)(unsigned int)best[threadIdx.x];
    positions[threadIdx.x] += 1;
    best[threadIdx.x] = 0;
}
"""
NAMES = ("decide", "write_rows", "likeliest", "follow")


def compile_kernels(capability: str) -> bytes:
    """Compile the kernels for a compute capability, such as "9.0", to machine code; no device is needed. Raises
    BackendError.
    """
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
            f"NVRTC, which compiles small kernels, is missing or fails ({error}): pip install nvidia-cuda-nvrtc "
            "(CUDA 13) or nvidia-cuda-nvrtc-cu12 (CUDA 12)"
        ) from error
    return cubin


@cache
def load_kernels(capability: str) -> dict[str, Any]:
    """Return the kernels by name, loaded into this process once. Raises BackendError."""
    driver: Any = import_module("cuda.bindings.driver")
    code = compile_kernels(capability)
    try:
        module = _checked(driver.cuModuleLoadData(code))
        return {name: _checked(driver.cuModuleGetFunction(module, name.encode())) for name in NAMES}
    except RuntimeError as error:
        raise BackendError(f"the driver does not load the kernels: {error}") from error


def _checked(result: tuple[Any, ...]) -> Any:
    code, *values = result
    if int(code):
        raise RuntimeError(f"{code.name} ({int(code)})")
    return values[0] if values else None


class CudaGraph:
    """A step that is recorded once and launched again and again: an executable graph, and the graph it was instantiated
    from, which owns the bodies of its conditional nodes. Both are freed with this object.

    `decide`, `branch` and `write_rows` are called by the step while it is recorded. All work that streams are given
    meanwhile is recorded. Streams must wait for one another as ever; the host must not wait for anything.
    """

    def __init__(self, cuda: Cuda, stream: str, units: int, step: Callable[[CudaGraph], None]) -> None:
        """Record `step`. Raises BackendError that says what is missing, or what in `step` cannot be recorded."""
        self._cuda, rt = cuda, cuda.rt
        version = cuda(rt.cudaDriverGetVersion())
        if units and version < IF_NODES:
            raise BackendError(
                f"the driver has CUDA {version // 1000}.{version % 1000 // 10}, and graphs with decisions need 12.4"
            )
        # Handles of conditional nodes, which `decide` creates: per unit one to run it and one to skip it.
        self._handles = np.zeros((units, 2), np.uint64)
        self._device_handles = cuda.memory(self._handles.nbytes) if units else None
        self._tables: list[tuple[CudaMemory, npt.NDArray[np.uint64]]] = []
        self._best: CudaMemory | None = None
        if self._device_handles is not None:
            self._tables.append((self._device_handles, self._handles))
        # Relaxed: Python may free some memory meanwhile, which stricter modes treat as an error.
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        handle, _ = cuda.stream(stream), cuda.stream(BODY)  # create both streams before the recording
        cuda(rt.cudaStreamBeginCapture(handle, mode), " beginning to record")
        try:
            step(self)
        except BaseException as error:
            code, graph = rt.cudaStreamEndCapture(handle)
            if code == rt.cudaError_t.cudaSuccess:
                rt.cudaGraphDestroy(graph)
            if isinstance(error, RuntimeError):  # what the bindings raise for arguments they do not take
                raise BackendError(f"the bindings of CUDA refuse a call: {error}") from error
            raise
        graph = cuda(rt.cudaStreamEndCapture(handle), " at the end of a recording")
        weakref.finalize(self, rt.cudaGraphDestroy, graph)
        self._handle = cuda(rt.cudaGraphInstantiate(graph, 0), " making a graph of a recording")
        weakref.finalize(self, rt.cudaGraphExecDestroy, self._handle)
        for memory, table in self._tables:  # once: the tables are the same in every launch
            cuda.copy(stream, memory, table)
        cuda.synchronize(stream)

    def launch(self, stream: str) -> None:
        self._cuda(self._cuda.rt.cudaGraphLaunch(self._handle, self._cuda.stream(stream)), " launching a step")

    # --- while it is recorded

    def decide(self, stream: str, damage: CudaMemory, limits: CudaMemory, skipped: CudaMemory) -> None:
        """Record all decisions, one per unit: skipped [units] (bool) is true where damage [sequences, units] (float32)
        < limits [sequences, units] (float64) for every sequence, as in `DecisionRule.skips`.
        """
        rt, graph = self._cuda.rt, self._recorded(stream)[0]
        for index in np.ndindex(self._handles.shape):
            self._handles[index] = int(self._cuda(rt.cudaGraphConditionalHandleCreate(graph, 0, 0)))
        assert self._device_handles is not None
        memories = (damage, limits, skipped, self._device_handles)
        sizes = [(size, ctypes.c_int) for size in (len(self._handles), limits.nbytes // 8)]
        self._run("decide", stream, (1, 1, 1), 32, memories, sizes)

    def branch(self, stream: str, unit: int, run: Callable[[str], None], skip: Callable[[str], None]) -> None:
        """Record a branch: one of `run` and `skip`, as decided about the unit, runs before what follows in `stream`.
        Each side is recorded now, on the stream that it is given and on no other.
        """
        for side, fill in enumerate((run, skip)):
            self._node(stream, int(self._handles[unit, side]), fill)

    def write_rows(
        self,
        stream: str,
        pairs: Sequence[tuple[CudaMemory, CudaMemory]],
        pitch: int,
        width: int,
        position: CudaMemory,
    ) -> None:
        """Record the write of new K and V rows into the cache, for pairs (cache, new rows). The cache has tables of
        rows, `pitch` bytes apart: equally many for each sequence, one sequence after another. Each table gets the next
        `width` bytes of the new rows, at the row that `position` [sequences] (int64, on the device) says.
        """
        table = np.array([[to.address, rows.address] for to, rows in pairs], np.uint64)
        memory = self._cuda.memory(table.nbytes)
        self._tables.append((memory, table))
        sizes = [(size // 2, ctypes.c_longlong) for size in (width, pitch)]
        sequences = position.nbytes // 8
        heads = pairs[0][1].nbytes // width // sequences
        self._run("write_rows", stream, (heads, len(pairs), sequences), 64, (memory, position), sizes)

    def follow(self, stream: str, logits: CudaMemory, ids: CudaMemory, positions: CudaMemory) -> None:
        """Record the step from one token to the next: ids [sequences] (int64) become those of the largest logits
        [sequences, vocab] (float32), and positions [sequences] (int64) go on by one.
        """
        sequences = ids.nbytes // 8
        vocab = logits.nbytes // 4 // sequences
        self._best = self._cuda.memory(8 * sequences)
        blocks = (min(64, -(-vocab // 512)), sequences, 1)
        self._run("likeliest", stream, blocks, 64, (logits, self._best), [(vocab, ctypes.c_int)])
        self._run("follow", stream, (1, 1, 1), sequences, (self._best, ids, positions), [])

    def _run(
        self,
        name: str,
        stream: str,
        blocks: tuple[int, int, int],
        threads: int,
        memories: Sequence[CudaMemory],
        numbers: Sequence[tuple[int, Any]],
    ) -> None:
        driver: Any = import_module("cuda.bindings.driver")
        addresses: list[tuple[int, Any]] = [(each.address, ctypes.c_void_p) for each in memories]
        arguments = tuple(zip(*addresses, *numbers, strict=True))
        kernel, handle = load_kernels(self._cuda.device.capability)[name], self._cuda.stream(stream)
        x, y, z = blocks
        (code,) = driver.cuLaunchKernel(kernel, x, y, z, threads, 1, 1, 0, handle, arguments, 0)
        if int(code):
            raise BackendError(f"CUDA on {self._cuda.device.name} could not launch {name}: {code.name} ({int(code)}).")

    def _recorded(self, stream: str) -> tuple[Any, Any]:
        """Return the graph that is being recorded, and the nodes that the stream's next node will depend on."""
        rt = self._cuda.rt
        info = getattr(rt, "cudaStreamGetCaptureInfo_v3", rt.cudaStreamGetCaptureInfo)
        code, _, _, graph, nodes, *_ = info(self._cuda.stream(stream))
        self._cuda((code,), " while recording")
        return graph, nodes

    def _node(self, stream: str, condition: int, fill: Callable[[str], None]) -> None:
        """Add a conditional node after what is in `stream`, and record its body."""
        rt, cuda = self._cuda.rt, self._cuda
        graph, before = self._recorded(stream)
        params = rt.cudaGraphNodeParams()
        params.type = rt.cudaGraphNodeType.cudaGraphNodeTypeConditional
        params.conditional.handle = condition
        params.conditional.type = rt.cudaGraphConditionalNodeType.cudaGraphCondTypeIf
        params.conditional.size = 1
        # Bindings of CUDA 12 name the functions that take edge data _v2; those of CUDA 13 have no others. The data of a
        # plain edge is all zero; CUDA 12 takes no None for it.
        add = getattr(rt, "cudaGraphAddNode_v2", rt.cudaGraphAddNode)
        follow = getattr(rt, "cudaStreamUpdateCaptureDependencies_v2", rt.cudaStreamUpdateCaptureDependencies)
        plain = [rt.cudaGraphEdgeData() for _ in before]
        node = cuda(add(graph, before, plain, len(before), params), " adding a branch")
        flags = rt.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
        cuda(follow(cuda.stream(stream), [node], [rt.cudaGraphEdgeData()], 1, flags), " after a branch")
        mode, body = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed, cuda.stream(BODY)
        (made,) = params.conditional.phGraph_out[:1]
        cuda(rt.cudaStreamBeginCaptureToGraph(body, made, None, None, 0, mode), " beginning a branch")
        try:
            fill(BODY)
        finally:
            ended = rt.cudaStreamEndCapture(body)
        cuda(ended, " at the end of a branch")
