"""The portable graph of an engine as a file: one of the bundle, or made of several and written."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dash_export.builders.segments import compose_segment
from dash_export.bundle import Bundle
from dash_export.graphs.writer import save_graph
from dash_export.manifest import Segment


def portable_file(bundle: Bundle, segment: Segment, name: str, folder: Path) -> Path:
    """The portable graph of engine `name` (the segment's own, its bypass, the policy) where it lies in the bundle; of a
    merged segment it is written into `folder` first.
    """
    if name != segment.name or segment.graphs == [name]:
        return bundle.graph(name)
    return write_graph(compose_segment(bundle, segment), folder / f"{name}.onnx")


def write_graph(model: ir.Model, path: Path) -> Path:
    """Save a graph whose weights may lie in a bundle, all of them beside it."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):  # small ones would stay references into the bundle
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    save_graph(model, path)
    return path
