"""The portable graph of an engine as a file: one of the bundle, or made of several and written."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dash_export.build_record import Segment
from dash_export.builders.gpu_graphs import portable_graphs
from dash_export.builders.segments import compose_skips, graph_names
from dash_export.bundle import Bundle
from dash_export.graphs.writer import save_graph


def portable_file(bundle: Bundle, segment: Segment, name: str, folder: Path, decides: tuple[int, ...] = ()) -> Path:
    """The portable graph of engine `name` (the segment's own, its skip graph or its policy) where it lies in the
    bundle; of a merged segment or a stretch, and of a policy about the layers it `decides`, it is written into `folder`
    first.
    """
    if name.startswith("skip_") or graph_names(segment) == [name]:
        return bundle.graph(name)
    if name.startswith("skips_"):
        return write_graph(compose_skips(bundle, segment.layers), folder / f"{name}.onnx")
    makers = {graph: make for graph, _, make in portable_graphs(bundle, [segment], [decides] if decides else None)}
    return write_graph(makers[name](), folder / f"{name}.onnx")


def write_graph(model: ir.Model, path: Path) -> Path:
    """Save a graph whose weights may lie in a bundle, all of them beside it."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):  # small ones would stay references into the bundle
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    save_graph(model, path)
    return path
