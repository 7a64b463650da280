"""What the benchmarks share: one whole-model graph to compare with, interleaved timing, one JSON line at the end."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime

from dash_export import __version__
from dash_export.builders.onnxruntime import lowering_for, write_segment
from dash_export.bundle import Bundle, EngineRecord, Segment
from dash_export.runtime.backends.base import Backend
from dash_export.runtime.cpus import cpu_name, physical_cores
from dash_export.runtime.dispatch import EngineSet
from dash_export.runtime.huge_pages import on_huge_pages
from dash_export.targets import recipe_from_dict


def whole_model(bundle: Bundle, target: str, backend: Backend) -> EngineSet:
    """The same layers at the same precisions, lowered as one graph without policy: what a per-layer runtime must not
    lose against.
    """
    build = bundle.load_build(target)
    segment = Segment(0, bundle.manifest.model.num_layers - 1, True, True, False)
    recipe = recipe_from_dict(build.recipe, target)
    folder = Path(tempfile.mkdtemp(prefix="dash-export-bench-", dir=bundle.root.parent))
    try:
        (folder / "rope.data").write_bytes(bundle.path("onnx/rope.data").read_bytes())
        path = write_segment(lowering_for(bundle, recipe), bundle, segment, False, folder)[0]
        record = EngineRecord(str(path.relative_to(bundle.root.parent)), 0, "")
        whole = replace(build, segments=(segment,), engines={segment.name: record})
        with on_huge_pages():
            return EngineSet(Bundle(bundle.root.parent, bundle.manifest), whole, backend, "plain")
    finally:
        # Loaded: the mapping keeps the pages.
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def interleaved(
    runs: Sequence[Callable[[], object]], rounds: int, block: int = 8, settle: int = 2
) -> list[list[float]]:
    """Time `runs` in turn, a block of calls each: seconds per call, one median per block.

    A decoder runs the same engines token after token, so a block's first `settle` calls, which find another variant's
    weights in the caches, are dropped. The first two rounds are warm-up.
    """
    times: list[list[float]] = [[] for _ in runs]
    for round_ in range(2 + rounds):
        for index, run in enumerate(runs):
            sample = []
            for _ in range(settle + block):
                began = time.perf_counter()
                run()
                sample.append(time.perf_counter() - began)
            if round_ >= 2:
                times[index].append(median(sample[settle:]))
    return times


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the ratios round by round: what drifts with the machine cancels."""
    return median(x / y for x, y in zip(a, b, strict=True))


def spread(layers: Sequence[int], count: int) -> list[int]:
    """`count` of the layers, evenly spread."""
    return [layers[int((index + 0.5) * len(layers) / count)] for index in range(count)]


def print_json(name: str, result: dict[str, Any]) -> None:
    """One line for machines, with where it ran."""
    machine = {"processor": cpu_name(), "cores": physical_cores(), "python": platform.python_version()}
    versions = {"dash-export": __version__, "onnxruntime": onnxruntime.__version__}
    print(json.dumps({"benchmark": name, **result, "machine": machine | versions}))
