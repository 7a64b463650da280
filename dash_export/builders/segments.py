"""What every builder begins with: artifacts to make, and a segment's portable graphs as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from dash_export.artifacts import content_key, sha256_file
from dash_export.build_record import Segment
from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.errors import BackendError
from dash_export.graphs.compose import absorb, drop_dead, load_graph
from dash_export.graphs.portable import HIDDEN_SHAPE
from dash_export.graphs.writer import GraphWriter
from dash_export.resources import resource_folder
from dash_export.targets import Recipe


@dataclass(frozen=True)
class Artifact:
    """One engine to make: `write(temporary folder)` returns its files, the .onnx first. `extends` names those whose
    weights it maps too. Or what engines map (`shared`) or are made of (`aside`).
    """

    name: str
    key: str
    write: Callable[[Path], list[Path]]
    extends: tuple[str, ...] = ()
    role: Literal["engine", "shared", "aside"] = "engine"


def graphs_key(bundle: Bundle, names: Iterable[str]) -> str:
    """Changes when a graph, its data or a file that graphs share does."""
    hashes = {record.name: record.sha256 for record in bundle.manifest.files}
    files = [bundle.manifest.graphs[name] for name in names]
    data = [file.removesuffix(".onnx") + ".data" for file in files]
    return content_key([hashes.get(name, "") for name in (*files, *data, "onnx/rope.data", "onnx/embed.data")])


TEXT = "quantise.txt"
"""Shipped text that int4 weights are calibrated on."""


def calibration_key(bundle: Bundle, recipe: Recipe) -> str:
    """What a calibrated engine depends on besides its own graph: the text, and the layers that feed it. Nothing where
    nothing is calibrated.
    """
    if recipe.weights.rounding == "nearest" or not recipe.weights.has_int4:
        return ""
    layers = [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]
    text = sha256_file(resource_folder("calibration") / TEXT)
    return content_key(text, graphs_key(bundle, ["embed", *layers]))


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
