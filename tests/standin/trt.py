"""TensorRT without a card: a builder that keeps the graph, and a runtime that runs it in ONNX Runtime on the stand-in's
streams, by the rules of `IExecutionContext`. The same under TensorRT-RTX's name, with the rules of its own.

An engine works on its memory from its launch to its end, and what other streams do may come between: its outputs and
scratch memory are rubbish meanwhile, and what it reads must stay as it is. In memory its numbers have 16 bits where the
graph says so; between them it computes in float32, as ONNX Runtime has no bfloat16 on a CPU.
"""

from __future__ import annotations

import pickle
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from dash_export.backends.onnxruntime.ort_engine import session_options
from tests.standin.cuda import Card
from tests.standin.memory import POISON, rule

TYPES: dict[int, Any] = {1: np.float32, 7: np.int64, 9: np.bool_, 10: np.float16, 16: ml_dtypes.bfloat16}
"""By the number of an element type in ONNX."""
FLOAT, HALVES = 1, (10, 16)
SCRATCH = 512


def widened(model: onnx.ModelProto) -> dict[str, Any]:
    """Make every number of 16 bits one of 32, in place. Return the types that inputs and outputs had."""
    graph, types = model.graph, dict[str, Any]()
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        types[value.name] = np.dtype(TYPES[kind.elem_type])
        kind.elem_type = FLOAT if kind.elem_type in HALVES else kind.elem_type
    for held in graph.initializer:
        if held.data_type in HALVES:
            held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held).astype(np.float32), held.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i in HALVES:
                attribute.i = FLOAT
    del graph.value_info[:]
    return types


class Network:
    num_layers = 0

    def __init__(self) -> None:
        self.name, self.model = "", b""
        self.inputs: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        return self.inputs[index]


class Parser:
    num_errors = 0

    def __init__(self, network: Network, _logger: Any) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        self.network.name, self.network.model = Path(path).stem, model.SerializeToString()
        for value in model.graph.input:
            shape = tuple(-1 if size.dim_param else size.dim_value for size in value.type.tensor_type.shape.dim)
            self.network.inputs.append(SimpleNamespace(name=value.name, shape=shape))
        return True


class Profile(dict[str, Any]):
    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self[name] = shapes


class Config(SimpleNamespace):
    def __init__(self) -> None:
        super().__init__(flags=[], profiles=[])
        self.set_memory_pool_limit = lambda *_: None
        self.set_timing_cache = lambda *_, **__: True
        self.add_optimization_profile, self.set_flag = self.profiles.append, self.flags.append
        # An engine's times are a byte, after those that were known.
        self.create_timing_cache = lambda known: SimpleNamespace(known=known, serialize=lambda: known + b"t")
        self.set_compute_capability = lambda *_: True


class Builder:
    def __init__(self, _logger: Any) -> None:
        self.create_network, self.create_builder_config = lambda _: Network(), Config
        self.create_optimization_profile = Profile

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        flags = "REQUIRE_USER_ALLOCATION" in config.flags
        return pickle.dumps((network.name, network.model, [dict(each) for each in config.profiles], flags))


class RuntimeCache:
    """Names of the engines whose kernels it has."""

    def __init__(self) -> None:
        self.kernels = set[str]()

    def deserialize(self, blob: bytes) -> bool:
        self.kernels |= set(blob.decode().split())
        return True

    def serialize(self) -> bytes:
        return " ".join(sorted(self.kernels)).encode()


class Engine:
    """A plan of this stand-in's builder."""

    def __init__(self, card: Card, rtx: bool, plan: bytes) -> None:
        self.card, self.rtx = card, rtx
        self.name, plan, self.profiles, self.user_memory = pickle.loads(plan)
        model = onnx.load_from_string(plan)
        self.types, options = widened(model), session_options()
        self.layers = [node.name or node.op_type for node in model.graph.node]
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.num_optimization_profiles = len(self.profiles)
        self.tensors = {item.name: item for item in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [name for name in self.tensors if name not in self.inputs]
        self.num_io_tensors = len(self.tensors)

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        """Of 16 bits at both ends, where the graph says so."""
        asked = {name: np.asarray(array, self.session_type(name)) for name, array in feeds.items()}
        found = self.session.run(self.outputs, asked)
        return [array.astype(self.types[name]) for name, array in zip(self.outputs, found, strict=True)]

    def session_type(self, name: str) -> Any:
        return np.float32 if self.types[name].itemsize == 2 else self.types[name]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.inputs else "OUTPUT"

    def get_tensor_profile_shape(self, name: str, profile: int) -> tuple[tuple[int, ...], ...]:
        return self.profiles[profile].get(name, (tuple(self.tensors[name].shape),) * 3)  # type: ignore[no-any-return]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return SCRATCH * (profile + 1)

    def create_runtime_config(self) -> Any:
        config = SimpleNamespace(strategy=None, dynamic_shapes_kernel_specialization_strategy="LAZY")
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        config.create_runtime_cache, config.cache = RuntimeCache, None
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, how: Any) -> Context:
        assert self.rtx != isinstance(how, str), "TensorRT is given a strategy, TensorRT-RTX a configuration"
        assert (how if isinstance(how, str) else how.strategy) == "USER_MANAGED"
        # The release notes of TensorRT-RTX, and LAZY's kernels that stand in until better ones are compiled.
        if self.rtx and how.cache is not None:
            how.cache.kernels.add(self.name)
        lazy = self.rtx and how.dynamic_shapes_kernel_specialization_strategy == "LAZY"
        return Context(self, captures=not self.rtx or (self.user_memory and not lazy))


class Context:
    """https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html"""

    def __init__(self, engine: Engine, captures: bool) -> None:
        self.engine, self.captures, self.profile, self.launched = engine, captures, 0, False
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}
        self.scratch = 0
        self._profiler: Any = None

    @property
    def profiler(self) -> Any:
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: Any) -> None:
        """It is the context's for good."""
        rule(profiler is not None, "setProfiler: Parameter check failed, condition: (profiler) != nullptr")
        assert profiler.begun
        self._profiler = profiler

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        rule(not self.engine.card.recording(stream), "what a profile copies becomes part of a recording")
        self.profile, self.shapes, self.launched = profile, {}, False
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = tuple(self.engine.tensors[name].shape)
        least, _, most = self.engine.profiles[self.profile].get(name, (fixed,) * 3)
        self.launched &= self.shapes.get(name) == tuple(shape)
        self.shapes[name] = tuple(shape)
        return all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        rule(address % 256 == 0, f"setTensorAddress: {name} is not aligned")
        self.places[name] = address
        return name in self.engine.tensors

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        assert address % 256 == 0
        self.scratch = address

    def _tensors(self) -> dict[str, Any]:
        """How to come to what every tensor is when a stream gets there."""
        known: dict[Any, int] = {}
        for each, shape in self.shapes.items():
            known |= zip(self.engine.tensors[each].shape, shape, strict=True)

        def tensor(name: str) -> Any:
            shape = [known.get(size, size) for size in self.engine.tensors[name].shape]
            kind, place = self.engine.types[name], self.places[name]
            nbytes = int(np.prod(shape)) * kind.itemsize
            return lambda: self.engine.card.view(place, nbytes).view(kind).reshape(shape)

        return {name: tensor(name) for name in self.engine.tensors}

    def execute_async_v3(self, stream: int) -> bool:
        engine, card = self.engine, self.engine.card
        rule(self.scratch, "enqueueV3 before set_device_memory")
        rule(set(self.shapes) == set(engine.inputs), "enqueueV3 before every shape is set")
        rule(set(self.places) == set(engine.tensors), "enqueueV3 before every address is set")
        if card.recording(stream):
            rule(self._profiler is None, f"{engine.name} reports layers, which a recording has no times of")
            rule(self.captures, f"{engine.name} cannot be captured: its memory is not the user's, or its kernels LAZY")
            rule(self.launched, f"{engine.name} is recorded before its first launch at these shapes")
        self.launched = True
        mark, kept = np.frombuffer(id(self).to_bytes(8, "little"), np.uint8), dict[str, Any]()
        # A cache is written where it is read, as its past and present.
        shared = {self.places[name] for name in engine.inputs if name.startswith("past")}
        rubbish = [name for name in engine.outputs if self.places[name] not in shared]
        scratch, memory = self.scratch, self._tensors()

        def begin() -> None:
            card.view(scratch, len(mark))[:] = mark
            kept.update((name, memory[name]().copy()) for name in engine.inputs)
            for name in rubbish:
                memory[name]().view(np.uint8).fill(POISON)

        def end() -> None:
            rule((card.view(scratch, len(mark)) == mark).all(), f"{engine.name} shares its scratch memory")
            feeds = {name: memory[name]() for name in engine.inputs}
            for name, array in feeds.items():
                unchanged = np.array_equal(array.view(np.uint8), kept[name].view(np.uint8))
                rule(unchanged, f"{name} of {engine.name} is written while it is read")
            found = engine.run({name: array.copy() for name, array in feeds.items()})
            for name, array in zip(engine.outputs, found, strict=True):
                memory[name]()[...] = array

        card.ran.append((int(stream), self))
        card.enqueue(stream, "run", engine.name, begin, end)
        if self._profiler is not None:  # enqueue_emits_profile: it waits for its end, and tells
            card.run(card.live.ends[int(stream)])
            for place, layer in enumerate(engine.layers, 1):
                self._profiler.report_layer_time(layer, 1e-3 * place)
        return True


def toolkit(card: Card, name: str) -> Any:
    """In the place of `tensorrt` or `tensorrt_rtx`."""

    class Logger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    class IProfiler:
        begun = False

        def __init__(self) -> None:
            self.begun = True

    module: Any = ModuleType(name)
    module.__spec__, module.__version__ = ModuleSpec(name, None), "10.16.0"
    vars(module).update(
        ILogger=Logger,
        IProfiler=IProfiler,
        Builder=Builder,
        OnnxParser=Parser,
        NetworkDefinitionCreationFlag=SimpleNamespace(),
        MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED"),
        BuilderFlag=SimpleNamespace(REQUIRE_USER_ALLOCATION="REQUIRE_USER_ALLOCATION"),
        ComputeCapability=SimpleNamespace(SM120="SM120"),
        LayerType=SimpleNamespace(),
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="EAGER", LAZY="LAZY"),
    )
    module.Runtime = lambda _: SimpleNamespace(
        deserialize_cuda_engine=lambda plan: (
            Engine(card, name == "tensorrt_rtx", bytes(plan)) if len(plan) > SCRATCH else None
        )
    )
    return module
