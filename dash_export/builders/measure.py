"""What a build measures on the device: the cost of every layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from dash_export.build_record import Build, CostTable
from dash_export.bundle import Bundle
from dash_export.manifest import Manifest
from dash_export.runtime.backends.base import Backend, Launch
from dash_export.runtime.cpus import LoadMeter, cpu_name
from dash_export.runtime.device.base import Device
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.runtime import engines as load_engines
from dash_export.stretches import TokenTime
from dash_export.targets import recipe_from_dict

WARM_UP = 10
NOT_MEASURED = "not measured"
"""The device of a cost table that stands in until the build is measured where it runs."""


def uniform_cost(manifest: Manifest) -> CostTable:
    """A stand-in until the cost is measured: every layer the same, nothing but layers takes time."""
    share = 1.0 / manifest.model.num_layers
    return CostTable(0, 0.0, {}, {}, dict.fromkeys(manifest.policy.gated, share), NOT_MEASURED)


def measure_cost(bundle: Bundle, build: Build, backend: Backend | Device) -> CostTable:
    """Run tokens at the recipe's context, timing every segment and skip graph where it stands in the token, and a dense
    token's launches where a build has stretches.

    Medians over interleaved repeats. Layers of one shape (here: all gated layers) share the median of their costs, so
    that a noisy single measurement decides nothing.
    """
    model = bundle.manifest.model
    recipe = build.recipe["cost"]
    context = min(recipe["context"], model.max_positions - 1)
    engines = load_engines(bundle, build, backend, recipe_from_dict(build.recipe, "the build's recipe"), "plain")
    context = min(context, engines.model.max_positions - 1)
    cache: Any = engines.cache(context)
    cache.reserve(context + 1)
    step = engines.step(cache, 1)
    cache.length = context
    step.place()
    passes = [
        [
            (segment.name, run) if skip is None or segment.first % 2 != parity else (f"skip_{segment.first:02d}", skip)
            for segment, (run, skip) in zip(build.segments, step.launches(), strict=True)
        ]
        for parity in (0, 1)  # skipped in turn: a skip graph too is timed where it finds its weights cold
    ]
    stretched = step.dense_launches() if build.stretches and isinstance(step, BoundStep) else ()
    times: dict[str, list[float]] = defaultdict(list)
    meter = LoadMeter()
    whole: list[list[float]] = []
    for repeat in range(WARM_UP + recipe["repeats"]):
        if repeat == WARM_UP:
            times.clear()
            whole.clear()
        for one in passes:
            for (name, _), microseconds in zip(one, _timed(launch for _, launch in one), strict=True):
                times[name].append(microseconds)
        whole.append(_timed(stretched))
    load = meter.load()
    medians = {name: round(median(found), 2) for name, found in times.items()}
    runs = {segment.name: medians.pop(segment.name) for segment in build.segments}
    gated = [segment for segment in build.segments if segment.gated]
    saved = [runs[segment.name] - medians[f"skip_{segment.first:02d}"] for segment in gated]
    dense, launch = sum(runs.values()), 0.0
    if stretched:
        dense = float(np.median(whole, axis=0).sum())
        # Repeat by repeat, so that a machine that changes its speed does not pass for a launch.
        parts = TokenTime(build).parts()
        assert len(parts) == len(stretched)
        joined = [place for place, part in enumerate(parts) if build.segments[part.index].gated]
        fewer = np.sum([times[segment.name] for segment in gated], axis=0) - np.array(whole)[:, joined].sum(axis=1)
        launch = max(float(np.median(fewer)), 0.0) / (len(gated) - len(joined)) / dense
    share = max(median(saved), 0.0) / dense if saved else 0.0
    device = cpu_name() if isinstance(engines, EngineSet) else engines.device.name
    cost = dict.fromkeys(bundle.manifest.policy.gated, share)
    return CostTable(context, round(dense, 2), runs, medians, cost, device, launch, *load)


def _timed(launches: Iterable[Launch]) -> list[float]:
    """Microseconds of each, with what the host takes to come to it."""
    stamps = [time.perf_counter()]
    for launch in launches:
        launch()
        stamps.append(time.perf_counter())
    return [1e6 * (end - begin) for begin, end in pairwise(stamps)]
