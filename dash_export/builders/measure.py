"""What a build measures on the device: the cost of every layer."""

from __future__ import annotations

import time
from collections import defaultdict
from statistics import median
from typing import Any

from dash_export.bundle import Build, Bundle, CostTable, Manifest
from dash_export.runtime.backends.base import Backend, Launch
from dash_export.runtime.cpus import cpu_name
from dash_export.runtime.device.base import Device
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.runtime import engines as load_engines
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
    run_us: dict[str, list[float]] = defaultdict(list)
    skip_us: dict[str, list[float]] = defaultdict(list)
    dense_us: dict[int, list[float]] = defaultdict(list)
    step.place()
    launches = step.launches()
    stretched = step.dense_launches() if build.stretches and isinstance(step, BoundStep) else ()
    for repeat in range(2 * (WARM_UP + recipe["repeats"])):
        warm = repeat >= 2 * WARM_UP
        for segment, (run, skip) in zip(build.segments, launches, strict=True):
            # Every second gated layer in turn is skipped: a skip graph too is timed where it finds its weights cold.
            chosen = run if skip is None or segment.first % 2 != repeat % 2 else skip
            microseconds = _microseconds(chosen)
            if warm and chosen is skip:
                skip_us[f"skip_{segment.first:02d}"].append(microseconds)
            elif warm:
                run_us[segment.name].append(microseconds)
        for place, whole in enumerate(stretched if repeat % 2 else ()):
            microseconds = _microseconds(whole)
            if warm:
                dense_us[place].append(microseconds)
    runs = {name: round(median(times), 2) for name, times in run_us.items()}
    skips = {name: round(median(times), 2) for name, times in skip_us.items()}
    each = sum(runs.values())
    dense = sum(median(times) for times in dense_us.values()) if stretched else each
    saved = [runs[segment.name] - skips[f"skip_{segment.first:02d}"] for segment in build.segments if segment.gated]
    share = max(median(saved), 0.0) / dense if saved else 0.0
    device = cpu_name() if isinstance(engines, EngineSet) else engines.device.name
    fewer = len(launches) - len(stretched)
    launch = max(each - dense, 0.0) / fewer / dense if stretched and fewer else 0.0
    cost = dict.fromkeys(bundle.manifest.policy.gated, share)
    return CostTable(context, round(dense, 2), runs, skips, cost, device, launch)


def _microseconds(launch: Launch) -> float:
    began = time.perf_counter()
    launch()
    return 1e6 * (time.perf_counter() - began)
