"""CUDA graphs with decisions in them: capture and conditional nodes.

A unit is two IF nodes, one for each side (run, skip), which need CUDA 12.4. A kernel sets their predicates. Not yet run
on a GPU.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from dash_export.backends.cuda.cuda import Cuda, CudaMemory
from dash_export.backends.cuda.kernels import BINS, PART, load_kernels
from dash_export.errors import BackendError

IF_NODES = 12040
"""First version of CUDA with IF nodes, as the driver numbers its versions."""
BODY = "body"
"""Name of the stream on which the sides of branches are recorded."""


class CudaGraph:
    """Work that is recorded once and launched again and again: an executable graph, and the graph it was instantiated
    from, which owns the bodies of its conditional nodes. Both are freed with this object.

    `decide`, `branch` and `follow` are called by the step while it is recorded. All work that streams are given
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
        self._scratch: list[CudaMemory] = []
        # Relaxed: Python may free some memory meanwhile, which stricter modes treat as an error.
        mode = rt.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        handle, _ = cuda.stream(stream), cuda.stream(BODY)  # create both streams before the recording
        with suppress(BackendError):  # before the recording, in which older drivers load nothing; some steps need none
            load_kernels()
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
        keep_priorities = int(rt.cudaGraphInstantiateFlags.cudaGraphInstantiateFlagUseNodePriority)  # of streams
        self._handle = cuda(rt.cudaGraphInstantiate(graph, keep_priorities), " making a graph of a recording")
        weakref.finalize(self, rt.cudaGraphExecDestroy, self._handle)
        if self._device_handles is not None:  # once: they are the same in every launch
            cuda.copy(stream, self._device_handles, self._handles)
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
        self._cuda.kernel("decide", stream, (1, 1, 1), 32, memories, sizes)

    def branch(self, stream: str, unit: int, run: Callable[[str], None], skip: Callable[[str], None]) -> None:
        """Record a branch: one of `run` and `skip`, as decided about the unit, runs before what follows in `stream`.
        Each side is recorded now, on the stream that it is given and on no other.
        """
        for side, fill in enumerate((run, skip)):
            self._node(stream, int(self._handles[unit, side]), fill)

    def follow(
        self, stream: str, logits: CudaMemory, draws: CudaMemory, ids: CudaMemory, positions: CudaMemory
    ) -> None:
        """Record the step from one token to the next: ids [sequences] (int64) become those that are drawn from logits
        [sequences, vocab] (float32) as `draws` [sequences] (`sampling.Draw`, float64) say, but for rounding; positions
        [sequences] (int64) go on by one.
        """
        sequences = ids.nbytes // 8
        vocab = logits.nbytes // 4 // sequences
        parts = -(-vocab // PART)
        best, bins, sums = (self._cuda.memory(sequences * size) for size in (8, 8 * BINS, 4 * parts))
        self._scratch = [best, bins, sums]
        blocks, size = (min(64, parts), sequences, 1), [(vocab, ctypes.c_int)]
        run = self._cuda.kernel
        run("likeliest", stream, blocks, 64, (logits, best), size)
        run("weigh", stream, blocks, 64, (logits, best, draws, bins), size)
        run("add_up", stream, (parts, sequences, 1), 32, (logits, best, draws, bins, sums), size)
        run("follow", stream, (1, 1, 1), sequences, (logits, best, draws, bins, sums, ids, positions), size)

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
