"""Portable graphs + recipe -> graphs for ONNX Runtime on CUDA, where TensorRT is missing. Lowered on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dash_export import __version__
from dash_export.artifacts import content_key
from dash_export.build_record import Segment
from dash_export.builders.gpu_graphs import LOWERING_REVISION, MakeGraph, lowered_artifacts
from dash_export.builders.segments import Artifact
from dash_export.bundle import Bundle
from dash_export.graphs.rounded import Roundings
from dash_export.graphs.writer import save_graph
from dash_export.targets import Recipe


def artifacts(
    bundle: Bundle, recipe: Recipe, segments: Sequence[Segment], folder: Path, roundings: Roundings
) -> Iterator[Artifact]:
    """Every lowered graph of this build."""
    base = content_key(LOWERING_REVISION, recipe.dialect, recipe.as_dict()["weights"], recipe.as_dict()["engine"])
    yield from lowered_artifacts(bundle, recipe, segments, folder, roundings, base, _write)


def version(_recipe: Recipe) -> str:
    """Of the lowering: the graphs do not depend on the ONNX Runtime that will run them."""
    return f"dash-export {__version__}"


def device(_recipe: Recipe) -> str:
    return "any CUDA device"


def details(_recipe: Recipe) -> dict[str, Any]:
    return {}


def _write(name: str, make: MakeGraph, out: Path) -> list[Path]:
    return save_graph(make(), out / f"{name}.onnx")
