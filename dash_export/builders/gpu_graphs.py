"""The lowered graph of every engine of a GPU build: what is compiled, and what `--verify` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.builders.segments import Artifact, calibration_key, compose_segment, graphs_key
from dash_export.builders.stored_roundings import rounding_artifact, stored_roundings
from dash_export.bundle import Bundle
from dash_export.graphs.compose import load_graph
from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.trt import lower
from dash_export.manifest import POLICY, Segment
from dash_export.targets import Recipe

LOWERING_REVISION = 3
"""Raised whenever the lowering changes, so that engines made by an earlier one are not reused."""

MakeGraph = Callable[[], ir.Model]


def portable_graphs(bundle: Bundle, segments: Sequence[Segment]) -> Iterator[tuple[str, str, MakeGraph]]:
    """(name, hash of what it is made from, maker) of every engine's graph, still in the portable form: segments,
    bypasses and the policy.
    """
    for segment in segments:
        yield segment.name, graphs_key(bundle, segment.graphs), partial(compose_segment, bundle, segment)
    policy = bundle.manifest.policy
    for name in (*(unit.bypass for unit in policy.units), *((POLICY,) if policy.has_network else ())):
        yield name, graphs_key(bundle, [name]), partial(load_graph, bundle.graph(name))


def lowered_artifacts(
    bundle: Bundle,
    recipe: Recipe,
    segments: Sequence[Segment],
    folder: Path,
    roundings: Roundings,
    key: str,
    write: Callable[[str, MakeGraph, Path], list[Path]],
) -> Iterator[Artifact]:
    """Every engine of a build, of its lowered graph by `write(name, maker, temporary folder)`; before them the
    calibrated rounding, where the recipe asks for it. `key`: what all depend on.
    """
    gated = bundle.manifest.policy.layers
    calibrated = calibration_key(bundle, recipe)
    if calibrated:
        yield rounding_artifact(bundle, recipe, folder, roundings)
    known = stored_roundings(folder) if calibrated else to_nearest

    def lowered(make: MakeGraph) -> ir.Model:
        return lower(make(), recipe, gated, known)

    for name, graph, make in portable_graphs(bundle, segments):
        parts = (key, gated, graph, name, *([calibrated] if calibrated else []))
        yield Artifact(name, content_key(*parts), partial(write, name, partial(lowered, make)))
