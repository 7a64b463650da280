"""Parts that the benchmarks share: one whole-model graph to compare with, fresh processes, one table, one JSON line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.host.decode import EngineSet
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build, EngineRecord, Segment
from dash_export.commands.options import with_bounds
from dash_export.commands.tables import print_table
from dash_export.core.rule import DENSE, Rule
from dash_export.files.resources import resource_folder
from dash_export.measure.breakdown import this_machine
from dash_export.measure.intervals import Interval, median_ratios
from dash_export.measure.timing import in_turns

sys.path.append(str(Path(__file__).parents[1]))
HELD_OUT = resource_folder("calibration") / "heldout.txt"
"""No policy was trained on it."""

Times = dict[str, list[float]]
"""Variant -> seconds, one per round or per process."""


def timed(variants: dict[str, Callable[[], object]], rounds: int, block: int = 8, settle: int = 2) -> Times:
    """Time the variants in turn in this process, a block of calls each: a block's median, by round. A block's first
    `settle` calls, which find another variant's weights in the caches, are dropped, and so are two rounds of warm-up.
    """
    times: Times = {name: [] for name in variants}
    for number, index in in_turns(len(variants), 2 + rounds):
        name, run = list(variants.items())[index]
        sample = []
        for _ in range(settle + block):
            began = time.perf_counter()
            run()
            sample.append(time.perf_counter() - began)
        if number >= 2:
            times[name].append(median(sample[settle:]))
    return times


def in_fresh_processes(timed_once: Callable[..., Times], *arguments: object, processes: int) -> Times:
    """Medians of `timed_once(*arguments, number)` in several processes: where weights lie matters."""
    found: Times = {}
    for number in range(processes):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            times = pool.submit(timed_once, *arguments, number).result()
        for name, own in times.items():
            found.setdefault(name, []).append(float(np.median(own)))
        shown = ", ".join(f"{name} {1e3 * own[-1]:.3f} ms" for name, own in found.items())
        print(f"process {number + 1} of {processes}: {shown}")
    return found


def ratios(times: Times) -> dict[str, Interval]:
    return dict(zip(times, median_ratios(np.array(list(times.values()))), strict=True))


def report(title: str, unit: str, times: Times) -> dict[str, dict[str, float]]:
    rows, shown = {}, []
    for name, ratio in ratios(times).items():
        milliseconds = 1e3 * float(np.median(times[name]))
        shown.append((name, f"{milliseconds:.3f}", with_bounds(ratio, 3)))
        rows[name] = {"ms": round(milliseconds, 4)} | {key: round(value, 4) for key, value in asdict(ratio).items()}
    print_table(title, ("variant",), (f"ms per {unit}", "ratio (95 %)"), shown)
    return rows


def print_json(name: str, result: dict[str, Any]) -> None:
    print(json.dumps({"benchmark": name, **result, "machine": this_machine()}))


@contextmanager
def whole_build(bundle: Bundle, target: str) -> Iterator[tuple[Path, Build]]:
    """(root, build) of the same layers and precisions as one graph without policy. On disk only inside."""
    from dash_export.building.engine_graphs import EngineGraph, lower_graph  # a device has no onnx
    from dash_export.graphs.lower.surgery import save_extending

    build = bundle.load_build(target)
    segment = Segment(0, bundle.manifest.model.num_layers - 1, embed=True, head=True, gated=False)
    root = bundle.root.absolute().parent
    with tempfile.TemporaryDirectory(prefix="dash-export-bench-", dir=root) as name:
        folder = Path(name)
        whole = lower_graph(bundle, EngineGraph(segment.name, segment, segment.graphs), build.recipe)
        path = save_extending(whole, folder / f"{segment.name}.onnx")[0]
        record = EngineRecord(str(path.relative_to(root)), 0, "")
        yield root, replace(build, segments=(segment,), engines={segment.name: record}, files=())


def load_both(bundle: Path, target: str, whole: tuple[Path, Build], number: int) -> tuple[EngineSet, EngineSet]:
    """The engines of a build, and `whole_build`'s one graph. Who is loaded first changes with `number`."""
    from dash_export.backends.onnxruntime.ort_engine import OrtBackend

    opened = Bundle.open(bundle)
    facts = opened.manifest
    no_policy = replace(facts.policy, units=(), has_network=False)
    builds = [(opened, opened.load_build(target)), (Bundle(whole[0], replace(facts, policy=no_policy)), whole[1])]
    loaded: dict[int, EngineSet] = {}
    for index in (0, 1) if number % 2 == 0 else (1, 0):
        own, build = builds[index]
        found = OrtBackend(build.recipe.runtime.threads).load_build(own, build, "sync")
        assert isinstance(found, EngineSet)
        loaded[index] = found
    return loaded[0], loaded[1]


def one_token(engines: EngineSet, context: int, rule: Rule = DENSE) -> Callable[[], object]:
    cache = engines.cache(context)
    cache.reserve(context + 1)
    step = engines.step(cache, 1)

    def token() -> None:
        cache.length = context
        step.decode(1, rule)

    return token


def held_out(encode: Callable[[str], Sequence[int]], count: int) -> npt.NDArray[np.int64]:
    return np.resize(np.asarray(encode(HELD_OUT.read_text(encoding="utf-8")), np.int64), count)
