"""The cost of every unit, as a build measures it on the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from statistics import median
from typing import Any

from dash_export.bundle import Bundle
from dash_export.manifest import Build, CostTable, Manifest
from dash_export.runtime.backends import Backend, Launch, backend_errors
from dash_export.runtime.cpus import LoadMeter, cpu_name
from dash_export.runtime.decode import EngineSet
from dash_export.runtime.device.base import Device
from dash_export.runtime.runtime import engines as load_engines

WARM_UP = 10
NOT_MEASURED = "not measured"
"""The device of a cost table that stands in until the build is measured where it runs."""


def uniform_cost(manifest: Manifest) -> CostTable:
    """A stand-in until the cost is measured: every layer the same, nothing but layers takes time."""
    cost = tuple(len(unit.layers) / manifest.model.num_layers for unit in manifest.policy.units)
    return CostTable(0, 0.0, {}, {}, cost, NOT_MEASURED)


def measure_cost(bundle: Bundle, build: Build, backend: Backend | Device) -> CostTable:
    """Run tokens at the recipe's context, timing every segment and bypass where it stands in the token.

    Medians over interleaved repeats. Units of as many layers share the median of their costs, so that a noisy single
    measurement decides nothing.
    """
    model, units = bundle.manifest.model, bundle.manifest.policy.units
    recipe = build.recipe.cost
    engines = load_engines(bundle, build, backend, build.recipe, "sync")
    context = min(recipe.context, model.max_positions - 1, engines.model.max_positions - 1)
    cache: Any = engines.cache(context)
    cache.reserve(context + 1)
    step = engines.step(cache, 1)
    cache.length = context
    step.place()
    names = [segment.name for segment in build.segments]
    gated = [place for place, segment in enumerate(build.segments) if segment.gated]
    bypasses = dict(zip(gated, (unit.bypass for unit in units), strict=True))
    passes = [
        # Skipped in turn: a bypass too is timed where it finds its weights cold.
        [
            (names[place], run) if bypass is None or gated.index(place) % 2 != parity else (bypasses[place], bypass)
            for place, (run, bypass) in enumerate(step.launches())
        ]
        for parity in (0, 1)
    ]
    times: dict[str, list[float]] = defaultdict(list)
    meter = LoadMeter()
    for repeat in range(WARM_UP + recipe.repeats):
        if repeat == WARM_UP:
            times.clear()
        for one in passes:
            for (name, _), microseconds in zip(one, _timed(launch for _, launch in one), strict=True):
                times[name].append(microseconds)
    load = meter.load()
    medians = {name: round(median(found), 2) for name, found in times.items()}
    runs = {name: medians.pop(name) for name in names}
    dense = sum(runs.values())
    alike: dict[int, list[float]] = defaultdict(list)
    for place, unit in zip(gated, units, strict=True):
        alike[len(unit.layers)].append(runs[names[place]] - medians[unit.bypass])
    cost = tuple(max(median(alike[len(unit.layers)]), 0.0) / dense for unit in units)
    device = cpu_name() if isinstance(engines, EngineSet) else engines.device.name
    return CostTable(context, round(dense, 2), runs, medians, cost, device, *load)


@backend_errors
def _timed(launches: Iterable[Launch]) -> list[float]:
    """Microseconds of each, with what the host takes to come to it."""
    stamps = [time.perf_counter()]
    for launch in launches:
        launch()
        stamps.append(time.perf_counter())
    return [1e6 * (end - begin) for begin, end in pairwise(stamps)]
