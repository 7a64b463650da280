"""Portable graphs + recipe -> ONNX Runtime engines: lowered .onnx files whose weights are mapped from disk.

Every segment has a plain engine; where the input of one of its layers decides about later ones, also a `.policy` one
that answers for those on the way (`fused` dispatch). Both map the same weights file. So do stretches of gated layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.build_record import Segment, Stretch
from dash_export.builders.prepacked import PACKING_REVISION, store_prepacked
from dash_export.builders.segments import (
    Artifact,
    calibration_key,
    chain,
    compose_segment,
    graph_names,
    graphs_key,
    weights_key,
)
from dash_export.bundle import Bundle
from dash_export.graphs.compose import absorb, load_graph, specialise_policy
from dash_export.graphs.ort import CONTRIB, fuse_skip_norms, lower
from dash_export.graphs.portable import ROPE_FILE
from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.writer import GraphWriter, save_graph
from dash_export.names import POLICY_STATE, PREFILL
from dash_export.runtime.cpus import cpu_name
from dash_export.targets import Recipe

LOWERING_REVISION = 15
"""Raised whenever the lowering changes, so that engines made by an earlier one are not reused."""

Lowering = Callable[[ir.Model], ir.Model]


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
    for engine in _engines(bundle, recipe, segments, folder, roundings):
        yield _stored(engine, recipe, folder)


def _stored(engine: Artifact, recipe: Recipe, folder: Path) -> Artifact:
    """With packed weights too, where the recipe says so: of the CPU that is here."""
    if not recipe.weights.prepacked:
        return engine

    def write(out: Path) -> list[Path]:
        return store_prepacked(engine.write(out), folder)

    return replace(engine, key=content_key("prepacked", PACKING_REVISION, cpu_name(), engine.key), write=write)


def _engines(
    bundle: Bundle, recipe: Recipe, segments: Sequence[Segment], folder: Path, roundings: Roundings
) -> Iterator[Artifact]:
    policy = bundle.manifest.policy

    def graph_key(*names: str) -> str:
        return graphs_key(bundle, names)

    base = (
        LOWERING_REVISION,
        version("onnxruntime"),
        weights_key(recipe),
        policy.gated,
        calibration_key(bundle, recipe),
    )
    lowering = lowering_for(bundle, recipe, roundings)

    def with_policy(part: Segment | str, key: str, read: int) -> Artifact:
        plain = part if isinstance(part, str) else part.name
        policy_key = content_key("fused", key, graph_key("policy"), *policy.decision_points[read])
        return Artifact(
            f"{plain}.policy",
            policy_key,
            partial(_fused, lowering, bundle, part, folder / f"{plain}.onnx", read),
            (plain,),
        )

    for segment in segments:
        names = graph_names(segment)
        read = policy.read_in(segment.layers)
        # What most read is the input of the last layer: engines made when all did are these.
        key = content_key(base, graph_key(*names), read is not None if read in (None, segment.last) else read)
        yield Artifact(segment.name, key, partial(write_segment, lowering, bundle, segment, read))
        if read is not None:
            yield with_policy(segment, key, read)
        if segment.gated:
            skip = f"skip_{segment.first:02d}"
            key = content_key(base, graph_key(skip))
            yield Artifact(skip, key, partial(_skip, lowering, bundle, skip))
            if read is not None:
                yield with_policy(skip, key, read)
            if layers := policy.decided_from(segment.first):
                key = content_key(base, graph_key("policy"), *layers)
                yield Artifact(f"policy_{layers[0]:02d}", key, partial(_policy, lowering, bundle, layers))
    if recipe.weights.prefill == "int8":
        whole = Segment.whole(bundle.manifest.model.num_layers)
        key = content_key(base, graph_key(*graph_names(whole)), "prefill")
        yield Artifact(PREFILL, key, partial(_prefill, bundle, recipe, roundings, whole))


def stretch_artifacts(
    made: Mapping[str, str], recipe: Recipe, stretches: Sequence[Stretch], folder: Path
) -> Iterator[Artifact]:
    """Engines of several gated layers, out of those of one layer in `folder`, whose keys are `made`; they have no
    weights of their own.
    """
    for stretch in stretches:
        parts = tuple(f"{'skip' if stretch.skips else 'layer'}_{layer:02d}" for layer in stretch.layers)
        key = content_key("stretch", LOWERING_REVISION, *(made[name] for name in parts))
        engine = Artifact(stretch.name, key, partial(_stretch, folder, stretch.name, parts), parts)
        yield _stored(engine, recipe, folder)


def _stretch(folder: Path, name: str, parts: Sequence[str], out: Path) -> list[Path]:
    g = GraphWriter(name, ", ".join(parts))
    chain(g, {part: load_graph(folder / f"{part}.onnx") for part in parts})
    g.graph.opset_imports[CONTRIB] = 1
    fuse_skip_norms(g.graph)
    return save_graph(g.model(), out / f"{name}.onnx", (ROPE_FILE, *(f"{part}.data" for part in parts)))


def lowering_for(bundle: Bundle, recipe: Recipe, roundings: Roundings = to_nearest) -> Lowering:
    """How this recipe lowers a composed graph."""
    return partial(lower, recipe=recipe.weights, gated=bundle.manifest.policy.gated, roundings=roundings)


def write_segment(lowering: Lowering, bundle: Bundle, segment: Segment, read: int | None, out: Path) -> list[Path]:
    """Compose and lower one segment into `out`. It also gives what enters its layer `read`, for policies, where that
    lies inside it.
    """
    g, state = compose_segment(bundle, segment, read)
    if state is not None and str(state.name) != "hidden":
        state.name = POLICY_STATE
        g.graph.outputs.append(state)
    return save_graph(lowering(g.model()), out / f"{segment.name}.onnx", (ROPE_FILE,))


def _prefill(bundle: Bundle, recipe: Recipe, roundings: Roundings, whole: Segment, out: Path) -> list[Path]:
    """All layers, in integers; embedding and head as in the other engines."""
    weights = replace(recipe.weights, layers="int8", qkv="int8", ungated="int8")
    lowered = lower(compose_segment(bundle, whole)[0].model(), weights, (), roundings, for_prompts=True)
    return save_graph(lowered, out / f"{PREFILL}.onnx", (ROPE_FILE,))


def _skip(lowering: Lowering, bundle: Bundle, name: str, out: Path) -> list[Path]:
    return save_graph(lowering(load_graph(bundle.graph(name))), out / f"{name}.onnx", (ROPE_FILE,))


def _policy(lowering: Lowering, bundle: Bundle, layers: Sequence[int], out: Path) -> list[Path]:
    policy = specialise_policy(load_graph(bundle.graph("policy")), layers)
    return save_graph(lowering(policy), out / f"policy_{layers[0]:02d}.onnx")


def _fused(lowering: Lowering, bundle: Bundle, part: Segment | str, plain: Path, read: int, out: Path) -> list[Path]:
    """A segment or skip graph with the policy that reads the input of its layer `read` as one more output. Weights it
    shares with the plain engine stay in that one's file.
    """
    state: ir.Value | None
    if isinstance(part, Segment):
        g, state = compose_segment(bundle, part, read)
    else:
        g = GraphWriter(part, f"{part} of {bundle.manifest.model.name}")
        g.graph.outputs.extend(absorb(g, load_graph(bundle.graph(part)), {}).values())
        (state,) = (value for value in g.graph.inputs if value.name == "hidden")
    assert state is not None
    layers = bundle.manifest.policy.decision_points[read]
    policy = specialise_policy(load_graph(bundle.graph("policy")), layers)
    g.graph.outputs.extend(absorb(g, policy, {"hidden": state}).values())
    lowered = lowering(g.model())
    known = load_graph(plain).graph.initializers
    for name, value in lowered.graph.initializers.items():
        twin = known[name].const_value if name in known else None
        if (
            isinstance(twin, ir.ExternalTensor)
            and value.const_value is not None
            and np.array_equal(twin.numpy(), value.const_value.numpy())
        ):
            value.const_value = twin
    return save_graph(lowered, out / f"{plain.stem}.policy.onnx", (ROPE_FILE, f"{plain.stem}.data"))
