"""The lowered graph of every engine of a GPU build: what is compiled, and what `--verify` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.build_record import Segment
from dash_export.builders.segments import Artifact, calibration_key, compose_segment, graph_names, graphs_key
from dash_export.builders.stored_roundings import rounding_artifact, stored_roundings
from dash_export.bundle import Bundle
from dash_export.graphs.compose import load_graph, specialise_policy
from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.trt import lower
from dash_export.targets import Recipe

LOWERING_REVISION = 2
"""Raised whenever the lowering changes, so that engines made by an earlier one are not reused."""

MakeGraph = Callable[[], ir.Model]


def portable_graphs(
    bundle: Bundle, segments: Sequence[Segment], policies: Iterable[tuple[int, ...]] | None = None
) -> Iterator[tuple[str, str, MakeGraph]]:
    """(name, hash of what it is made from, maker) of every engine's graph, still in the portable form. `policies`: the
    layers that each policy engine answers for, by default all that one state decides about.
    """
    groups = bundle.manifest.policy.decision_points.values() if policies is None else policies
    from_first = {layers[0]: layers for layers in groups}
    for segment in segments:
        yield segment.name, graphs_key(bundle, graph_names(segment)), partial(_segment, bundle, segment)
        if not segment.gated:
            continue
        skip = f"skip_{segment.first:02d}"
        yield skip, graphs_key(bundle, [skip]), partial(_load, bundle, skip)
        if layers := from_first.get(segment.first):
            key = graphs_key(bundle, ["policy"])
            name = f"policy_{segment.first:02d}"
            yield name, content_key(key, *layers) if len(layers) > 1 else key, partial(_policy, bundle, layers)


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
    gated = bundle.manifest.policy.gated
    calibrated = calibration_key(bundle, recipe)
    if calibrated:
        yield rounding_artifact(bundle, recipe, folder, roundings)
    known = stored_roundings(folder) if calibrated else to_nearest

    def lowered(make: MakeGraph) -> ir.Model:
        return lower(make(), recipe, gated, known)

    for name, graph, make in portable_graphs(bundle, segments):
        parts = (key, gated, graph, name, *([calibrated] if calibrated else []))
        yield Artifact(name, content_key(*parts), partial(write, name, partial(lowered, make)))


def _segment(bundle: Bundle, segment: Segment) -> ir.Model:
    return compose_segment(bundle, segment)[0].model()


def _load(bundle: Bundle, name: str) -> ir.Model:
    return load_graph(bundle.graph(name))


def _policy(bundle: Bundle, layers: Sequence[int]) -> ir.Model:
    return specialise_policy(load_graph(bundle.graph("policy")), layers)
