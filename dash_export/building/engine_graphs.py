"""The graph of every engine of a build: a model's portable graphs cut into segments, composed, and lowered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.errors import BackendError
from dash_export.graphs import trt
from dash_export.graphs.portable import HIDDEN_SHAPE, ROPE_FILE
from dash_export.graphs.rounded import Roundings, to_nearest
from dash_export.graphs.surgery import absorb, drop_dead, load_graph
from dash_export.graphs.writer import GraphWriter, save_graph
from dash_export.manifest import MIXED, POLICY, Segment
from dash_export.targets import Recipe


@dataclass(frozen=True)
class Artifact:
    """One engine to make: `write(temporary folder)` returns its files, the engine's own first. `extends` names those
    whose weights it maps too. Or what engines map (`shared`) or are made of (`aside`).
    """

    name: str
    key: str
    write: Callable[[Path], list[Path]]
    extends: tuple[str, ...] = ()
    role: Literal["engine", "shared", "aside"] = "engine"


@dataclass(frozen=True)
class EngineGraph:
    """An engine's graph, still in the portable form: `make` it of the bundle's graphs `parts`, for `segment`, or for
    skipping it. `extends`: engines whose weights it shares.
    """

    name: str
    segment: Segment
    parts: list[str]
    make: Callable[[], ir.Model]
    extends: tuple[str, ...] = ()


def engine_graphs(bundle: Bundle, segments: Sequence[Segment], on_device: bool) -> Iterator[EngineGraph]:
    """The graphs of a build. A unit has two engines: what runs it, and its bypass.

    On the host it has a third, mixed one, for steps whose rows differ, which maps the weights of the two; and the
    segment whose layer the policy reads gives the damage of all units as one more output. On a device the policy is an
    engine of its own.
    """
    policy = bundle.manifest.policy
    for segment in segments:
        reads = policy.has_network and policy.read in segment.layers
        if reads and on_device:
            yield EngineGraph(POLICY, segment, [POLICY], partial(load_graph, bundle.graph(POLICY)))
        if segment.gated:
            unit = Unit(segment.first, segment.last)
            yield EngineGraph(unit.bypass, segment, [unit.bypass], partial(load_graph, bundle.graph(unit.bypass)))
            if not on_device:
                parts, shared = [unit.bypass, *segment.graphs], (segment.name, unit.bypass)
                yield EngineGraph(MIXED + unit.name, segment, parts, partial(compose_mixed, bundle, unit), shared)
        gives = reads and not on_device
        parts = [*segment.graphs, POLICY] if gives else segment.graphs
        yield EngineGraph(segment.name, segment, parts, partial(compose_segment, bundle, segment, gives))


def graphs_key(bundle: Bundle, names: Iterable[str]) -> str:
    """Changes when a graph, its data or a file that graphs share does."""
    hashes = {record.name: record.sha256 for record in bundle.manifest.files}
    files = [bundle.manifest.graphs[name] for name in names]
    data = [file.removesuffix(".onnx") + ".data" for file in files]
    return content_key([hashes.get(name, "") for name in (*files, *data, "onnx/rope.data", "onnx/embed.data")])


def lower(model: ir.Model, recipe: Recipe, gated: Collection[int], roundings: Roundings = to_nearest) -> ir.Model:
    """A portable segment, bypass or policy -> the recipe's dialect, in place. `gated`: the layers of all units."""
    if recipe.dialect != "ort":
        return trt.lower(model, recipe, gated, roundings)
    from dash_export.graphs import ort  # its quantiser is ONNX Runtime's, which a machine with TensorRT may lack

    return ort.lower(model, recipe, gated, roundings)


def save_extending(lowered: ir.Model, path: Path, extended: Sequence[Path] = ()) -> list[Path]:
    """Save a lowered graph. Weights that it shares with finished engines stay in their files."""
    known = [load_graph(other).graph.initializers for other in extended]
    for weight, value in lowered.graph.initializers.items():
        for twin in (weights[weight].const_value for weights in known if weight in weights):
            if (
                isinstance(twin, ir.ExternalTensor)
                and value.const_value is not None
                and np.array_equal(twin.numpy(), value.const_value.numpy())
            ):
                value.const_value = twin
    return save_graph(lowered, path, (ROPE_FILE, *(f"{other.stem}.data" for other in extended)))


def portable_file(bundle: Bundle, segment: Segment, name: str, folder: Path) -> Path:
    """The portable graph of engine `name` (the segment's own, its bypass, the policy) where it lies in the bundle; of a
    merged segment it is written into `folder` first.
    """
    if name != segment.name or segment.graphs == [name]:
        return bundle.graph(name)
    return write_whole(compose_segment(bundle, segment), folder / f"{name}.onnx")


def write_whole(model: ir.Model, path: Path) -> Path:
    """Save a graph whose weights may lie in a bundle, all of them beside it."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):  # small ones would stay references into the bundle
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    save_graph(model, path)
    return path


def compose_segment(bundle: Bundle, segment: Segment, policy: bool = False) -> ir.Model:
    """The segment's portable graphs in a row; with the `policy`, which reads what enters one of its layers, that one's
    damage too.
    """
    g = GraphWriter(segment.name, f"{', '.join(segment.graphs)} of {bundle.manifest.model.name}")
    entering = chain(g, {name: load_graph(bundle.graph(name)) for name in segment.graphs})
    if policy:
        state = entering[f"layer_{bundle.manifest.policy.read:02d}"]
        g.graph.outputs.extend(absorb(g, load_graph(bundle.graph("policy")), {"hidden": state}).values())
    return g.model()


def compose_mixed(bundle: Bundle, unit: Unit) -> ir.Model:
    """A unit that every row runs or skips as `skipped` [batch, sequence, 1] bool says: both are computed, and each row
    takes its own result, the K and V that its later tokens attend to included.
    """
    g = GraphWriter(f"mixed_{unit.name}", f"Layers {unit} of {bundle.manifest.model.name}, run or skipped row by row.")
    skipped = g.input("skipped", ("batch", "sequence", 1), ir.DataType.BOOL)
    outputs = absorb(g, load_graph(bundle.graph(unit.bypass)), {})
    bypassed = {name: _projected(value) for name, value in outputs.items() if name != "hidden_out"}
    outputs["hidden_out"].name = "bypassed"
    value = next(value for value in g.graph.inputs if value.name == "hidden")
    for layer in unit.layers:
        graph = load_graph(bundle.graph(f"layer_{layer:02d}"))
        found = absorb(g, graph, {"hidden": value})
        value = found.pop("hidden_out")
        value.name = f"layer_{layer:02d}/hidden_out"
        for name, written in found.items():
            (own, reader), (instead, _) = _projected(written), bypassed[name]
            node = ir.node("Where", [skipped, instead, own], name=f"{name}/chosen")
            node.outputs[0].name = str(node.name)
            g.graph.insert_before(reader, node)
            reader.replace_input_with(0, node.outputs[0])
        g.graph.outputs.extend(found.values())
    chosen = g.op("Where", [skipped, outputs["hidden_out"], value], "hidden_chosen")
    g.output(chosen, "hidden_out", (*HIDDEN_SHAPE, bundle.manifest.model.hidden_size))
    drop_dead(g.graph)
    g.graph.sort()
    return g.model()


def _projected(written: ir.Value) -> tuple[ir.Value, ir.Node]:
    """Of K or V as written to the cache: its projection [batch, sequence, kv_heads * head_dim], and the node that
    splits that into heads.
    """
    node = written.producer()
    value: ir.Value | None = written
    while node is not None and node.op_type != "Reshape":
        value = node.inputs[1 if node.op_type == "TensorScatter" else 0]
        node = value.producer() if value is not None else None
    if node is None or node.inputs[0] is None:
        raise BackendError(f"{written.name} is not written as this version writes it: export the model again.")
    return node.inputs[0], node


def chain(g: GraphWriter, graphs: Mapping[str, ir.Model]) -> dict[str, ir.Value]:
    """Graphs in a row, each fed with what the one before gives; the outputs of all, the last one's first. Returns the
    value that enters each which takes `hidden`.
    """
    value: ir.Value | None = None
    entering: dict[str, ir.Value] = {}
    end = ""
    for name, graph in graphs.items():
        outputs = absorb(g, graph, {} if value is None else {"hidden": value})
        if value is not None:
            entering[name] = value
        elif found := [item for item in g.graph.inputs if item.name == "hidden"]:
            (entering[name],) = found
        end = "logits" if "logits" in outputs else "hidden_out"
        value = outputs.pop(end)
        value.name = f"{name}/{end}"
        g.graph.outputs.extend(outputs.values())
    assert value is not None
    value.name = end
    g.graph.outputs.insert(0, value)
    return entering
