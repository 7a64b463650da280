"""Graphs of a build's engines: the portable graphs of a model cut into segments, composed, and lowered."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from dash_export.backends.maker import Backend, backend_of
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import POOLED, ROUNDINGS
from dash_export.bundle.recipe import Recipe
from dash_export.bundle.records import DRAFTER, MIXED, POLICY, Segment
from dash_export.core.units import Unit
from dash_export.files.artifacts import Artifact, Progress, content_key
from dash_export.graphs.lower.rounded import Roundings, roundings_lookup, to_nearest
from dash_export.graphs.lower.surgery import absorb, load_graph
from dash_export.graphs.portable.writer import GraphWriter, save_graph


@dataclass(frozen=True)
class EngineGraph:
    """Plan of an engine's graph: `segment`, its bypass, both (mixed), the policy or the drafter. `parts`: the bundle's
    graphs it is made of. `extends`: engines whose weights it shares.
    """

    name: str
    segment: Segment
    parts: list[str]
    extends: tuple[str, ...] = ()


def engine_graphs(bundle: Bundle, segments: Sequence[Segment], on_device: bool) -> Iterator[EngineGraph]:
    """Yield the graphs of a build's engines. A unit has two engines: the one that runs it, and its bypass.

    On the host a unit has a third, mixed engine, for steps in which some rows run and others skip; it maps the weights
    of the other two. The host's segment with the layer whose input the policy reads gives the damage of all units as
    one more output. A tied head maps the embedding's codes, where it has the same. The drafter, in the form of the last
    layer, comes last. On a device the policy is an engine of its own, and nothing is drafted.
    """
    policy, model = bundle.manifest.policy, bundle.manifest.model
    tied, per_input = model.shares_table and not on_device, model.decides == "input"
    apart = on_device or per_input
    for segment in segments:
        reads = policy.has_network and policy.read in segment.layers
        if reads and apart:
            yield EngineGraph(POLICY, segment, [POLICY])
        parts = [*segment.graphs, POLICY] if reads and not apart else segment.graphs
        yield EngineGraph(segment.name, segment, parts, ("embed",) * (tied and segment.head and not segment.embed))
        if segment.gated:
            unit = Unit(segment.first, segment.last)
            yield EngineGraph(unit.bypass, segment, [unit.bypass])
            if not apart:
                both = (segment.name, unit.bypass)
                yield EngineGraph(MIXED + unit.name, segment, [unit.bypass, *segment.graphs], both)
    if policy.drafter and not on_device:
        last = model.num_layers - 1
        yield EngineGraph(DRAFTER, Segment(last, last, False, False, False), [DRAFTER])


def artifacts(
    maker: Backend, bundle: Bundle, segments: Sequence[Segment], folder: Path, progress: Progress
) -> Iterator[Artifact]:
    """Yield everything a build consists of, in the order of its making. `folder`: where finished files lie."""
    from dash_export.building.calibrate import calibration_key, rounding_artifact

    recipe, policy = maker.recipe, bundle.manifest.policy
    calibrated = calibration_key(bundle, recipe)
    base = content_key(maker.revision, maker.key(), asdict(recipe.weights), policy.layers, calibrated)
    if calibrated:
        yield rounding_artifact(bundle, recipe, folder, progress)
    roundings = roundings_lookup(folder / ROUNDINGS) if calibrated else to_nearest
    for graph in engine_graphs(bundle, segments, maker.on_device):

        def write(out: Path, graph: EngineGraph = graph) -> list[Path]:
            extended = [folder / f"{name}.onnx" for name in graph.extends]
            return maker.save(lower_graph(bundle, graph, recipe, roundings), folder, out / graph.name, extended)

        read = policy.read if POLICY in graph.parts else None
        key = content_key(base, graph.name, graphs_key(bundle, graph.parts), read)
        yield Artifact(graph.name, key, write, graph.extends)


def graphs_key(bundle: Bundle, names: Iterable[str]) -> str:
    """Return a key that changes when one of the graphs, its data or a file that graphs share changes."""
    hashes = {record.name: record.sha256 for record in bundle.manifest.files}
    files = [bundle.manifest.graphs[name] for name in names]
    data = [file.removesuffix(".onnx") + ".data" for file in files]
    return content_key([hashes.get(name, "") for name in (*files, *data, "onnx/embed.data")])


def lower_graph(bundle: Bundle, graph: EngineGraph, recipe: Recipe, roundings: Roundings = to_nearest) -> ir.Model:
    """Return an engine's graph in the recipe's dialect, at the recipe's precisions."""
    composed = partial(portable, bundle, graph)
    return backend_of(recipe).lower(bundle, graph.name, graph.parts, composed, roundings)


def portable_file(bundle: Bundle, segment: Segment, name: str, folder: Path) -> Path:
    """Return the file of engine `name`'s portable graph (the segment's own, its bypass, the policy). It lies in the
    bundle; a segment of several graphs is first composed and written into `folder`.
    """
    if name != segment.name or segment.graphs == [name]:
        return bundle.graph(name)
    return write_whole(portable(bundle, EngineGraph(name, segment, segment.graphs)), folder / f"{name}.onnx")


def write_whole(model: ir.Model, path: Path) -> Path:
    """Save a graph and all its weights beside it, also weights that lie in a bundle."""
    return save_graph(model, path)[0]


def portable(bundle: Bundle, graph: EngineGraph) -> ir.Model:
    """Compose an engine's portable graphs: each reads the state that the one before gives, the policy the state that
    enters the layer it reads. The first output is the last state, the logits or, of an encoder, the pooled vector. Not
    for mixed engines.
    """
    if graph.name != graph.segment.name:  # a bypass, the policy or the drafter
        return load_graph(bundle.graph(graph.parts[0]))
    g = GraphWriter(graph.name, f"{', '.join(graph.segment.graphs)} of {bundle.manifest.model.name}")
    state: ir.Value | None = None
    end = "hidden_out"
    for name in graph.segment.graphs:
        outputs = absorb(g, load_graph(bundle.graph(name)), {} if state is None else {"hidden": state})
        if name == f"layer_{bundle.manifest.policy.read:02d}":
            read = state if state is not None else next(item for item in g.graph.inputs if item.name == "hidden")
        end = next(name for name in (POOLED, "logits", "hidden_out") if name in outputs)
        state = outputs.pop(end)
        state.name = f"{name}/{end}"
        g.graph.outputs.extend(outputs.values())
    assert state is not None
    state.name = end
    g.graph.outputs.insert(0, state)
    if POLICY in graph.parts:
        g.graph.outputs.extend(absorb(g, load_graph(bundle.graph(POLICY)), {"hidden": read}).values())
    return g.model()
