"""What a build measures on the device: the cost of every layer, and where each trade-off lands on the calibration
text.
"""

from __future__ import annotations

import time
from collections import defaultdict
from statistics import median

import numpy as np
import numpy.typing as npt

from dash_export.bundle import Build, Bundle, CostTable, Manifest
from dash_export.decision import DENSE_POSITIONS, Action, DialPoint, decision_rule
from dash_export.errors import BundleError
from dash_export.resources import resource_folder
from dash_export.runtime.backends.base import Backend
from dash_export.runtime.cache import KVCache
from dash_export.runtime.cpus import cpu_name
from dash_export.runtime.dispatch import BoundStep, EngineSet
from dash_export.runtime.results import Score
from dash_export.runtime.rules import DENSE, Rule
from dash_export.runtime.runtime import DashRuntime

WARM_UP = 10
DIAL_WINDOWS = 4
DIAL_TOKENS = 128
DIAL_POINTS = 10


def uniform_cost(manifest: Manifest) -> CostTable:
    """A stand-in until the cost is measured: every layer the same, nothing but layers takes time."""
    share = 1.0 / manifest.model.num_layers
    return CostTable(0, 0.0, {}, {}, dict.fromkeys(manifest.policy.gated, share), "not measured")


def measure_cost(bundle: Bundle, build: Build, backend: Backend) -> CostTable:
    """Run tokens at the recipe's context, timing every segment and skip graph where it stands in the token.

    Medians over interleaved repeats. Layers of one shape (here: all gated layers) share the median of their costs, so
    that a noisy single measurement decides nothing.
    """
    model = bundle.manifest.model
    recipe = build.recipe["cost"]
    context = min(recipe["context"], model.max_positions - 1)
    engines = EngineSet(bundle, build, backend, "plain")
    cache = KVCache(model, context)
    cache.reserve(context + 1)
    step = BoundStep(engines, cache, 1)
    cache.length = context
    run_us: dict[str, list[float]] = defaultdict(list)
    skip_us: dict[str, list[float]] = defaultdict(list)
    step.place()
    for repeat in range(2 * (WARM_UP + recipe["repeats"])):
        for segment, bound in zip(build.segments, step.segments, strict=True):
            # Every second gated layer in turn is skipped: a skip graph too is timed where it finds its weights cold.
            skip = bound.skip if segment.first % 2 == repeat % 2 else None
            launch = bound.run if skip is None else skip
            began = time.perf_counter()
            launch()
            microseconds = 1e6 * (time.perf_counter() - began)
            if repeat >= 2 * WARM_UP:
                if skip is None:
                    run_us[segment.name].append(microseconds)
                else:
                    skip_us[f"skip_{segment.first:02d}"].append(microseconds)
    runs = {name: round(median(times), 2) for name, times in run_us.items()}
    skips = {name: round(median(times), 2) for name, times in skip_us.items()}
    dense = sum(runs.values())
    saved = [runs[segment.name] - skips[f"skip_{segment.first:02d}"] for segment in build.segments if segment.gated]
    share = max(median(saved), 0.0) / dense if saved else 0.0
    return CostTable(
        context, round(dense, 2), runs, skips, dict.fromkeys(bundle.manifest.policy.gated, share), cpu_name()
    )


def calibrate_dial(bundle: Bundle, build: Build, backend: Backend) -> tuple[DialPoint, ...]:
    """trade-off -> mean layers and mean time over the calibration text, each setting run for real under its own
    decisions.
    """
    runtime = DashRuntime(bundle, build, backend)
    windows = _calibration_windows(runtime)
    cost = build.cost.cost
    gated = bundle.manifest.policy.gated
    damages = np.concatenate([_score(runtime, DENSE, window).damage for window in windows])[:, list(gated)]
    ratios = damages / np.array([max(cost[layer], 1e-9) for layer in gated])
    grid = np.quantile(ratios, np.linspace(0.05, 1.0, DIAL_POINTS - 1))
    # Past the largest ratio everything gated is skipped, whatever the feedback of skipping does to damage.
    settings = [0.0, *grid.tolist(), 4.0 * float(ratios.max()) + 1.0]
    points = []
    for trade_off in settings:
        rule = decision_rule(bundle.manifest.model.num_layers, gated, cost, trade_off)
        skipped = np.concatenate([_score(runtime, rule, window).actions for window in windows]) == Action.SKIP
        time_saved = sum(skipped[:, layer].mean() * cost[layer] for layer in gated)
        layers = bundle.manifest.model.num_layers - skipped.sum(axis=1).mean()
        points.append(DialPoint(float(f"{trade_off:.6g}"), round(float(layers), 4), round(1.0 - float(time_saved), 5)))
    return tuple(sorted(points, key=lambda point: point.trade_off))


def _score(runtime: DashRuntime, rule: Rule, window: npt.NDArray[np.int64]) -> Score:
    return runtime.session_under(rule).score(window, prefix=DENSE_POSITIONS)


def _calibration_windows(runtime: DashRuntime) -> list[npt.NDArray[np.int64]]:
    path = resource_folder("calibration") / "prose.txt"
    if not path.is_file():
        raise BundleError(f"The calibration text {path} is missing: install dash-export again.")
    ids = np.array(runtime.text.encode(path.read_text(encoding="utf-8")), np.int64)
    length = min(DIAL_TOKENS, runtime.engines.model.max_positions)
    starts = np.linspace(0, max(0, len(ids) - length), DIAL_WINDOWS).astype(int)
    return [ids[start : start + length] for start in starts]
