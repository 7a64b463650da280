"""Makers of engines: what a backend can compile and run on this machine, and how it makes the engines of a build. Only
`save` needs onnx: a device measures and runs without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_export.backends.base import BACKENDS, Registered, require_backend
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import Recipe
from dash_export.bundle.records import EngineRecord, Manifest, Segment
from dash_export.core.units import Unit
from dash_export.errors import BackendError

if TYPE_CHECKING:
    import onnx_ir as ir

    from dash_export.graphs.lower.rounded import Roundings


def backend_of(recipe: Recipe) -> Backend:
    """Return the build backend of a recipe."""
    made: Backend = BACKENDS[recipe.backend].part("maker")(recipe)
    return made


class Backend(ABC):
    """Maker of one recipe's engines. Its defaults lower, compile nothing, and work on any machine."""

    on_device = True
    """Whether engines run on a device with streams. The policy is then an engine of its own."""
    revision = 0
    """Increased whenever the lowering changes, so that engines of an earlier revision are not reused."""
    compiles = False
    """Whether there is something to `compile`, which a device can do without onnx."""
    encodes = False
    """Whether it makes engines for encoders, too."""
    always_verifies = False
    """Whether a build compares its graphs with the portable ones unasked."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def faults(self) -> Iterator[str]:
        """Yield what does not go together in the recipe."""
        yield from ()

    @property
    def entry(self) -> Registered:
        """The backend's entry in the registry."""
        return BACKENDS[self.recipe.backend]

    def here(self) -> Backend:
        """Return the maker for this machine: this one or, where only another machine can compile, one that lowers for
        that. Raises BackendError where something is missing.
        """
        if (reason := self.build_obstacle()) is not None:
            raise BackendError(f"Engines for {self.recipe.name} cannot be compiled on this machine: {reason}")
        return self

    def build_obstacle(self) -> str | None:
        """Return why this machine cannot make the engines, in one sentence; None where it can."""
        return None

    def run_obstacle(self) -> str | None:
        """Return why this machine cannot run the engines, in one sentence; None where it can, and can measure them."""
        try:
            self.require_runtime()
        except BackendError as error:
            return str(error)
        return None

    def require_runtime(self) -> None:
        """Raise BackendError where something that running needs is missing here."""
        require_backend(self.recipe.backend)

    def check_model(self, manifest: Manifest) -> None:
        """Raise BackendError where this recipe has no engines for such a model."""
        if manifest.model.decides == "input" and not self.encodes:
            raise BackendError(
                f"The recipe {self.recipe.name!r} is for causal LMs. An encoder runs its portable graphs (--target "
                "portable or openvino), or TensorRT's engines."
            )

    def needs_another_machine(self) -> bool:
        """Return whether no installation here would help, so that `build` only lowers, for another machine."""
        return False

    def refused_version(self, _version: str) -> str | None:
        """Return why the backend's package of this version cannot compile the recipe's dialect; None where it can."""
        return None

    def how_to_install(self) -> str:
        """Return the command that installs the package that makes the engines."""
        return f"pip install 'dash-export[{self.entry.extra}]'"

    @abstractmethod
    def version(self) -> str:
        """Return the version of the package that makes the engines, for the build's record."""

    @abstractmethod
    def device(self) -> str:
        """Return the device that the engines are for, in words."""

    @abstractmethod
    def key(self) -> Any:
        """Return everything that all engines depend on besides their graphs and weights; it enters every key."""

    def details(self) -> dict[str, Any]:
        """Return further facts for the build's record."""
        return {}

    def start(self) -> None:  # noqa: B027  most have nothing to begin
        """Start what must start before a graph runs in this process, like ONNX Runtime's thread pool."""

    def ready_engines(self, _bundle: Bundle) -> dict[str, EngineRecord] | None:
        """Return the engines where nothing has to be made (portable graphs used as they are), else None."""
        return None

    def segments(self, manifest: Manifest) -> tuple[Segment, ...]:
        """Return the segments of a build. Where the policy is an engine of its own, the layers are cut before the layer
        whose input it reads, so that this input is the output of an engine.
        """
        policy = manifest.policy
        cut = (policy.read,) if self.on_device and policy.has_network else ()
        return plan_segments(manifest.model.num_layers, policy.units, cut)

    @abstractmethod
    def lower(
        self, bundle: Bundle, name: str, parts: Sequence[str], composed: Callable[[], ir.Model], roundings: Roundings
    ) -> ir.Model:
        """Return the graph of engine `name` in the recipe's dialect, at the recipe's precisions. `parts`: the graphs of
        the bundle that it is made of; `composed` makes one portable graph of them (not of a mixed engine's).
        """

    def save(self, model: ir.Model, _folder: Path, out: Path, extended: Sequence[Path]) -> list[Path]:
        """Write one engine from its lowered graph as `out` plus a suffix. `extended`: files of finished engines whose
        weights it shares. `_folder`: where finished files lie. Return the engine's files, its own first.
        """
        from dash_export.graphs.lower.surgery import save_extending

        return save_extending(model, out.with_name(f"{out.name}.onnx"), extended)

    def compile(self, graph: Path, folder: Path, out: Path) -> list[Path]:
        """Compile a lowered graph to an engine, `out` plus a suffix. `folder`: where finished files lie. Needs no onnx.
        Return the engine's files.
        """
        raise NotImplementedError(graph, folder, out)


def plan_segments(num_layers: int, units: Sequence[Unit], cut: Collection[int] = ()) -> tuple[Segment, ...]:
    """Cut the layers before and after every unit, and before the layers in `cut`, so that a policy of its own can read
    what enters these: it is an engine's output then. The embedding stands alone where 0 is in `cut`, the head where the
    last layers are a unit; else each belongs to the segment next to it.
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
