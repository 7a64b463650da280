"""What every builder begins with: artifacts to make, and a segment's portable graphs as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.bundle import Bundle, Segment
from dash_export.graphs.compose import absorb, load_graph
from dash_export.graphs.writer import GraphWriter
from dash_export.targets import Recipe


@dataclass(frozen=True)
class Artifact:
    """One engine to make: `write(temporary folder)` returns its files, the .onnx first. `extends` names one whose
    weights it maps too.
    """

    name: str
    key: str
    write: Callable[[Path], list[Path]]
    extends: str | None = None


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


def weights_key(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says of the weights of a layer's engine: not how prompts are run."""
    return {name: value for name, value in recipe.as_dict()["weights"].items() if name != "prefill"}


def compose_segment(bundle: Bundle, segment: Segment, read: int | None = None) -> tuple[GraphWriter, ir.Value | None]:
    """The segment's portable graphs in a row, and the value that enters its layer `read`."""
    g = GraphWriter(segment.name, f"{', '.join(graph_names(segment))} of {bundle.manifest.model.name}")
    value: ir.Value | None = None
    state: ir.Value | None = None
    end = ""
    for name in graph_names(segment):
        outputs = absorb(g, load_graph(bundle.graph(name)), {} if value is None else {"hidden": value})
        if read is not None and name == f"layer_{read:02d}":
            state = next(item for item in g.graph.inputs if item.name == "hidden") if value is None else value
        end = "logits" if name == "head" else "hidden_out"
        value = outputs.pop(end)
        value.name = f"{name}/{end}"
        g.graph.outputs.extend(outputs.values())
    assert value is not None
    value.name = end
    g.graph.outputs.insert(0, value)
    return g, state
