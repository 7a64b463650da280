"""What every builder begins with: artifacts to make, and a segment's portable graphs as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from dash_export.artifacts import content_key, sha256_file
from dash_export.build_record import Segment
from dash_export.bundle import Bundle
from dash_export.graphs.compose import absorb, load_graph
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


def graph_names(segment: Segment) -> list[str]:
    """The portable graphs of a segment, in order."""
    names = [f"layer_{layer:02d}" for layer in segment.layers]
    return ["embed"] * segment.embed + names + ["head"] * segment.head


def graphs_key(bundle: Bundle, names: Iterable[str]) -> str:
    """Changes when a graph, its data or a file that graphs share does."""
    hashes = {record.name: record.sha256 for record in bundle.manifest.files}
    files = [bundle.manifest.graphs[name] for name in names]
    data = [file.removesuffix(".onnx") + ".data" for file in files]
    return content_key([hashes.get(name, "") for name in (*files, *data, "onnx/rope.data", "onnx/embed.data")])


TEXT = "quantise.txt"
DISTILLED_TEXTS = (TEXT, "distil.txt")


def calibration_key(bundle: Bundle, recipe: Recipe) -> str:
    """What a calibrated engine depends on besides its own graph: the text, and the layers that feed it. Nothing where
    nothing is calibrated.
    """
    if recipe.weights.rounding == "nearest" or not recipe.weights.has_int4:
        return ""
    layers = [f"layer_{layer:02d}" for layer in range(bundle.manifest.model.num_layers)]
    distils = recipe.weights.rounding == "distilled"
    texts = [sha256_file(resource_folder("calibration") / name) for name in (DISTILLED_TEXTS if distils else (TEXT,))]
    return content_key(*texts, graphs_key(bundle, ["embed", *layers, *(["head"] if distils else [])]))


def weights_key(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says of the weights of a layer's engine: not how prompts are run, nor what is stored besides."""
    apart = ("prefill", "prepacked")
    return {name: value for name, value in recipe.as_dict()["weights"].items() if name not in apart}


def compose_segment(bundle: Bundle, segment: Segment, read: int | None = None) -> tuple[GraphWriter, ir.Value | None]:
    """The segment's portable graphs in a row, and the value that enters its layer `read`."""
    names = graph_names(segment)
    g = GraphWriter(segment.name, f"{', '.join(names)} of {bundle.manifest.model.name}")
    entering = chain(g, {name: load_graph(bundle.graph(name)) for name in names})
    return g, None if read is None else entering[f"layer_{read:02d}"]


def compose_skips(bundle: Bundle, layers: Iterable[int]) -> ir.Model:
    """The portable skip graphs of these layers in a row."""
    names = [f"skip_{layer:02d}" for layer in layers]
    g = GraphWriter("skips", f"{', '.join(names)} of {bundle.manifest.model.name}")
    chain(g, {name: load_graph(bundle.graph(name)) for name in names})
    return g.model()


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
