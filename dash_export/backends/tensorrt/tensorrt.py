"""TensorRT engines on CUDA streams. Engines of one stream run one after another, so they share one block of scratch
memory. The policy's stream has its own block.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from dash_export.backends.cuda.cuda import Cuda, CudaMemory, Launch
from dash_export.backends.tensorrt.trt_api import last_reason, load_toolkit
from dash_export.bundle.records import Build
from dash_export.errors import BackendError


class TensorRT(Cuda):
    """`tensorrt` or `tensorrt_rtx` on the first CUDA device."""

    def __init__(self, backend: str) -> None:
        super().__init__()  # asks the driver first: TensorRT's Runtime may crash where there is no device
        self.toolkit = load_toolkit(backend)
        self.trt: Any = self.toolkit.trt
        self.runtime: Any = self.trt.Runtime(self.toolkit.logger)
        self._scratch: dict[str, CudaMemory] = {}

    def accept(self, build: Build, rebuild: str) -> None:
        compiled = build.recipe.engine
        assert compiled is not None
        wanted, here = compiled.capabilities, self.device.capability
        if build.backend_version != self.toolkit.version:
            raise BackendError(
                f"The engines for {build.target!r} were compiled by {self.toolkit.backend} {build.backend_version} and "
                f"this machine has {self.toolkit.version}; a plan runs only on its own version. Build again here: "
                f"{rebuild}"
            )
        if here not in wanted:
            raise BackendError(
                f"The engines for {build.target!r} are for compute capability {', '.join(wanted)}, and "
                f"{self.device.name} has {here}. Build for a target of this device."
            )

    def load(self, path: Path, stream: str) -> TensorRTEngine:
        return TensorRTEngine(self, path, stream)

    def scratch(self, stream: str) -> CudaMemory:
        """Return the scratch block of all engines loaded for a stream. When an engine that needs more is loaded later,
        a new block is made; launches bound to the old block keep it.
        """
        wanted = max(each.scratch_bytes for (_, name), each in self.engines.items() if name == stream)
        if stream not in self._scratch or self._scratch[stream].nbytes < wanted:
            self._scratch[stream] = self.memory(wanted)
        return self._scratch[stream]

    def layer_times(self, launch: Any, run: Callable[[], object]) -> dict[str, float]:
        context, times = launch.context, _profiler(self.trt)
        launch.reuse.detach()  # a context never lets go of a profiler: this one goes with its launch
        context.profiler = times  # from now on each launch waits for its own end, and then tells
        run()
        if not any(map(sum, times.us.values())):
            raise BackendError(f"{self.toolkit.describe()} said nothing about an engine's layers: leave --layers out.")
        return {name: median(each) for name, each in times.us.items()}


class TensorRTEngine:
    """A plan file, mapped and deserialized for one stream."""

    def __init__(self, device: TensorRT, path: Path, stream: str) -> None:
        """Deserialize the file. Raises BackendError when TensorRT refuses it."""
        self._device, self._name, self._stream = device, path.name, stream
        trt, toolkit = device.trt, device.toolkit
        with path.open("rb") as file, toolkit.logger.collected() as complaints:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan, memoryview(plan) as view:
                engine = device.runtime.deserialize_cuda_engine(view)
            if engine is None:
                raise BackendError(
                    f"{toolkit.describe()} refuses {path.name}: {last_reason(complaints)}. Build again here."
                )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.inputs = tuple(name for name in names if name in inputs)
        self.outputs = tuple(name for name in names if name not in inputs)
        self.scratch_bytes = max(
            int(engine.get_device_memory_size_for_profile_v2(profile))
            for profile in range(engine.num_optimization_profiles)
        )
        self._engine = engine
        self._entry = entry = next((name for name in ("hidden", "input_ids") if name in inputs), self.inputs[0])
        self._most = [
            engine.get_tensor_profile_shape(entry, profile)[2][1] for profile in range(engine.num_optimization_profiles)
        ]
        # Contexts that dropped launches leave, per profile, and whether they are eager: making a context takes
        # milliseconds, and every prompt length needs its own binding.
        self._free: defaultdict[tuple[int, bool], list[Any]] = defaultdict(list)

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, CudaMemory]) -> Launch:
        # Of one token, because fallback kernels would be recorded for good, and of whole chunks of prompts and single
        # pictures, which come again. Lengths of other prompts, and numbers of pictures, are many.
        rows, tokens = shapes.get(self._entry, (1, 1))[:2]
        eager = tokens == 1 or (tokens == self._most[profile] and rows == 1)
        device, free = self._device, self._free[profile, eager]
        context = free.pop() if free else self._new_context(profile, eager)
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{self._name} does not take {name} {list(shape)}: build it again.")
        for name, place in memory.items():
            if not context.set_tensor_address(name, place.address):
                raise BackendError(f"{self._name} has no tensor {name}: build it again.")
        scratch = device.scratch(self._stream)
        context.set_device_memory(scratch.address, scratch.nbytes)

        def launch(stream: str) -> None:
            if not context.execute_async_v3(device.stream(stream)):
                raise BackendError(f"TensorRT could not launch {self._name}; the log may say why.")

        launch.memory = (memory, scratch)  # type: ignore[attr-defined]  # the context holds bare addresses
        launch.context, launch.reuse = context, weakref.finalize(launch, free.append, context)  # type: ignore[attr-defined]
        launch.reuse.atexit = False  # type: ignore[attr-defined]
        device.toolkit.keep_kernels()
        return launch

    def _new_context(self, profile: int, eager: bool) -> Any:
        device = self._device
        with device.toolkit.logger.collected() as complaints:
            context = device.toolkit.context(self._engine, device.device.capability, eager)
            if context is None:
                raise BackendError(f"TensorRT made no context of {self._name}: {last_reason(complaints)}.")
            try:
                # Not in the engine's stream, which another thread may be recording: this may copy something.
                if profile and not context.set_optimization_profile_async(profile, device.stream("setup")):
                    raise RuntimeError(last_reason(complaints))
            except RuntimeError as error:  # newer bindings raise it themselves
                raise BackendError(f"{self._name} has no profile {profile} ({error}): build it again.") from error
        device.synchronize("setup")
        return context


def _profiler(trt: Any) -> Any:
    """Return a new IProfiler. `us`: name of a layer -> its microseconds in each launch, in the order they ran."""

    class LayerTimes(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.us: defaultdict[str, list[float]] = defaultdict(list)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.us[layer_name].append(1e3 * ms)

    return LayerTimes()


def create(name: str, _threads: int) -> TensorRT:
    return TensorRT(name)
