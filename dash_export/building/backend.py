"""Backends by name: what each can compile and run on this machine, and how it makes the engines of a build.

A new backend is one class here or in a module of its own, one line in `_BACKENDS`, and what loads its engines
(`runtime/backends.py`). Nothing here needs onnx until `artifacts` is called: a device measures and runs without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_export.artifacts import Progress, content_key
from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.errors import BackendError, NotHereError
from dash_export.manifest import POLICY, EngineRecord, Manifest, Segment
from dash_export.names import ROUNDINGS
from dash_export.runtime.backends import BACKENDS, require_backend
from dash_export.targets import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

    from dash_export.building.engine_graphs import Artifact, EngineGraph

_BACKENDS = {
    "onnxruntime": "dash_export.building.cpu_backend:CpuBackend",
    "onnxruntime_cuda": "dash_export.building.gpu_backends:CudaBackend",
    "tensorrt": "dash_export.building.gpu_backends:TensorRTBackend",
    "tensorrt_rtx": "dash_export.building.gpu_backends:RtxBackend",
}


def backend_of(recipe: Recipe) -> Backend:
    """Return what makes the recipe's engines."""
    module, _, name = _BACKENDS[recipe.backend].partition(":")
    made: Backend = getattr(import_module(module), name)(recipe)
    return made


class Backend(ABC):
    """Engines of one recipe. A subclass says what differs; by default it lowers, compiles nothing and runs anywhere."""

    on_device = True
    """Whether engines run on a device with streams, where the policy is one of its own."""
    revision = 0
    """Raised whenever the lowering changes, so that engines made by an earlier one are not reused."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def extra(self) -> str:
        """The extra of this package that installs the backend's own."""
        return BACKENDS[self.recipe.backend][2]

    def require(self) -> None:
        """Raises BackendError that says what to install when something is missing, NotHereError when only another
        machine can compile for the recipe.
        """
        if (reason := self.build_obstacle()) is not None:
            kind = NotHereError if self.needs_another_machine() else BackendError
            raise kind(f"Engines for {self.recipe.name} cannot be compiled on this machine: {reason}")

    def build_obstacle(self) -> str | None:
        """Why this machine cannot make the engines, in one sentence; None where it can."""
        return None

    def run_obstacle(self) -> str | None:
        """Why this machine cannot run them, in one sentence; None where it can, and so measures their costs."""
        try:
            require_backend(self.recipe.backend)
        except BackendError as error:
            return str(error)
        return None

    def needs_another_machine(self) -> bool:
        """Whether nothing that could be installed here helps, so that `build` writes a kit."""
        return False

    def refused_version(self, _version: str) -> str | None:
        """Why the backend's package of this version cannot compile the recipe's dialect; None where it can."""
        return None

    def how_to_install(self) -> str:
        """Return the command that installs the package that makes the engines."""
        return f"pip install 'dash-export[{self.extra}]'"

    @abstractmethod
    def version(self) -> str:
        """Name and version of what makes the engines, for the build's record."""

    @abstractmethod
    def device(self) -> str:
        """The device that the engines are for, in words."""

    @abstractmethod
    def key(self) -> Any:
        """Everything that all engines depend on besides their graphs and weights."""

    def details(self) -> dict[str, Any]:
        """Further facts for the build's record."""
        return {}

    def start(self) -> None:  # noqa: B027  most have nothing to begin
        """Begin what must begin before anything else in this process runs a graph."""

    def ready_engines(self, _bundle: Bundle) -> dict[str, EngineRecord] | None:
        """The engines where nothing has to be made; else None."""
        return None

    def segments(self, manifest: Manifest) -> tuple[Segment, ...]:
        """The segments of a build. On a device the policy is an engine of its own and reads what an engine gave."""
        policy = manifest.policy
        cut = (policy.read,) if self.on_device and policy.has_network else ()
        return plan_segments(manifest.model.num_layers, policy.units, cut)

    def artifacts(
        self, bundle: Bundle, segments: Sequence[Segment], folder: Path, progress: Progress
    ) -> Iterator[Artifact]:
        """Everything a build consists of, in the order in which it is made. `folder` is where finished files lie."""
        from dash_export.building.calibrate import calibration_key, rounding_artifact
        from dash_export.building.engine_graphs import Artifact, engine_graphs, graphs_key, lowered
        from dash_export.graphs.rounded import stored_roundings, to_nearest

        policy, calibrated = bundle.manifest.policy, calibration_key(bundle, self.recipe)
        base = content_key(self.revision, self.key(), asdict(self.recipe.weights), policy.layers, calibrated)
        if calibrated:
            yield rounding_artifact(bundle, self.recipe, folder, progress)
        yield from self.shared(bundle)
        roundings = stored_roundings(folder / ROUNDINGS) if calibrated else to_nearest
        for graph in engine_graphs(bundle, segments, self.on_device):

            def write(out: Path, graph: EngineGraph = graph) -> list[Path]:
                extended = [folder / f"{name}.onnx" for name in graph.extends]
                return self.save(lowered(bundle, graph, self.recipe, roundings), folder, out / graph.name, extended)

            read = policy.read if POLICY in graph.parts else None
            key = content_key(base, graph.name, graphs_key(bundle, graph.parts), read)
            yield Artifact(graph.name, key, write, graph.extends)

    def shared(self, _bundle: Bundle) -> Iterator[Artifact]:
        """Files that engines have in common."""
        return iter(())

    def save(self, model: ir.Model, _folder: Path, out: Path, extended: Sequence[Path]) -> list[Path]:
        """Write one engine of its lowered graph as `out` with a suffix; `extended`: finished ones whose weights it
        shares. `_folder` is where finished files lie.
        """
        from dash_export.building.engine_graphs import save_extending

        return save_extending(model, out.with_name(f"{out.name}.onnx"), extended)


def plan_segments(num_layers: int, units: Sequence[Unit], cut: Collection[int] = ()) -> tuple[Segment, ...]:
    """Cut before and after every unit, and before the layers in `cut`: what enters those is an engine's output, which
    a policy of its own can read. Embed or head stand alone where nothing that always runs is next to them.
    """
    ends = {0, num_layers, *cut, *(unit.first for unit in units), *(unit.last + 1 for unit in units)}
    firsts = {unit.first for unit in units}
    segments = []
    for first, stop in pairwise(sorted(ends)):
        gated = first in firsts
        segments.append(Segment(first, stop - 1, first == 0 and 0 not in cut, stop == num_layers and not gated, gated))
    embed = [Segment(0, -1, True, False, False)] if 0 in cut else []
    head = [Segment(num_layers, num_layers - 1, False, True, False)] if segments[-1].gated else []
    return (*embed, *segments, *head)
