"""Units and the rule that decides about them, shared by the runtime, the oracle, training and evaluation (numpy only).

A gated unit is skipped for a token where damage < trade_off * cost: the one-step greedy policy of the Markov decision
process (DASH, arXiv 2505.17420, with a differential reward: minus the divergence an action adds, minus trade_off times
the time it costs). All units are decided at once, from one state. `max_layers` bounds the layers one token may run.
Nothing here is random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import ceil
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dash_export.core.arguments import check_fields
from dash_export.errors import PolicyError
from dash_export.files.typed_json import NotNegative

Damages = npt.NDArray[np.floating[Any]]
"""[units, tokens], nats."""
Skips = npt.NDArray[np.bool_]
"""[units, tokens]: true where the unit is skipped."""
Actions = npt.NDArray[np.int8]
"""[tokens, layers] of `Action`: a skip map."""

RECOMMENDED_LOSS, WORTH = 0.02, 0.05
"""Fractions of perplexity and of decode time: a bundle recommends to lose the first if that saves the second."""
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


@dataclass(frozen=True)
class DecisionRule:
    """Rule that skips a unit where damage is below the unit's limit (trade_off * cost, nats); damage is never negative,
    so a limit of 0 never skips. `sizes`: layers of each unit; `fewest`: layers that every token skips at least.
    """

    asks: ClassVar[bool] = True
    limits: tuple[float, ...]
    sizes: tuple[int, ...]
    fewest: int = 0

    def scaled(self, factor: float) -> DecisionRule:
        """Return the rule with `factor` times this rule's trade-off."""
        return replace(self, limits=tuple(factor * limit for limit in self.limits))

    def skips(self, damage: Damages) -> Skips:
        """Return skipped [units, tokens] for damage [units, tokens]. Where `fewest` asks a token to skip more than the
        limits do, it also skips the units that do least damage per layer.
        """
        exact = damage.astype(np.float64)
        below: Skips = exact < np.array(self.limits)[:, None]
        if not self.fewest:
            return below
        sizes = np.array(self.sizes)[:, None]
        ranked = np.argsort(np.where(below, -1.0, exact / sizes), axis=0, kind="stable")
        before = np.cumsum(sizes[ranked, 0], axis=0) - sizes[ranked, 0]
        forced = np.zeros_like(below)
        np.put_along_axis(forced, ranked, before < self.fewest, axis=0)
        return below | forced


def decision_rule(
    units: Sequence[Unit], cost: Sequence[float], trade_off: float, max_layers: int | None = None, num_layers: int = 0
) -> DecisionRule:
    """Build the rule for one model. `cost`: what skipping each unit saves, as a fraction of the dense time of one
    token; `trade_off` in nats per dense token time; `max_layers`: of `num_layers`, the most that a token runs. Raises
    PolicyError for a trade-off or a bound out of range.
    """
    if not 0 <= trade_off < float("inf"):
        raise PolicyError(f"The trade-off must be a finite number >= 0 (0 is dense), not {trade_off!r}.")
    if max_layers is not None:
        check_max_layers(max_layers, units, num_layers)
    fewest = 0 if max_layers is None else num_layers - max_layers
    return DecisionRule(tuple(trade_off * own for own in cost), tuple(len(unit.layers) for unit in units), fewest)


def check_max_layers(max_layers: int, units: Sequence[Unit], num_layers: int) -> None:
    """Raise PolicyError for more layers than the model has, or for fewer than always run."""
    always = num_layers - sum(len(unit.layers) for unit in units)
    if not always <= max_layers <= num_layers:
        why = f"{always} of the model's {num_layers} layers always run"
        raise PolicyError(f"max_layers = {max_layers}: {why}, so give a number from {always} to {num_layers}.")


_TAKES = {
    "dense": (),
    "static": ("skip", "budget", "skipped", "max_layers"),
    "token": ("trade_off", "budget", "skipped", "max_kl", "max_layers"),
}
POLICY_KINDS = tuple(_TAKES)
OWN = "own"
"""Kind of a policy that is a class of the user's, given as `module:Class`."""


@dataclass(frozen=True)
class Setting:
    """A session's policy and how much it skips: exactly one of these amounts (`dense` takes none).

    `skip`: these layers, whole units (static); `trade_off`: nats per dense token time; `budget`: mean decode time as a
    fraction of dense; `skipped`: mean layers skipped per token; `max_kl`: mean divergence from dense, nats per token,
    on the calibration text; `max_layers`: a bound for every token (for `token` beside another amount too). A static
    policy skips units in its order until they reach the amount. `hold` steers a `token` session so that its running
    mean time stays at the budget, whatever the text; without it the budget is a mean over the calibration text. Raises
    PolicyError for wrong types; `check` checks the amounts.
    """

    policy: str | None = None
    skip: tuple[int, ...] | None = None
    trade_off: float | None = None
    budget: float | None = None
    skipped: float | None = None
    max_kl: float | None = None
    max_layers: int | None = None
    hold: bool = True

    def __post_init__(self) -> None:
        check_fields(self, PolicyError)

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the amounts that are set."""
        return tuple(name for name in ("skip", *_TAKES["token"]) if getattr(self, name) is not None)

    @property
    def kind(self) -> str:
        """Policy kind. Without `policy` the amounts decide: `skip` means static, another amount token, none dense."""
        if self.policy is not None:
            return OWN if ":" in self.policy else self.policy
        return "static" if self.skip is not None else "token" if self.given else "dense"

    def check(self) -> None:
        """Raise PolicyError for an unknown kind and for amounts that do not go together or are out of range."""
        if self.kind == OWN and self.given:
            raise PolicyError(f"A policy of your own decides by itself: {self.given[0]} means nothing to it.")
        if self.kind not in (*POLICY_KINDS, OWN):
            known = f"{', '.join(POLICY_KINDS)}, and module:Class or file.py:Class for one of your own"
            raise PolicyError(f"There is no policy kind {self.kind!r:.60}. Known: {known}.")
        takes = _TAKES.get(self.kind, ())
        if wrong := [name for name in self.given if name not in takes]:
            owners = ", ".join(kind for kind in POLICY_KINDS if wrong[0] in _TAKES[kind])
            raise PolicyError(f"{wrong[0]} belongs to the policies {owners}, not to {self.kind!r}.")
        amounts = [name for name in self.given if name != "max_layers" or self.kind != "token"]
        if len(amounts) > 1:
            raise PolicyError(f"Give {amounts[0]} or {amounts[1]}, not both: each says how much is skipped.")
        if takes and not self.given:
            raise PolicyError(f"Say how much the policy {self.kind!r} skips: give one of {', '.join(takes)}.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PolicyError(f"The budget is a decode time as a fraction of dense, in (0, 1], not {self.budget!r}.")
        for name in ("skipped", "max_kl"):
            if (getattr(self, name) or 0) < 0:
                raise PolicyError(f"{name} must be a finite number >= 0 (0 is dense), not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class DialPoint:
    """One calibrated setting. Per token of the calibration text, at this trade-off: mean layers run, mean decode time
    as a fraction of dense, mean KL from the dense mode of the same build (nats), and perplexity over that mode's.
    """

    trade_off: NotNegative
    layers: NotNegative
    time: NotNegative
    kl: NotNegative
    perplexity: NotNegative = 1.0


def recommended_budget(dial: Sequence[DialPoint]) -> float | None:
    """Return the budget at which perplexity on the calibration text is RECOMMENDED_LOSS above dense's, interpolated;
    None where that budget saves less than WORTH of the decode time.
    """
    points = sorted(dial, key=lambda point: -point.time)
    after = next((index for index, point in enumerate(points) if point.perplexity > 1 + RECOMMENDED_LOSS), len(points))
    if not after:
        return None
    budget = points[after - 1].time
    if after < len(points):
        low, high = points[after - 1], points[after]
        share = (1 + RECOMMENDED_LOSS - low.perplexity) / (high.perplexity - low.perplexity)
        budget -= share * (low.time - high.time)
    return ceil(round(1000 * budget, 6)) / 1000 if budget <= 1 - WORTH else None  # up: less may be off the dial
