"""Portable graphs + recipe -> ONNX Runtime engines: lowered .onnx files whose weights are mapped from disk.

The segment whose layer the policy reads gives the damage of all units as one more output. A unit has three engines:
what runs it, its bypass, and a mixed one for steps whose rows differ, which maps the weights of the two.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.build_record import MIXED, POLICY, Segment
from dash_export.builders.segments import (
    Artifact,
    calibration_key,
    compose_mixed,
    compose_segment,
    graphs_key,
)
from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.graphs.compose import load_graph
from dash_export.graphs.ort import lower
from dash_export.graphs.portable import ROPE_FILE
from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.writer import save_graph
from dash_export.targets import Recipe

LOWERING_REVISION = 16
"""Raised whenever the lowering changes, so that engines made by an earlier one are not reused."""

Lowering = Callable[[ir.Model], ir.Model]
MakeGraph = Callable[[], ir.Model]


def artifacts(
    bundle: Bundle, recipe: Recipe, segments: Sequence[Segment], folder: Path, roundings: Roundings
) -> Iterator[Artifact]:
    """Everything this build consists of, in an order in which each can be made. `folder` is where finished engines
    lie; `roundings` is asked when an engine is made.
    """
    yield Artifact(
        "rope",
        content_key({record.name: record.sha256 for record in bundle.manifest.files}["onnx/rope.data"]),
        lambda out: [Path(shutil.copy(bundle.path("onnx/rope.data"), out))],
        role="shared",
    )
    policy = bundle.manifest.policy
    base = (
        LOWERING_REVISION,
        version("onnxruntime"),
        recipe.as_dict()["weights"],
        policy.layers,
        calibration_key(bundle, recipe),
    )

    lowering = lowering_for(bundle, recipe, roundings)
    for graph in engine_graphs(bundle, segments):
        key = content_key(base, graph.name, graphs_key(bundle, graph.parts))
        files = [folder / f"{other}.onnx" for other in graph.extends]
        yield Artifact(graph.name, key, partial(_write, lowering, graph.name, graph.make, files), graph.extends)


@dataclass(frozen=True)
class EngineGraph:
    """An engine's graph, still in the portable form: `make` it of the bundle's graphs `parts`. `extends`: engines whose
    weights it shares.
    """

    name: str
    parts: list[str]
    make: MakeGraph
    extends: tuple[str, ...] = ()


def engine_graphs(bundle: Bundle, segments: Sequence[Segment]) -> Iterator[EngineGraph]:
    """Of every engine of a build."""
    policy = bundle.manifest.policy
    for segment in segments:
        decides = policy.has_network and policy.read in segment.layers
        parts = [*segment.graphs, POLICY] if decides else segment.graphs
        yield EngineGraph(segment.name, parts, partial(compose_segment, bundle, segment, decides))
        if segment.gated:
            unit = Unit(segment.first, segment.last)
            yield EngineGraph(unit.bypass, [unit.bypass], partial(load_graph, bundle.graph(unit.bypass)))
            parts = [unit.bypass, *segment.graphs]
            shared = segment.name, unit.bypass
            yield EngineGraph(MIXED + unit.name, parts, partial(compose_mixed, bundle, unit), shared)


def lowering_for(bundle: Bundle, recipe: Recipe, roundings: Roundings = to_nearest) -> Lowering:
    """How this recipe lowers a composed graph."""
    return partial(lower, recipe=recipe.weights, gated=bundle.manifest.policy.layers, roundings=roundings)


def _write(lowering: Lowering, name: str, make: MakeGraph, extended: Sequence[Path], out: Path) -> list[Path]:
    """Lower a graph into `out`. Weights that it shares with finished engines stay in their files."""
    lowered = lowering(make())
    known = [load_graph(path).graph.initializers for path in extended]
    for weight, value in lowered.graph.initializers.items():
        for twin in (weights[weight].const_value for weights in known if weight in weights):
            if (
                isinstance(twin, ir.ExternalTensor)
                and value.const_value is not None
                and np.array_equal(twin.numpy(), value.const_value.numpy())
            ):
                value.const_value = twin
    return save_graph(lowered, out / f"{name}.onnx", (ROPE_FILE, *(f"{path.stem}.data" for path in extended)))


def write_segment(lowering: Lowering, bundle: Bundle, segment: Segment, out: Path) -> list[Path]:
    """Compose and lower one segment into `out`."""
    return _write(lowering, segment.name, partial(compose_segment, bundle, segment), (), out)
