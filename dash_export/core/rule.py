"""The rule that decides about units, shared by the runtime, the oracle, training and measuring (numpy only).

A gated unit is skipped for a token where damage < trade_off * cost: the one-step greedy policy of the Markov decision
process (DASH, arXiv 2505.17420, with a differential reward). All units are decided at once, from one state.
`max_layers` bounds the layers one token may run. Dense and static are the same rule with limits of 0 and infinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dash_export.core.units import Damages, Skips, Unit
from dash_export.errors import PolicyError


@dataclass(frozen=True)
class State:
    """Tokens of a step, with what is known when their units are decided. The arrays are the runtime's own memory: read
    them, and copy what you keep.

    `hidden` float32 [tokens, hidden]: the state that enters the first unit. `damage` float32 [units, tokens], nats: the
    output of the bundle's network, zeros where it has none. `positions`, `tokens` int64 [tokens].
    """

    hidden: npt.NDArray[np.float32]
    damage: Damages
    positions: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    def of(self, tokens: slice) -> State:
        """Return the state of some of the tokens."""
        return State(self.hidden[tokens], self.damage[:, tokens], self.positions[tokens], self.tokens[tokens])


class Rule(Protocol):
    """Rule that decides which units are skipped. `asks`: whether it uses damage; if not, a device runs no policy."""

    @property
    def asks(self) -> bool: ...

    def skips(self, damage: Damages) -> Skips:
        """Return the skips [units, tokens] for damage [units, tokens]."""
        ...


@dataclass(frozen=True)
class DecisionRule:
    """Rule that skips a unit where damage is below the unit's limit (trade_off * cost, nats); damage is never negative,
    so a limit of 0 never skips, and one of infinity always does. Units after the last limit are never skipped. `sizes`:
    layers of each unit; `fewest`: layers that every token skips at least; `asks` as in `Rule`.
    """

    limits: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()
    fewest: int = 0
    asks: bool = True

    def scaled(self, factor: float) -> DecisionRule:
        """Return the rule with `factor` times this rule's trade-off."""
        return replace(self, limits=tuple(factor * limit for limit in self.limits))

    def limits_of(self, units: int) -> tuple[float, ...]:
        """Return the limit of each of so many units."""
        return (*self.limits, *(0.0,) * (units - len(self.limits)))

    def skips(self, damage: Damages) -> Skips:
        """Return skipped [units, tokens] for damage [units, tokens]. Where `fewest` asks a token to skip more than the
        limits do, it also skips the units that do least damage per layer.
        """
        exact = damage.astype(np.float64)
        below: Skips = exact < np.array(self.limits_of(len(damage)))[:, None]
        if not self.fewest:
            return below
        sizes = np.array(self.sizes)[:, None]
        ranked = np.argsort(np.where(below, -1.0, exact / sizes), axis=0, kind="stable")
        before = np.cumsum(sizes[ranked, 0], axis=0) - sizes[ranked, 0]
        forced = np.zeros_like(below)
        np.put_along_axis(forced, ranked, before < self.fewest, axis=0)
        return below | forced

    def leaves(self, place: int, damage: Damages) -> npt.NDArray[np.bool_]:
        """Return which pictures leave at unit `place` of an encoder, for its damage [n]. All do where leaving at the
        next one would skip less than `fewest`.
        """
        found: npt.NDArray[np.bool_] = damage.astype(np.float64) < self.limits_of(place + 1)[place]
        return found | (sum(self.sizes[place + 1 :]) < self.fewest)


def decision_rule(
    units: Sequence[Unit], cost: Sequence[float], trade_off: float, max_layers: int | None = None, num_layers: int = 0
) -> DecisionRule:
    """Build the rule for one model. `cost`: what skipping each unit saves, as a fraction of the dense time of one
    token; `trade_off` in nats per dense token time; `max_layers`: of `num_layers`, the most that a token runs. Raises
    PolicyError.
    """
    if not 0 <= trade_off < float("inf"):
        raise PolicyError(f"The trade-off must be a finite number >= 0 (0 is dense), not {trade_off!r}.")
    if max_layers is not None:
        check_max_layers(max_layers, units, num_layers)
    fewest = 0 if max_layers is None else num_layers - max_layers
    return DecisionRule(tuple(trade_off * own for own in cost), tuple(len(unit.layers) for unit in units), fewest)


DENSE = DecisionRule(asks=False)


def static_rule(places: Iterable[int]) -> DecisionRule:
    """Return the rule that skips the units at these places for every token."""
    skipped = set(places)
    limits = tuple(inf if place in skipped else 0.0 for place in range(max(skipped, default=-1) + 1))
    return DecisionRule(limits, asks=False)


def check_max_layers(max_layers: int, units: Sequence[Unit], num_layers: int) -> None:
    """Raise PolicyError for more layers than the model has, or for fewer than always run."""
    always = num_layers - sum(len(unit.layers) for unit in units)
    if not always <= max_layers <= num_layers:
        why = f"{always} of the model's {num_layers} layers always run"
        raise PolicyError(f"max_layers = {max_layers}: {why}, so give a number from {always} to {num_layers}.")


class ForcedRule:
    """Rule with given actions, skipped [units, tokens]: for comparing with the oracle, so damage is computed too."""

    asks = True

    def __init__(self, skipped: Skips) -> None:
        self._skipped = skipped

    def skips(self, damage: Damages) -> Skips:  # noqa: ARG002
        return self._skipped

    def leaves(self, place: int, damage: Damages) -> npt.NDArray[np.bool_]:  # noqa: ARG002
        found: npt.NDArray[np.bool_] = self._skipped[place]
        return found


def skips_for(rule: Rule, state: State, tokens: slice = slice(None)) -> Skips:
    """Return the skips [units, tokens] of some tokens. A rule with `decide` sees the whole state, others damage."""
    decide = getattr(rule, "decide", None)
    return rule.skips(state.damage[:, tokens]) if decide is None else decide(state.of(tokens))
