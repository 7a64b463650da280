"""TensorRT engines on CUDA streams. Contexts of one stream share one block of scratch memory: they run one after
another; those of the policy's stream have their own.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dash_export.errors import BackendError
from dash_export.manifest import Build
from dash_export.runtime.device.cuda import CudaMemory
from dash_export.runtime.device.cuda_resources import CudaResources

BACKEND = "tensorrt"


class TensorRT(CudaResources):
    """`tensorrt` or `tensorrt_rtx` on the first CUDA device."""

    def __init__(self, backend: str) -> None:
        super().__init__()  # asks the driver first: TensorRT's Runtime may crash where there is no device
        from dash_export.runtime.device.trt_api import load_toolkit

        self.backend = backend
        self.toolkit = load_toolkit(backend)
        self.trt: Any = self.toolkit.trt
        self.runtime: Any = self.trt.Runtime(self.toolkit.logger)
        self._engines: dict[tuple[Path, str], TensorRTEngine] = {}
        self._scratch: dict[str, Scratch] = {}

    def accept(self, build: Build, rebuild: str) -> None:
        assert build.recipe.engine is not None
        wanted, here = build.recipe.engine.capabilities, self.cuda.device.capability
        if build.backend_version != self.toolkit.version:
            raise BackendError(
                f"The engines for {build.target!r} were compiled by {self.backend} {build.backend_version} and this "
                f"machine has {self.toolkit.version}; a plan runs only on its own version. Build again here: {rebuild}"
            )
        if here not in wanted:
            raise BackendError(
                f"The engines for {build.target!r} are for compute capability {', '.join(wanted)}, and "
                f"{self.cuda.device.name} has {here}. Build for a target of this device."
            )

    def engine(self, path: Path, stream: str) -> TensorRTEngine:
        key = (path, stream)
        if key not in self._engines:
            scratch = self._scratch.setdefault(stream, Scratch(self, stream))
            self._engines[key] = TensorRTEngine(self, path, scratch)
        return self._engines[key]


class Scratch:
    """One block for all contexts of a stream, as large as the largest of them wants."""

    def __init__(self, device: CudaResources, stream: str) -> None:
        self._device, self.stream = device, stream
        self._memory: CudaMemory | None = None
        # Weakly: a session makes contexts for every length of prompt, and drops them.
        self._contexts: weakref.WeakSet[TensorRTContext] = weakref.WeakSet()

    def give(self, newcomer: TensorRTContext) -> None:
        """Let a context use the block; every other one follows when it has to grow."""
        self._contexts.add(newcomer)
        if self._memory is not None and self._memory.nbytes >= newcomer.nbytes:
            newcomer.work_in(self._memory)
            return
        self._device.stream(self.stream).synchronize()
        self._device.moves += self._memory is not None
        self._memory = self._device.memory(newcomer.nbytes)
        for each in self._contexts:
            each.work_in(self._memory)


class TensorRTEngine:
    """A plan file, mapped and deserialized when it is first asked for anything."""

    def __init__(self, device: TensorRT, path: Path, scratch: Scratch) -> None:
        self._device, self._path, self._scratch = device, path, scratch
        self._engine: Any = None
        self._names: dict[bool, list[str]] = {True: [], False: []}
        # Per profile, what dropped contexts leave: a prompt of another length binds one anew instead of making one.
        self._free: defaultdict[int, list[Any]] = defaultdict(list)

    def loaded(self) -> Any:
        """Raises BackendError when TensorRT refuses the file."""
        if self._engine is None:
            trt, toolkit = self._device.trt, self._device.toolkit
            with self._path.open("rb") as file, toolkit.logger.collected() as complaints:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan, memoryview(plan) as view:
                    engine = self._device.runtime.deserialize_cuda_engine(view)
                if engine is None:
                    reason = complaints[-1] if complaints else "it gave no reason"
                    raise BackendError(f"{toolkit.describe()} refuses {self._path.name}: {reason}. Build again here.")
            for index in range(engine.num_io_tensors):
                name = engine.get_tensor_name(index)
                self._names[engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT].append(name)
            self._engine = engine
        return self._engine

    def inputs(self) -> Sequence[str]:
        self.loaded()
        return self._names[True]

    def outputs(self) -> Sequence[str]:
        self.loaded()
        return self._names[False]

    def dtype(self, name: str) -> np.dtype[Any]:
        dtype = self.loaded().get_tensor_dtype(name)
        return (
            np.dtype(np.uint16) if dtype == self._device.trt.DataType.BF16 else np.dtype(self._device.trt.nptype(dtype))
        )

    def context(
        self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, CudaMemory]
    ) -> TensorRTContext:
        engine, free = self.loaded(), self._free[profile]
        context = free.pop() if free else self._new_context(profile)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{self._path.name} does not take {name} {list(shape)}: build it again.")
        for name, part in memory.items():
            if not context.set_tensor_address(name, part.address):
                raise BackendError(f"{self._path.name} has no tensor {name}: build it again.")
        nbytes = int(engine.get_device_memory_size_for_profile_v2(profile))
        made = TensorRTContext(self._path.stem, self._scratch.stream, context, memory, nbytes)
        weakref.finalize(made, free.append, context).atexit = False
        self._scratch.give(made)
        return made

    def _new_context(self, profile: int) -> Any:
        strategy = self._device.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.loaded().create_execution_context(strategy)
        if context is None:
            raise BackendError(f"{self._path.name}: TensorRT made no context (out of device memory?).")
        stream = self._device.stream(self._scratch.stream)
        if profile and not context.set_optimization_profile_async(profile, stream.handle):
            raise BackendError(f"{self._path.name} has no profile {profile}: build it again.")
        return context


class TensorRTContext:
    """A context ready to launch, which wants `nbytes` of scratch memory. It keeps the memory it is bound to alive."""

    def __init__(self, name: str, scratch: str, context: Any, memory: Mapping[str, CudaMemory], nbytes: int) -> None:
        self.name, self.scratch, self.nbytes = name, scratch, nbytes
        self._context, self._memory = context, memory

    def work_in(self, block: CudaMemory) -> None:
        self._context.set_device_memory(block.address, self.nbytes)

    def enqueue(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise BackendError(f"TensorRT could not launch {self.name}.")


def create(_threads: int) -> TensorRT:
    return TensorRT(BACKEND)
