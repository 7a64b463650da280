"""Which units: the partition of the layers that gains most, from what skipping each candidate alone costs and saves.

At trade-off λ a token that can skip a unit gains max(0, λ * saved - damage), in nats; over λ that is time, and the mean
over tokens and the range of the dial is the unit's gain. Gains are taken to add up. That they do not quite, and that
the damage of a token is not known before, hits every partition alike: it is there to choose by, not to predict with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.decision import Unit

LENGTHS = (1, 2, 3, 4, 6)
"""Layers of a candidate."""
LAUNCH = 0.001
"""What one more engine takes, whether its unit is skipped or not: of a small model's token 0.002, and gains are judged
before the tuning, which about halves damages.
"""
GRID = 8
"""Trade-offs at which a gain is judged."""


@dataclass(frozen=True)
class Candidate:
    """A unit; the mean damage of skipping it alone (nats per token), and as fractions of a token's time what a skip of
    it saves and what it gains.
    """

    unit: Unit
    damage: float
    saved: float
    gain: float


def candidate_units(num_layers: int) -> tuple[Unit, ...]:
    """All units that are tried. The first sixth of the layers is in none, nor are 0 and 1: all decisions are made by
    what enters the layer before the first unit, which says too little that early.
    """
    firsts = range(max(2, num_layers // 6), num_layers)
    return tuple(Unit(a, a + size - 1) for a in firsts for size in LENGTHS if a + size <= num_layers)


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
