"""Which launches a token takes where stretches of layers are engines too, and how long that takes (numpy only).

Layers next to each other that take the same action need no engine each. What a launch costs does not depend on how much
it runs, so the fewest are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dash_export.build_record import Build
from dash_export.decision import Action

LONGEST_STRETCH = 7
"""Layers. The more a stretch has, the more launches it saves, and the fewer tokens run them all. For 14 gated layers of
which a token skips 4, the token policy of SmolLM2-135M-Instruct takes 14 launches one by one, 7.5 with one stretch of
all that runs, 6.0 with two of 7, 7.1 with five and 7.9 with seven, each with pairs that skip.
"""


@dataclass(frozen=True)
class Part:
    """One launch: `count` segments from the one with this index on, all of which take one action."""

    index: int
    count: int
    skips: bool


Lengths = Mapping[tuple[int, bool], Sequence[int]]
"""(first layer, whether it is skipped) -> how many layers the stretches from there on have, longest first."""


def lengths(stretches: Iterable[tuple[int, bool, int]]) -> Lengths:
    """Of stretches given as (first layer, whether it is skipped, layers)."""
    found: dict[tuple[int, bool], list[int]] = {}
    for first, skips, count in stretches:
        found.setdefault((first, skips), []).append(count)
    return {start: sorted(counts, reverse=True) for start, counts in found.items()}


def cover(layers: Sequence[int], skipped: Collection[int], known: Lengths) -> list[Part]:
    """The launches of a token that skips these layers. `layers`: the gated layer of each segment, -1 for one that
    always runs. From every layer on it is the longest stretch that fits.
    """
    skips = [layer in skipped for layer in layers]
    parts = []
    index = 0
    while index < len(layers):
        own = skips[index]
        counts = known.get((layers[index], own), ())
        count = next((count for count in counts if skips[index : index + count].count(own) == count), 1)
        parts.append(Part(index, count, own))
        index += count
    return parts


def breaking(build: Build) -> dict[tuple[int, ...], float]:
    """The layers of every stretch that runs, and what breaking it costs: a launch more for each but one of them, as a
    fraction of the dense time. (Neighbours that are skipped take fewer; that is left out.)
    """
    return {
        tuple(item.layers): build.cost.launch * (len(item.layers) - 1) for item in build.stretches if not item.skips
    }


class TokenTime:
    """Decode time of a token as a fraction of dense, predicted from a build's cost table."""

    def __init__(self, build: Build) -> None:
        self._cost, self._launch = build.cost.cost, build.cost.launch
        self._layers = [segment.first if segment.gated else -1 for segment in build.segments]
        self._lengths = lengths((item.first, item.skips, len(item.layers)) for item in build.stretches)
        self._dense = len(self.parts())

    def parts(self, skipped: Collection[int] = ()) -> list[Part]:
        """The launches of one that skips these gated layers."""
        return cover(self._layers, skipped, self._lengths)

    def of(self, skipped: Collection[int]) -> float:
        """Of one that skips these gated layers."""
        return 1.0 - sum(self._cost[layer] for layer in skipped) + self.launching(skipped)

    def launching(self, skipped: Collection[int]) -> float:
        """What is in it of launches that a dense token does not take."""
        if not self._launch:
            return 0.0
        return self._launch * (len(self.parts(skipped)) - self._dense)

    def total(self, actions: npt.NDArray[np.int8]) -> float:
        """The sum over tokens, actions [tokens, layers]."""
        rows, counts = np.unique(actions, axis=0, return_counts=True)
        times = [self.of(np.flatnonzero(row == Action.SKIP).tolist()) for row in rows]
        return float(np.dot(times, counts))
