"""The decision rule, shared by the runtime, the oracle, training and evaluation (numpy only).

A gated layer is skipped for a token where damage < trade_off * cost: the one-step greedy policy of the Markov decision
process (DASH, arXiv 2505.17420, with a differential reward: minus the divergence an action adds, minus
trade_off times the time it costs). `max_layers` bounds the layers one token may run. Nothing here is random.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dash_export.errors import PolicyError

DENSE_POSITIONS = 2
"""Positions 0 and 1 always run every layer: they carry the attention sinks that every later token reads."""


class Action(IntEnum):
    """What is done with a layer for one token. Zero is `run`, so an array of zeros is a dense pass."""

    RUN = 0
    SKIP = 1


@dataclass(frozen=True)
class DecisionRule:
    """When to skip: per-layer damage limits (trade_off * cost) and per-layer ceilings on the layers already run.

    `limits[l]` is 0 for a layer that is not gated; damage is never negative, so nothing is below 0. `ceilings[l]` is
    how many layers may have run before layer l so that running it still leaves room for the layers after it that always
    run.
    """

    limits: tuple[float, ...]
    ceilings: tuple[int, ...]
    gated: tuple[bool, ...]

    def skips(self, layer: int, damage: float, executed: int) -> bool:
        """Whether this token skips `layer`, given the policy's damage (nats) and the layers it has run so far."""
        return damage < self.limits[layer] or executed >= self.ceilings[layer]

    def decide(
        self, layer: int, damage: npt.NDArray[np.float32], executed: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int8]:
        """`skips` for many tokens at once: damage and executed [...] -> actions [...] (int8)."""
        # float64, as Python compares in `skips`: a limit rounded to float32 could decide a tie differently.
        skip = (damage.astype(np.float64) < self.limits[layer]) | (executed >= self.ceilings[layer])
        return np.where(skip, Action.SKIP, Action.RUN).astype(np.int8)


def decision_rule(
    num_layers: int, gated: Iterable[int], cost: Mapping[int, float], trade_off: float, max_layers: int | None = None
) -> DecisionRule:
    """Build the rule for one model.

    `cost[l]` is a fraction of the dense time of one token, per gated layer; `trade_off` is in nats per dense token
    time. Raises PolicyError when the trade-off is negative or not finite, or when `max_layers` is below what always
    runs.
    """
    gated_set = set(gated)
    if not np.isfinite(trade_off) or trade_off < 0:
        raise PolicyError(f"The trade-off must be a finite number >= 0 (0 is dense), not {trade_off!r}.")
    always = num_layers - len(gated_set)
    if max_layers is None:
        max_layers = num_layers
    if not always <= max_layers <= num_layers:
        raise PolicyError(
            f"max_layers = {max_layers} is out of range: {always} of the model's {num_layers} layers always run, "
            f"so give a number from {always} to {num_layers}."
        )
    limits, ceilings = [], []
    for layer in range(num_layers):
        is_gated = layer in gated_set
        always_after = sum(1 for later in range(layer + 1, num_layers) if later not in gated_set)
        limits.append(trade_off * cost[layer] if is_gated else 0.0)
        ceilings.append(max_layers - always_after if is_gated else num_layers)
    return DecisionRule(tuple(limits), tuple(ceilings), tuple(layer in gated_set for layer in range(num_layers)))


@dataclass(frozen=True)
class DialPoint:
    """One calibrated setting: at this trade-off, mean layers run and mean decode time as a fraction of dense."""

    trade_off: float
    layers: float
    time: float


def trade_off_for_budget(dial: Sequence[DialPoint], budget: float) -> float:
    """The smallest calibrated trade-off (interpolated) whose mean decode time is at most `budget` (fraction of dense).

    Raises PolicyError when the budget is outside (0, 1], when there is no table, or when the policy cannot go that low.
    """
    if not 0 < budget <= 1:
        raise PolicyError(f"The budget is the wanted decode time as a fraction of dense, in (0, 1], not {budget!r}.")
    if not dial:
        raise PolicyError(
            "This build has no calibrated budget table (its bundle has no token policy). "
            "Export with a policy and build again, or give the trade-off itself."
        )
    points = sorted(dial, key=lambda point: point.trade_off)
    fastest = min(point.time for point in points)
    if budget < fastest:
        raise PolicyError(
            f"A budget of {budget:g} is more than this policy can give: its fastest calibrated setting takes "
            f"{fastest:.3f} of the dense time. Ask for {fastest:.3f} or more, or gate more layers."
        )
    previous = points[0]
    for point in points:
        if point.time <= budget:
            if point is previous or previous.time == point.time:
                return point.trade_off
            share = (previous.time - budget) / (previous.time - point.time)
            return previous.trade_off + share * (point.trade_off - previous.trade_off)
        previous = point
    return points[-1].trade_off


def spans(layers: Iterable[int]) -> str:
    """(2, 3, 4, 9) -> "2-4,9", as `--gated` and `--skip` read it; "none" when there are none."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer - 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in found) or "none"
