"""Gated units of layers, what is done with them for each token, and how both are written (numpy only)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.errors import PolicyError

Damages = npt.NDArray[np.floating[Any]]
"""[units, tokens], nats."""
Skips = npt.NDArray[np.bool_]
"""[units, tokens]: true where the unit is skipped."""
Actions = npt.NDArray[np.int8]
"""[tokens, layers] of `Action`: a skip map."""

DENSE_POSITIONS = 2
"""Positions 0 and 1 always run every layer: they carry the attention sinks that every later token reads."""


class Action(IntEnum):
    """The code of what a layer does for one token. Zero is `run`, so an array of zeros is a dense pass."""

    RUN = 0
    SKIP = 1


@dataclass(frozen=True, order=True)
class Unit:
    """Consecutive layers [first, last] that are run or skipped as one."""

    first: int
    last: int

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def name(self) -> str:
        """Name in graphs and engines, "05-07"."""
        return f"{self.first:02d}-{self.last:02d}"

    @property
    def bypass(self) -> str:
        """Name of the bypass graph and of the bypass engine."""
        return f"bypass_{self.name}"

    def __str__(self) -> str:
        return f"{self.first}-{self.last}" if self.first != self.last else str(self.first)


def units_text(units: Iterable[Unit]) -> str:
    """Write units as "5-7,8-10", which `parse_units` reads; "none" for no units."""
    return ",".join(map(str, units)) or "none"


_MOST_LISTED = 10_000


def parse_units(text: str) -> tuple[Unit, ...]:
    """Parse units: "5-7,8-10,13" has three. Raises PolicyError."""
    units, layers = [], 0
    for part in text.replace(" ", "").split(","):
        ends = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        if ends is None or int(ends[1]) > int(ends[2] or ends[1]):
            raise PolicyError(f"Units are written like 5-7,8-10,13; {text!r:.60} is not a list of layers like that.")
        units.append(Unit(int(ends[1]), int(ends[2] or ends[1])))
        layers += len(units[-1].layers)
        if layers > _MOST_LISTED:
            raise PolicyError(f"{text!r:.60} lists over {_MOST_LISTED} layers.")
    return tuple(units)


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse layers: "2-5,9" -> (2, 3, 4, 5, 9). Raises PolicyError."""
    return tuple(sorted({layer for unit in parse_units(text) for layer in unit.layers}))


def layers_text(layers: Iterable[int]) -> str:
    """Write layers, (2, 3, 4, 9), as "2-4,9", which `parse_layers` reads; "none" for no layers."""
    found: list[Unit] = []
    for layer in sorted(layers):
        follows = found and found[-1].last == layer - 1
        found.append(Unit(found.pop().first if follows else layer, layer))
    return units_text(found)


def check_units(units: Sequence[Unit], read: int, num_layers: int) -> None:
    """Raise PolicyError unless the units are separate ranges of the model's layers in rising order, and `read`, the
    layer whose input decides, lies before the first unit.
    """
    before = 0
    for unit in units:
        if not before <= unit.first <= unit.last < num_layers:
            must = f"must be of layers 0 to {num_layers - 1} in rising order, each layer in one at most."
            raise PolicyError(f"The units {units_text(units):.200} {must}")
        before = unit.last + 1
    if units and not 0 <= read < units[0].first:
        must = f"that must be one before the first unit ({units[0]}). Layer 0 can be in no unit."
        raise PolicyError(f"The decision reads the input of layer {read}: {must}")


def check_static_order(order: Sequence[int], units: Sequence[Unit]) -> None:
    """Raise PolicyError where the order of a static policy has a unit that does not exist, or one unit twice."""
    if len(set(order)) != len(order) or not set(order) <= set(range(len(units))):
        raise PolicyError(f"The static order must list places of units, each at most once; got {list(order)!s:.200}.")


def layer_actions(skipped: Skips, units: Sequence[Unit], num_layers: int) -> Actions:
    """Return the skip map [tokens, layers] of skipped units [units, tokens]."""
    actions = np.zeros((skipped.shape[1], num_layers), np.int8)
    for unit, row in zip(units, skipped, strict=True):
        actions[row, unit.first : unit.last + 1] = Action.SKIP
    return actions


def unit_skips(actions: Actions, units: Sequence[Unit]) -> Skips:
    """Return the skipped units [units, tokens] of a skip map [tokens, layers]. Raises PolicyError where the map skips
    a part of a unit, or a layer that is in no unit.
    """
    skipped = np.array([actions[:, unit.first] == Action.SKIP for unit in units], np.bool_).reshape(-1, len(actions))
    if not np.array_equal(layer_actions(skipped, units, actions.shape[1]), actions):
        raise PolicyError(f"These actions skip parts: units are skipped whole. Units: {units_text(units)}.")
    return skipped


def units_of(layers: Iterable[int], units: Sequence[Unit]) -> tuple[int, ...]:
    """Return the indices of the units that these layers make up. Raises PolicyError where they are not whole units."""
    given = set(layers)
    found = tuple(place for place, unit in enumerate(units) if given >= set(unit.layers))
    if given != {layer for place in found for layer in units[place].layers}:
        raise PolicyError(
            f"Layers {layers_text(given)} are not whole units. Units of this policy: {units_text(units)}."
        )
    return found
