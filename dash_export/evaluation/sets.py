"""Static sets of units: each alone, and the sets that grow from the least damaging one."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import DENSE_POSITIONS, Setting, Unit
from dash_export.evaluation.results import TextResult
from dash_export.evaluation.settings import entrants
from dash_export.evaluation.text import TokenIds, measure_text
from dash_export.runtime import DashRuntime

ESSENTIAL_FACTOR = 4.0
"""A unit whose divergence is over this many times the median one is essential."""
CANDIDATES = 8
"""A step tries this many units, the least damaging alone: every try costs a pass over the text."""


def measure_sets(
    runtime: DashRuntime, sets: Sequence[Sequence[Unit]], parts: Sequence[TokenIds], progress: Progress = no_progress
) -> list[TextResult]:
    """Dense, then every set of skipped units, over every window."""
    skipped = [tuple(sorted(layer for unit in own for layer in unit.layers)) for own in sets]
    settings = [Setting("dense"), *(Setting("static", skip=layers) for layers in skipped)]
    return measure_text(entrants(runtime, settings), parts, DENSE_POSITIONS, progress)


def greedy_sets(
    runtime: DashRuntime,
    singles: Sequence[TextResult],
    largest: int,
    parts: Sequence[TokenIds],
    progress: Progress = no_progress,
) -> list[TextResult]:
    """The best set of one unit, then the best unit to add to it, and so on up to `largest` units. `singles`: each unit
    of the bundle skipped alone.
    """
    units = runtime.bundle.manifest.policy.units
    ranked = sorted(zip(singles, units, strict=True), key=lambda pair: pair[0].kl.value)
    if not ranked or largest < 1:
        return []
    found, chosen = [ranked[0][0]], [ranked[0][1]]
    while len(chosen) < min(largest, len(ranked)):
        candidates = [unit for _, unit in ranked if unit not in chosen][:CANDIDATES]
        tried = measure_sets(runtime, [(*chosen, unit) for unit in candidates], parts, progress)[1:]
        best = min(range(len(tried)), key=lambda at: tried[at].kl.value)
        found.append(tried[best])
        chosen.append(candidates[best])
    return found


def essential(singles: Sequence[TextResult], factor: float = ESSENTIAL_FACTOR) -> list[TextResult]:
    """Those whose divergence alone is over `factor` times the median: units that should never be skipped."""
    limit = factor * median(result.kl.value for result in singles) if singles else 0.0
    return [result for result in singles if result.kl.value > limit]
