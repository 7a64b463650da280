"""The decision rule, shared by the runtime, the oracle and evaluation (numpy only; training has it as one comparison of
tensors, `policy.gated_model.below`, which is tested against the oracle).

A gated layer is skipped for a token where damage < trade_off * cost: the one-step greedy policy of the Markov decision
process (DASH, arXiv 2505.17420, with a differential reward: minus the divergence an action adds, minus
trade_off times the time it costs). Layers that are one launch as long as all of them run are decided together: what
skipping some of them saves must also pay for the launches that it adds. `max_layers` bounds the layers one token may
run. Nothing here is random.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from dash_export.arguments import check_fields
from dash_export.errors import PolicyError

Damages = npt.NDArray[np.floating[Any]]

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
    run. `breaking`: layers that are one launch while all of them run, and what their skips must save before it pays to
    break that (trade_off * the time of the launches). On a device there are none.
    """

    asks: ClassVar[bool] = True
    limits: tuple[float, ...]
    ceilings: tuple[int, ...]
    gated: tuple[bool, ...]
    breaking: tuple[tuple[tuple[int, ...], float], ...] = ()

    def settled(self, damage: Damages) -> Damages:
        """What `skips` and `decide` are to be asked with, of damage [layers, tokens] that is known for whole stretches:
        infinite for the layers of those that it does not pay to break.
        """
        if not self.breaking:
            return damage
        settled = damage.astype(np.float64)
        for layers, price in self.breaking:
            own = settled[list(layers)]
            limits = np.array([self.limits[layer] for layer in layers])[:, None]
            saved = np.maximum(limits - own, 0.0).sum(axis=0)
            settled[list(layers)] = np.where(saved > price, own, np.inf)
        return settled

    def scaled(self, factor: float) -> DecisionRule:
        """The rule of `factor` times this one's trade-off."""
        limits = tuple(factor * limit for limit in self.limits)
        breaking = tuple((layers, factor * price) for layers, price in self.breaking)
        return replace(self, limits=limits, breaking=breaking)

    def skips(self, layer: int, damage: float, executed: int) -> bool:
        """Whether this token skips `layer`, given the policy's damage (nats) and the layers it has run so far."""
        return damage < self.limits[layer] or executed >= self.ceilings[layer]

    def decide(self, layer: int, damage: Damages, executed: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """`skips` for many tokens at once: damage and executed [...] -> actions [...] (int8)."""
        # float64, as Python compares in `skips`: a limit rounded to float32 could decide a tie differently.
        skip = (damage.astype(np.float64) < self.limits[layer]) | (executed >= self.ceilings[layer])
        return np.where(skip, Action.SKIP, Action.RUN).astype(np.int8)


def decision_rule(
    num_layers: int,
    gated: Iterable[int],
    cost: Mapping[int, float],
    trade_off: float,
    max_layers: int | None = None,
    breaking: Mapping[tuple[int, ...], float] | None = None,
) -> DecisionRule:
    """Build the rule for one model.

    `cost[l]` is a fraction of the dense time of one token, per gated layer; `trade_off` is in nats per dense token
    time. `breaking`: layers that are one launch while all of them run, and the time of the launches that they take more
    otherwise, as such a fraction; a ceiling breaks them anyway, so beside `max_layers` it counts for nothing. Raises
    PolicyError when the trade-off is negative or not finite, or when `max_layers` is below what always runs.
    """
    gated_set = set(gated)
    if not 0 <= trade_off < float("inf"):
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
    prices = breaking if breaking and max_layers == num_layers else {}
    return DecisionRule(
        tuple(limits),
        tuple(ceilings),
        tuple(layer in gated_set for layer in range(num_layers)),
        tuple((layers, trade_off * price) for layers, price in prices.items() if trade_off * price > 0),
    )


def decision_points(gated: Sequence[int], reads: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Where decisions are made: the layer whose input is read -> the gated layers that are decided there, in order.

    `reads` has such a layer per gated layer; empty is one layer ahead, layer l - 1 for layer l.
    """
    points: dict[int, tuple[int, ...]] = {}
    for layer, read in zip(gated, reads or [layer - 1 for layer in gated], strict=True):
        points[read] = (*points.get(read, ()), layer)
    return points


def read_layers(gated: Sequence[int], reads: Sequence[int]) -> dict[int, int]:
    """Per gated layer the layer whose input its decision reads."""
    return {layer: read for read, layers in decision_points(gated, reads).items() for layer in layers}


def check_reads(gated: Sequence[int], reads: Sequence[int]) -> None:
    """Raises PolicyError where decisions cannot be made so: too late, or not one group of layers after the other."""
    if reads and len(reads) != len(gated):
        raise PolicyError(f"There are {len(reads)} layers to read for {len(gated)} gated layers.")
    before: tuple[int, int] | None = None
    for layer, read in zip(gated, reads, strict=False):
        if not 0 <= read < layer:
            raise PolicyError(f"The decision about layer {layer} cannot read the input of layer {read}.")
        if before is not None and read != before[1] and read < before[0]:
            raise PolicyError(
                f"The decision about layer {layer} cannot read the input of layer {read}: layer {before[0]} lies "
                f"behind it, and is decided by another state."
            )
        before = layer, read


POLICY_KINDS = ("dense", "static", "cosine", "random", "sequence", "token")
DIALLED_KINDS = ("sequence", "token")
"""The kinds whose amount of skipping follows from a trade-off, so that a build calibrates a dial for each."""
_DIALLED = ("trade_off", "budget", "skipped", "max_kl", "max_layers")
_TAKES = {
    "dense": (),
    "static": ("skip", "budget", "skipped", "max_layers"),
    "cosine": ("budget", "skipped", "max_layers"),
    "random": ("budget", "skipped"),
    "sequence": _DIALLED,
    "token": _DIALLED,
}


@dataclass(frozen=True)
class Setting:
    """What a session's policy is and how much it skips: exactly one of these amounts (`dense` takes none).

    `skip` lists the layers (static); `trade_off` is in nats per dense token time; `budget` the mean decode time as a
    fraction of dense; `skipped` the mean number of layers skipped per token; `max_kl` the mean divergence from dense,
    nats per token, on the calibration text; `max_layers` bounds the layers of every token (for `token` and `sequence`
    beside another amount too).
    `seed` is for `random`. `hold` keeps the running mean of a `token` session at its budget, whatever the text.
    Raises PolicyError for what is no number, no list of layers, ...; `check` looks at amounts.
    """

    policy: str | None = None
    skip: tuple[int, ...] | None = None
    trade_off: float | None = None
    budget: float | None = None
    skipped: float | None = None
    max_kl: float | None = None
    max_layers: int | None = None
    seed: int = 0
    hold: bool = False

    def __post_init__(self) -> None:
        check_fields(self, PolicyError)

    @property
    def given(self) -> tuple[str, ...]:
        """The amounts that were given."""
        return tuple(name for name in ("skip", *_DIALLED) if getattr(self, name) is not None)

    @property
    def kind(self) -> str:
        """The policy kind; without one, what is given decides, and nothing given is dense."""
        return self.policy or ("static" if self.skip is not None else "token" if self.given else "dense")

    @property
    def asks_network(self) -> bool:
        """Whether engines must be loaded that evaluate the policy."""
        return self.kind in DIALLED_KINDS

    def check(self) -> None:
        """Raises PolicyError for an unknown kind and for amounts that do not go together."""
        if self.kind not in POLICY_KINDS:
            raise PolicyError(f"There is no policy kind {self.kind!r:.60}. Known: {', '.join(POLICY_KINDS)}.")
        takes = _TAKES[self.kind]
        wrong = [name for name in self.given if name not in takes]
        if wrong:
            owners = ", ".join(kind for kind in POLICY_KINDS if wrong[0] in _TAKES[kind])
            raise PolicyError(f"{wrong[0]} belongs to the policies {owners}, not to {self.kind!r}.")
        amounts = [name for name in self.given if name != "max_layers" or self.kind not in DIALLED_KINDS]
        if len(amounts) > 1:
            raise PolicyError(f"Give {amounts[0]} or {amounts[1]}, not both: each says how much is skipped.")
        if takes and not self.given:
            raise PolicyError(f"Say how much the policy {self.kind!r} skips: give one of {', '.join(takes)}.")
        if self.hold and not (self.kind == "token" and self.budget is not None):
            raise PolicyError("hold keeps a token policy at its budget: give the budget with it.")
        if not 0 <= self.seed < 1 << 63:
            raise PolicyError(f"The seed must be a number from 0 to 2^63 - 1, not {self.seed}.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PolicyError(
                f"The budget is the wanted decode time as a fraction of dense, in (0, 1], not {self.budget!r}."
            )
        for name in ("skipped", "max_kl"):
            if (getattr(self, name) or 0) < 0:
                raise PolicyError(f"{name} must be a finite number >= 0 (0 is dense), not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class DialPoint:
    """One calibrated setting: at this trade-off, per token of the calibration text, mean layers run, mean decode time
    as a fraction of dense, and mean KL from the dense mode of the same build (nats).
    """

    trade_off: float
    layers: float
    time: float
    kl: float


def trade_off_for(
    dial: Sequence[DialPoint],
    *,
    budget: float | None = None,
    skipped: float | None = None,
    max_kl: float | None = None,
) -> float:
    """The smallest trade-off, interpolated in the calibrated table (geometrically), that is as fast as `budget`, or
    skips `skipped` layers, or diverges by `max_kl`: exactly one of them.

    Raises PolicyError when it is out of range, when there is no table, or when it is more than the policy can give.
    """
    Setting("token", budget=budget, skipped=skipped, max_kl=max_kl).check()
    if not dial:
        raise PolicyError(
            "This build has no calibrated dial: its bundle has no policy network (export with a policy and build "
            "again), or it was not measured where it runs (run `dash-export build` on the device). Or give the "
            "trade-off itself."
        )
    points = sorted(dial, key=lambda point: point.trade_off)
    if budget is not None:
        amounts, wanted = [1 - point.time for point in points], 1 - budget
        given, limit = f"A budget of {budget:g}", f"take {min(point.time for point in points):.3f} of the dense time"
    elif skipped is not None:
        amounts, wanted = [points[0].layers - point.layers for point in points], skipped
        given, limit = f"Skipping {skipped:g} layers", f"skip {max(amounts):.2f} layers per token"
    else:
        assert max_kl is not None
        amounts, wanted = [point.kl for point in points], max_kl
        given, limit = f"A KL of {max_kl:g}", f"diverge by {max(amounts):.4f} nats per token"
    if wanted > max(amounts) + _ROUNDING:
        raise PolicyError(
            f"{given} is more than this policy can give: at most, with everything skipped that it may skip, it will "
            f"{limit} on the calibration text. Ask for less, or gate more layers."
        )
    after = next(index for index, amount in enumerate(amounts) if amount >= wanted - _ROUNDING)
    before = max(0, after - 1)
    rise = amounts[after] - amounts[before]
    share = min(1.0, (wanted - amounts[before]) / rise) if rise > 0 else 1.0
    low, high = points[before].trade_off, points[after].trade_off
    # Skipping follows the ratio of trade-offs, and the last one, where everything is skipped, lies far away.
    return low * (high / low) ** share if low > 0 else share * high


_ROUNDING = 1e-9
"""A setting read off the table must be reachable although 1 - time is rounded."""


def spans(layers: Iterable[int]) -> str:
    """(2, 3, 4, 9) -> "2-4,9", as `--gated` and `--skip` read it; "none" when there are none."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer - 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ",".join(f"{first}-{last}" if first != last else str(first) for first, last in found) or "none"
