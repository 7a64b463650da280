"""Which units to train, and in which order a static policy skips them: both by skipping them and measuring the damage.

The units are the partition of the layers that gains most, from what skipping each candidate alone costs and saves. At
trade-off λ a token that can skip a unit gains max(0, λ * saved - damage), in nats; over λ that is time, and the mean
over tokens and the range of the dial is the unit's gain. Gains are taken to add up. That they do not quite, and that
the damage of a token is not known before, hits every partition alike: it is there to choose by, not to predict with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dash_export.artifacts import Progress, no_progress
from dash_export.decision import Unit
from dash_export.train.corpus import Batch
from dash_export.train.losses import divergence
from dash_export.train.model import GatedModel, SkipModules, always

LENGTHS = (1, 2, 3, 4, 6)
"""Layers of a candidate."""
LAUNCH = 0.001
"""The cost of one more engine, whether its unit is skipped or not: of a small model's token 0.002, and gains are judged
before the tuning, which about halves damages.
"""
GRID = 8
"""Trade-offs at which a gain is judged."""
GROUP = 4
"""Layers at which candidates begin whose sums are in memory at once: 0.1 GB of a 135M, 4.6 GB of an 8B. The search goes
over its text once for each such group.
"""

Windows = Sequence[tuple[Batch, torch.Tensor]]
"""Batches, and what the dense model makes of each: its normed last states at the counted positions."""


@dataclass(frozen=True)
class Candidate:
    """A unit; the mean damage of skipping it alone (nats per token), and as fractions of a token's time what a skip of
    it saves and what it gains.
    """

    unit: Unit
    damage: float
    saved: float
    gain: float


def candidate_groups(num_layers: int) -> list[list[Unit]]:
    """All units that are tried, by GROUP. The first sixth of the layers is in none, nor are 0 and 1: all decisions are
    made by what enters the layer before the first unit, which says too little that early.
    """
    firsts = range(max(2, num_layers // 6), num_layers)
    groups = (firsts[start : start + GROUP] for start in range(0, len(firsts), GROUP))
    return [[Unit(a, a + size - 1) for a in group for size in LENGTHS if a + size <= num_layers] for group in groups]


def judged_candidate(
    unit: Unit, damage: npt.NDArray[np.floating], saved: float, trade_offs: tuple[float, float]
) -> Candidate:
    """A candidate by the damage [tokens] of skipping it alone."""
    grid = np.geomspace(*trade_offs, GRID)
    gain = np.maximum(saved - damage[:, None] / grid, 0).mean()
    return Candidate(unit, float(damage.mean()), saved, float(gain))


def best_partition(candidates: Iterable[Candidate], num_layers: int) -> tuple[Candidate, ...]:
    """The candidates without a layer in common whose gains, less LAUNCH each, are the most together; none where none
    gains.
    """
    ending: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        ending.setdefault(candidate.unit.last, []).append(candidate)
    best: list[tuple[float, tuple[Candidate, ...]]] = [(0.0, ())]  # of the first layers, by how many
    for layer in range(num_layers):
        options = [best[layer]]
        for candidate in ending.get(layer, ()):
            gain, before = best[candidate.unit.first]
            options.append((gain + candidate.gain - LAUNCH, (*before, candidate)))
        best.append(max(options, key=lambda option: option[0]))
    return best[num_layers][1]


@torch.no_grad()
def with_dense(model: GatedModel, batches: Iterable[Batch]) -> Windows:
    """The dense pass over each batch, once for all the sets that are tried."""
    return [(batch, model.dense(batch.ids)[batch.counted]) for batch in batches]


@torch.no_grad()
def static_damage(model: GatedModel, modules: SkipModules, places: Sequence[int], windows: Windows) -> torch.Tensor:
    """KL (nats) of every counted token where all skip these units, [tokens]."""
    found = []
    for (ids, dense, counted), final in windows:
        rollout = model.rollout(ids, modules, always(len(modules.units), places), dense)
        found.append(divergence(model.head, final, rollout.final[counted], ids[counted]).kl)
    return torch.cat(found)


def greedy_order(
    model: GatedModel, modules: SkipModules, windows: Windows, progress: Progress = no_progress
) -> tuple[int, ...]:
    """Places of all units in the order in which a static policy skips them: each time the one that adds least damage a
    layer. The last half is not searched for, and as the last step ranks it: nobody skips nearly everything.
    """
    sizes, chosen, known, done = [len(unit.layers) for unit in modules.units], list[int](), 0.0, 0
    left, searched = list(range(len(sizes))), (len(sizes) + 1) // 2
    trials = sum(len(sizes) - step for step in range(searched))
    while len(chosen) < searched:
        totals = {}
        for place in left:
            totals[place] = float(static_damage(model, modules, (*chosen, place), windows).mean())
            done += 1
            progress("static order", done, trials)
        best, *left = sorted(left, key=lambda place: (totals[place] - known) / sizes[place])
        chosen.append(best)
        known = totals[best]
    return (*chosen, *left)
