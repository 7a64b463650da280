"""OpenVINO: portable graphs, compiled when they are loaded, for any batch. Threads of TBB are shared in the process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt
import openvino as ov

from dash_export.backends.base import Launch
from dash_export.backends.host.cpus import allowed_processors, usable_cores
from dash_export.backends.host.encoder_pass import EncoderEngines
from dash_export.backends.onnxruntime.huge_pages import keep_freed_memory
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import Recipe
from dash_export.bundle.records import POLICY, Build
from dash_export.errors import BackendError, PolicyError

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_SINK = "/sink_port_0"
"""Suffix that OpenVINO appends to the name of an output. Its tensor may have further names, of inner values."""


@cache
def core() -> ov.Core:
    """Return the process's only core: plug-ins are loaded once, and compiled engines share its threads."""
    return ov.Core()


@contextmanager
def ov_errors(what: str) -> Iterator[None]:
    """Turn what OpenVINO raises inside the block into a BackendError that names what failed."""
    try:
        yield
    except Exception as error:
        raise BackendError(f"OpenVINO {ov.__version__} {what}: {error!s:.500}") from error


def settings(recipe: Recipe, threads: int) -> dict[str, Any]:
    """Return how engines are compiled. Raises BackendError for a device or a precision that is not there."""
    device, precision = recipe.runtime.device, recipe.weights.layers
    there = core().available_devices
    if not any(device in (name, name.partition(".")[0]) for name in there):
        raise BackendError(
            f"OpenVINO finds no device {device!r} on this machine, only {', '.join(there)}: give one of these as "
            "`device` in the recipe, or install the driver."
        )
    able = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    if precision.upper() not in able:
        raise BackendError(f"{device} has no products in {precision}: give --weights fp32.")
    wanted = min(threads or usable_cores(), len(allowed_processors()))
    own = {"INFERENCE_NUM_THREADS": wanted} if device == "CPU" else {}
    return {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _HINTS[precision], **own}


class OvEngine:
    """One compiled graph, shared between threads. A request belongs to one launch while it runs, and is used again."""

    def __init__(self, paths: Sequence[Path], tokens: int, device: str, options: Mapping[str, Any]) -> None:
        """Compile graphs as one: each reads the state that the one before gives."""
        self.name = " to ".join(path.name for path in (*paths[:1], *paths[1:][-1:]))
        with ov_errors(f"refuses {self.name}"):
            first, *others = models = [core().read_model(str(path)) for path in paths]
            for before, model in zip(models, others, strict=False):
                model.inputs[0].replace(before.outputs[0].node.input_value(0))
            whole = ov.Model(models[-1].get_results(), first.get_parameters(), self.name)
            if whole.inputs[0].any_name == "hidden":
                # So outputs have known shapes: OpenVINO writes nothing, without an error, where one has another.
                whole.reshape({"hidden": [-1, tokens or -1, whole.inputs[0].partial_shape[2]]})
            self._compiled = core().compile_model(whole, device, options)
            self._inputs = {port.any_name: port for port in self._compiled.inputs}
            self._outputs = {port.node.friendly_name.removesuffix(_SINK): port for port in self._compiled.outputs}
        self.inputs, self.outputs = tuple(self._inputs), tuple(self._outputs)
        self._idle: list[ov.InferRequest] = []

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        """Fix the addresses of all inputs and outputs. Raises BackendError where the graph wants an array that is not
        there, or another shape of it.
        """
        bound = []
        for ports, arrays in ((self._inputs, inputs), (self._outputs, outputs)):
            for name, port in ports.items():
                shape = list(arrays[name].shape) if name in arrays else None
                if shape is None or not port.partial_shape.compatible(ov.PartialShape(shape)):
                    raise BackendError(
                        f"{self.name} wants {name} {port.partial_shape}, not {shape}. The engine does not fit its "
                        "bundle: build the target again."
                    )
                bound.append((port, ov.Tensor(arrays[name], shared_memory=True)))

        def launch() -> None:
            with ov_errors(f"failed in {self.name}"):
                try:
                    request = self._idle.pop()
                except IndexError:  # the first, or others run now
                    request = self._compiled.create_infer_request()
                for port, tensor in bound:
                    request.set_tensor(port, tensor)
                request.infer(share_inputs=True, share_outputs=True)
                self._idle.append(request)

        return launch


class OvDevice:
    """Loader of one build's engines for a device."""

    def __init__(self, recipe: Recipe, threads: int, tokens: int) -> None:
        self._tokens = tokens
        self._device, self._options = recipe.runtime.device, settings(recipe, threads)

    def load(self, path: Path) -> OvEngine:
        """Load an engine file. Raises BackendError where OpenVINO refuses it."""
        # Distances and damages are compared with limits: policy and exits are computed exactly.
        exits = path.stem == POLICY or path.stem.startswith("bypass_")
        exact = {"INFERENCE_PRECISION_HINT": "f32"} if exits and self._device == "CPU" else {}
        return OvEngine([path], self._tokens, self._device, {**self._options, **exact})

    def join(self, paths: Sequence[Path]) -> OvEngine:
        """Load graphs that run one after the other as one engine: a layer apart takes 3 to 5 % more time."""
        return OvEngine(paths, self._tokens, self._device, self._options)


class OvBackend:
    """OpenVINO with so many threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def load_build(self, bundle: Bundle, build: Build, dispatch: str) -> EncoderEngines:
        """Load all engines of an encoder's build. Raises PolicyError for a dispatch mode that needs streams."""
        if dispatch != "sync":
            raise PolicyError(f"Dispatch {dispatch!r} needs the streams of a GPU target: leave it out.")
        keep_freed_memory()
        return EncoderEngines(bundle, build, OvDevice(build.recipe, self._threads, bundle.manifest.encoder.tokens))


def create(_name: str, threads: int) -> OvBackend:
    return OvBackend(threads)
