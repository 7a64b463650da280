"""Choice of the units to train, and of the order in which a static policy skips them: both by measured damage.

The units are the partition of the layers with the largest gain. At trade-off λ a token that can skip a unit gains
max(0, λ * saved - damage), in nats. Divided by λ that is time, and its mean over tokens and the range of the dial is
the unit's gain. It favours small units: gains do not quite add up, and damage is not known before.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dash_export.core.units import Unit
from dash_export.files.artifacts import Progress, no_progress
from dash_export.train.corpus import Batch
from dash_export.train.losses import dense_logits, kl_divergence
from dash_export.train.model import GatedModel, SkipModules, always

LENGTHS = (1, 2, 3, 4, 6)
"""Numbers of layers that a candidate may have."""
LAUNCH = 0.002
"""Cost of one more engine, whether its unit is skipped or not, as a fraction of a small model's token. Half of it is
used before the tuning, which about halves damages.
"""
GRID = 8
"""Number of trade-offs at which a gain is judged."""
GROUP = 4
"""Number of first layers whose candidates have their sums in memory at once: 0.1 GB for a 135M, 4.6 GB for an 8B. The
search goes over its text once for each such group.
"""

Windows = Sequence[tuple[Batch, list[torch.Tensor]]]
"""Batches, each with the `dense_logits` at the counted positions."""


@dataclass(frozen=True)
class Candidate:
    """A unit. `damage`: mean damage of skipping it alone, nats per token; `saved`: what a skip of it saves; `gain`: its
    mean gain per token, skipped or not; both as fractions of a token's time.
    """

    unit: Unit
    damage: float
    saved: float
    gain: float


def candidate_groups(num_layers: int, every: int = 1) -> list[list[Unit]]:
    """Return all units that are tried, in groups by GROUP; their first layers are `every` layers apart. The first sixth
    of the layers is in none, nor are layers 0 and 1: the policy reads the input of the layer before the first unit, and
    that early it says too little.
    """
    firsts = range(max(2, num_layers // 6), num_layers, every)
    groups = (firsts[start : start + GROUP] for start in range(0, len(firsts), GROUP))
    return [[Unit(a, a + size - 1) for a in group for size in LENGTHS if a + size <= num_layers] for group in groups]


def ruled_units(num_layers: int) -> tuple[Unit, ...]:
    """Return units by a rule, for a training without a search: from a fifth of the layers on to the last but one, a
    sixth of them each. The searches for 24 and 30 layers found units of 2 to 6 layers there.
    """
    first, size = max(2, round(num_layers / 5)), max(1, round(num_layers / 6))
    return tuple(Unit(a, min(a + size, num_layers - 1) - 1) for a in range(first, num_layers - 1, size))


def mean_gain(damage: npt.NDArray[np.floating], saved: float, trade_offs: tuple[float, float]) -> float:
    """Return what a unit gains per token, over tokens of this damage [tokens] and the dial."""
    return float(np.maximum(saved - damage[:, None] / np.geomspace(*trade_offs, GRID), 0).mean())


def best_partition(candidates: Iterable[Candidate], num_layers: int) -> tuple[Candidate, ...]:
    """Return the candidates, no two with a layer in common, with the largest sum of gains less LAUNCH / 2 each; none
    where none gains.
    """
    ending: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        ending.setdefault(candidate.unit.last, []).append(candidate)
    best: list[tuple[float, tuple[Candidate, ...]]] = [(0.0, ())]  # best[n]: of the first n layers
    for layer in range(num_layers):
        options = [best[layer]]
        for candidate in ending.get(layer, ()):
            gain, before = best[candidate.unit.first]
            options.append((gain + candidate.gain - LAUNCH / 2, (*before, candidate)))
        best.append(max(options, key=lambda option: option[0]))
    return best[num_layers][1]


def units_that_pay(units: Sequence[Unit], gains: Sequence[float]) -> tuple[int, ...]:
    """Return the places of the units to keep, now that they are tuned: those with the largest sum of gains less LAUNCH
    for each engine. An engine is a unit, or the layers between two; what comes before and after all is one anyway.
    """
    best: list[tuple[float, tuple[int, ...]]] = []  # of the sets that end with each unit
    for place, (unit, gain) in enumerate(zip(units, gains, strict=True)):
        before = [(0.0, tuple[int, ...]())]
        for value, kept in best:
            apart = unit.first > units[kept[-1]].last + 1
            before.append((value - LAUNCH * apart, kept))
        value, kept = max(before, key=lambda option: option[0])
        best.append((value + gain - LAUNCH, (*kept, place)))
    return max(best, key=lambda option: option[0])[1]


@torch.no_grad()
def with_dense(model: GatedModel, batches: Iterable[Batch]) -> Windows:
    """Run the dense pass over each batch, once for all sets of units that are tried on it."""
    return [(batch, [*dense_logits(model.common, model.dense(batch.ids)[batch.counted])]) for batch in batches]


@torch.no_grad()
def static_damage(model: GatedModel, modules: SkipModules, places: Sequence[int], windows: Windows) -> torch.Tensor:
    """Return the KL (nats) of every counted token, [tokens], where all tokens skip the units at `places`."""
    found = []
    for (ids, dense, counted), final in windows:
        rollout = model.rollout(ids, modules, always(len(modules.units), places), dense)
        found.append(kl_divergence(model.common, final, rollout.final[counted]))
    return torch.cat(found)


def greedy_order(
    sizes: Sequence[int], damage: Callable[[tuple[int, ...]], float], progress: Progress = no_progress
) -> tuple[int, ...]:
    """Return the places of all units, of `sizes` layers, in the order in which a static policy skips them: each step
    adds the unit with the least added `damage` (of a set of places) per layer. Only the first half is searched; the
    rest is as the last step ranks it, because nobody skips nearly everything.
    """
    chosen, known, done = list[int](), 0.0, 0
    left, searched = list(range(len(sizes))), (len(sizes) + 1) // 2
    trials = sum(len(sizes) - step for step in range(searched))
    while len(chosen) < searched:
        totals = {}
        for place in left:
            totals[place] = damage((*chosen, place))
            done += 1
            progress("static order", done, trials)
        best, *left = sorted(left, key=lambda place: (totals[place] - known) / sizes[place])
        chosen.append(best)
        known = totals[best]
    return (*chosen, *left)
