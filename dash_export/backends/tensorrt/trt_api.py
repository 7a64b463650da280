"""One interface for TensorRT 10.3 to 11.x and TensorRT-RTX: all that differs between them is here and nowhere else.

Nothing here needs a device except `tensorrt` itself, which compiles for the device that it runs on.
"""

import atexit
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from dash_export.backends.base import BACKENDS
from dash_export.bundle.layout import cache_folder
from dash_export.bundle.recipe import EngineRecipe
from dash_export.errors import BackendError, OutputError
from dash_export.files.artifacts import read_bounded, write_atomic

logger = logging.getLogger(__name__)

PORTABLE_SINCE = (10, 15)
"""First TensorRT with KVCacheUpdate: older versions need the `trt10` dialect."""

_LARGEST_KERNELS = 1 << 30
_KEEP_EVERY = 2.0
"""Seconds after which kernels that TensorRT-RTX has compiled meanwhile are written."""
Sizes = tuple[int, int]
Profile = tuple[Sizes, Sizes, Sizes]
"""One optimisation profile: the smallest, best and largest (sequences, tokens of each). An input's first axis is the
sequences and its second the tokens, where their number is not fixed.
"""


class Toolkit:
    """Bindings of one TensorRT, with a logger that keeps errors."""

    def __init__(self, backend: str) -> None:
        """Import the bindings. Raises BackendError that names the extra when they are missing or do not load."""
        try:
            self.trt: Any = import_module(backend)
        except ImportError as error:
            raise BackendError(
                f"{backend} is not installed on this machine or does not load ({error}). "
                f"Run: pip install 'dash-export[{BACKENDS[backend].extra}]'"
            ) from error
        self.backend, self.is_rtx = backend, backend == "tensorrt_rtx"
        self.version = str(self.trt.__version__)
        self.logger = _logger(self.trt)
        self._kernels: Any = None
        self._kernels_file = Path()
        self._keeper: Thread | None = None

    def describe(self) -> str:
        return f"{'TensorRT-RTX' if self.is_rtx else 'TensorRT'} {self.version}"

    def compile(
        self, graph: Path, settings: EngineRecipe, profiles: Sequence[Profile], timing: bytes = b"", fused: bool = True
    ) -> tuple[Any, bytes]:
        """Compile an ONNX file to (serialized engine as a buffer, timing cache). `fused`: each attention is one kernel
        and reads only the rows in use. Where TensorRT has none, attentions are compiled as it likes. Raises
        BackendError with TensorRT's own words.
        """
        trt = self.trt
        with self.logger.collected() as complaints:
            builder = trt.Builder(self.logger)
            # 11.x is always strongly typed and keeps the flag as a name without a meaning.
            flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
            network = builder.create_network(0 if flag is None else 1 << int(flag))
            parser = trt.OnnxParser(network, self.logger)
            if not parser.parse_from_file(str(graph)):
                complaints += [parser.get_error(index).desc() for index in range(parser.num_errors)]
                raise BackendError(f"{self.describe()} cannot read {graph.stem}: {last_reason(complaints)}")
            attentions = [layer for layer in _layers(network) if layer.type == self._type("ATTENTION_INPUT")]
            if fused:
                self._bound_attention(network)
            else:
                for begin in attentions:
                    begin.__class__ = trt.IAttentionInputLayer  # as TensorRT's own samples do: it is a mere ILayer
                    attention = begin.attention
                    attention.decomposable = True
            config = builder.create_builder_config()
            self._configure(config, settings)
            for sizes in profiles:
                profile = builder.create_optimization_profile()
                for tensor in (network.get_input(index) for index in range(network.num_inputs)):
                    shape = tuple(tensor.shape)
                    if -1 in shape:
                        fixed = ([own[axis] if size < 0 else size for axis, size in enumerate(shape)] for own in sizes)
                        profile.set_shape(tensor.name, *map(tuple, fixed))
                config.add_optimization_profile(profile)
            cached = None
            if not self.is_rtx:  # TensorRT-RTX times nothing: its timing cache is a deprecated no-op
                cached = config.create_timing_cache(timing)
                if cached is None or not config.set_timing_cache(cached, ignore_mismatch=False):
                    # It is of another version or card, about which TensorRT complains.
                    cached = config.create_timing_cache(b"")
                    config.set_timing_cache(cached, ignore_mismatch=False)
                    complaints.clear()
            engine = builder.build_serialized_network(network, config)
            if engine is None and fused and attentions:
                reason = f"{self.describe()} does not compile it with fused attention ({last_reason(complaints)})"
                logger.warning("%s: %s. Without, it will read all rows of the cache.", graph.stem, reason)
                return self.compile(graph, settings, profiles, timing, fused=False)
            if engine is None:
                raise BackendError(f"{self.describe()} cannot compile {graph.stem}: {last_reason(complaints)}")
            return engine, bytes(cached.serialize()) if cached is not None else b""

    def _type(self, name: str) -> Any:
        """Return a type of layers; None where this TensorRT has none of that name."""
        return getattr(self.trt.LayerType, name, None)

    def _bound_attention(self, network: Any) -> None:
        """Tell each Attention how many rows of its cache are in use, so that it need not read the others, where
        TensorRT knows lengths (from 11 on). The parser drops ONNX's own input for this (`nonpad_kv_seqlen`) and makes
        attentions that take no lengths, so each is replaced by one that does, with the same queries and mask. Its keys
        are the cache itself: the parser's are all rows of it times the scale, which is 1.
        """
        trt, layers = self.trt, _layers(network)
        begins, ends = (
            [layer for layer in layers if layer.type == self._type(f"ATTENTION_{side}")] for side in ("INPUT", "OUTPUT")
        )
        if not begins or not hasattr(network, "add_attention_v2"):
            return
        inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
        if "position_ids" not in inputs:  # an encoder's: there is no cache
            return
        outputs = {tensor.name: tensor for tensor in map(network.get_output, range(network.num_outputs))}
        positions = network.add_cast(inputs["position_ids"], trt.int32).get_output(0)
        last = network.add_reduce(positions, trt.ReduceOperation.MAX, 1 << 1, False).get_output(0)
        one = network.add_constant((1,), np.ones(1, np.int32)).get_output(0)
        lengths = network.add_elementwise(last, one, trt.ElementWiseOperation.SUM).get_output(0)
        replaced = {}
        for begin, end in zip(begins, ends, strict=True):
            queries, _, values, mask = (begin.get_input(index) for index in range(4))
            keys = outputs[values.name.replace("value", "key")]
            softmax, unmasked = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
            attention = network.add_attention_v2(queries, keys, values, softmax, unmasked)
            attention.mask, attention.key_value_lengths = mask, lengths
            replaced[end.get_output(0).name] = attention.get_output(0)
        for layer in layers:
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None and tensor.name in replaced:
                    layer.set_input(index, replaced[tensor.name])

    def context(self, engine: Any, capability: str, eager: bool) -> Any:
        """Return an engine's execution context whose scratch memory the caller gives; None where there is no memory for
        it. TensorRT-RTX compiles kernels for its shapes at once where it is `eager`, or else beside the work, which
        fallback kernels do meanwhile. It keeps kernels for the next process on a card of this compute capability.
        """
        trt = self.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.is_rtx:
            return engine.create_execution_context(strategy)
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(strategy)
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        runtime_config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if eager else strategies.LAZY
        if self._kernels is None:
            self._kernels = runtime_config.create_runtime_cache()
            file = self._kernels_file = cache_folder() / f"{self.backend}-{self.version}-{capability}.kernels"
            with suppress(OSError):  # TensorRT-RTX takes nothing of another version or card
                self._kernels.deserialize(read_bounded(file, _LARGEST_KERNELS))
            atexit.register(_keep, self._kernels, file)
        runtime_config.set_runtime_cache(self._kernels)
        return engine.create_execution_context(runtime_config)

    def keep_kernels(self) -> None:
        """Write the kernels of a new shape soon, beside the work: a kill loses the last seconds' only."""
        if self._kernels is not None and (self._keeper is None or not self._keeper.is_alive()):
            self._keeper = Thread(target=_keep_while_new, args=(self._kernels, self._kernels_file), daemon=True)
            self._keeper.start()

    def _configure(self, config: Any, settings: EngineRecipe) -> None:
        trt = self.trt
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
        config.builder_optimization_level = settings.optimization_level
        config.max_aux_streams = settings.aux_streams
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.is_rtx:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else a stream cannot be captured
            config.num_compute_capabilities = len(settings.capabilities)
            for index, capability in enumerate(settings.capabilities):
                known = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
                if known is None or not config.set_compute_capability(known, index):
                    raise BackendError(f"{self.describe()} does not compile for compute capability {capability}.")


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def _keep(kernels: Any, file: Path) -> bool:
    """Write a runtime cache, unless the file already has the same size. Return whether it was written."""
    with suppress(OSError, OutputError):
        made = bytes(kernels.serialize())
        if not file.is_file() or file.stat().st_size != len(made):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, made)
            return True
    return False


def _keep_while_new(kernels: Any, file: Path) -> None:
    """Write a runtime cache again and again, until there is nothing new."""
    time.sleep(_KEEP_EVERY)
    while _keep(kernels, file):
        time.sleep(_KEEP_EVERY)


def last_reason(complaints: Sequence[str]) -> str:
    """Return the last complaint, as the reason to tell."""
    return complaints[-1] if complaints else "it gave no reason"


load_toolkit = cache(Toolkit)
"""Return the toolkit of a backend, loaded once. Raises BackendError."""


@cache
def _logger(trt: Any) -> Any:
    """Return this process's logger, which TensorRT keeps for good: it collects errors, or logs them."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._open: dict[int, list[str]] = {}  # builders log from threads of their own

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                for complaints in list(self._open.values()):
                    complaints.append(message)
                if not self._open:  # from a launch, whose caller knows only that it failed
                    logger.error("%s", message)

        @contextmanager
        def collected(self) -> Iterator[list[str]]:
            complaints: list[str] = []
            self._open[id(complaints)] = complaints
            try:
                yield complaints
            finally:
                del self._open[id(complaints)]

    return Collector()
