"""Portable graphs + recipe -> TensorRT engines: one per segment and bypass, and the policy's.

The lowered ONNX file is a step on the way and is not kept: `build --verify` makes it again. Engines hold their weights
themselves, so nothing is shared between files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dash_export.artifacts import content_key
from dash_export.build_record import Segment
from dash_export.builders.gpu_graphs import LOWERING_REVISION, MakeGraph, lowered_artifacts
from dash_export.builders.here import device_here, too_old
from dash_export.builders.segments import Artifact
from dash_export.builders.trt_api import Settings, Shapes, Toolkit, load_toolkit
from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.graphs.rounded import Roundings
from dash_export.graphs.writer import save_graph
from dash_export.names import TIMING_CACHE
from dash_export.targets import Recipe


def artifacts(
    bundle: Bundle, recipe: Recipe, segments: Sequence[Segment], folder: Path, roundings: Roundings
) -> Iterator[Artifact]:
    """Every engine of this build. Raises BackendError where this machine's TensorRT cannot compile the dialect."""
    toolkit = load_toolkit(recipe.backend)
    if (reason := too_old(recipe, toolkit.version)) is not None:
        raise BackendError(reason)
    base = (LOWERING_REVISION, toolkit.backend, toolkit.version, device(recipe), recipe.dialect)
    base_key = content_key(*base, recipe.as_dict()["weights"], recipe.as_dict()["engine"], recipe.runtime.prefill_chunk)
    compile_it = partial(_compile, toolkit, recipe, folder / TIMING_CACHE)
    yield from lowered_artifacts(bundle, recipe, segments, folder, roundings, base_key, compile_it)


def version(recipe: Recipe) -> str:
    return load_toolkit(recipe.backend).version


def device(recipe: Recipe) -> str:
    """What the engines are for: capabilities where they are compiled ahead of time, else the device that compiles."""
    assert recipe.engine is not None
    if load_toolkit(recipe.backend).is_rtx:
        return f"any device of compute capability {', '.join(recipe.engine.capabilities)}"
    here = device_here()
    return f"{here.name} (compute capability {here.capability})" if here is not None else "unknown"


def details(recipe: Recipe) -> dict[str, Any]:
    """For build.json: the compiler and everything it was told beside the graphs."""
    assert recipe.engine is not None
    told = asdict(engine_settings(None, recipe)) | {
        "capabilities": list(recipe.engine.capabilities),
        "profiles": ["decode", "prefill"] if recipe.engine.profiles == 2 else ["both"],
        "strongly_typed": True,
    }
    return {"compiler": load_toolkit(recipe.backend).describe(), **told}


def _compile(toolkit: Toolkit, recipe: Recipe, timing: Path, name: str, make: MakeGraph, out: Path) -> list[Path]:
    model = make()
    settings = engine_settings(model, recipe)
    graph, path = out / f"{name}.onnx", out / f"{name}.engine"
    save_graph(model, graph)
    del model
    known = b"" if toolkit.is_rtx or not timing.is_file() else timing.read_bytes()
    engine, learnt = toolkit.compile(graph, settings, known)
    with path.open("wb") as file:
        file.write(memoryview(engine))
    if learnt and learnt != known:
        (out / timing.name).write_bytes(learnt)
        (out / timing.name).replace(timing)
    return [path]


def engine_settings(model: ir.Model | None, recipe: Recipe) -> Settings:
    """The compiler's settings for a lowered graph: a profile for decode and one for prefill chunks, or one for both.

    Without a graph: the settings that all of them share.
    """
    engine = recipe.engine
    assert engine is not None
    chunk = recipe.runtime.prefill_chunk
    # (smallest, best, largest) number of tokens.
    sizes = ((1, 1, 1), (1, chunk, chunk)) if engine.profiles == 2 else ((1, 1, chunk),)
    return Settings(
        profiles=tuple(_shapes(model, each) for each in sizes) if model is not None else (),
        capabilities=engine.capabilities,
        optimization_level=engine.optimization_level,
        aux_streams=engine.aux_streams,
        workspace_bytes=engine.workspace_mib << 20,
    )


def _shapes(model: ir.Model, tokens: tuple[int, int, int]) -> Shapes:
    shapes: dict[str, Any] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shapes[str(value.name)] = tuple(
            tuple(size if isinstance(size, int) else wanted for size in value.shape) for wanted in tokens
        )
    return shapes
