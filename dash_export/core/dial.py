"""The dial: what skipping each unit saves, and which trade-off reaches a wanted amount (numpy only)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, lgamma, log, log1p
from typing import Annotated

import numpy as np
import numpy.typing as npt

from dash_export.core.passes import PassCosts
from dash_export.core.units import Skips
from dash_export.errors import PolicyError
from dash_export.files.typed_json import NotNegative, Within

WORTH = 0.05
"""Fraction of the dense time that a recommended setting saves at least."""
QUIET = 0.2
"""Processors that other work may take while costs are measured; above that the machine counts as busy."""
COSINE = 0.95
"""A picture whose pooled vector has a lower cosine with dense's has another answer."""
_ROUNDING = 1e-9
"""Tolerance: a setting read off the dial must be reachable although 1 - time is rounded."""


@dataclass(frozen=True)
class Mode:
    """Times of another dispatch mode than a cost table's. `asks`: as the table's. `saved`: what skipping saves there,
    as a fraction of what it saves by the table.
    """

    asks: NotNegative
    saved: Annotated[float, Within(1e-3, 1e3)]


@dataclass(frozen=True)
class CostTable:
    """Measured on `device`: medians in microseconds at `context` cached tokens.

    `others` and `stolen`: processors that other processes and the host took meanwhile. `cost`: for each unit what
    skipping it saves, as a fraction of `dense_us`, the dense time of one token; units with equally many layers share
    one value. `asks`: what evaluating the policy adds to a token on a GPU, as the same fraction (0 on a CPU, where the
    engine of the first layers outputs the damage in any case). `exits`, of an encoder: what the exit before each unit
    takes, as the same fraction; an input asks those up to the one where it leaves. `dispatch`: the dispatch mode of all
    these times; `modes`: the others that were measured. `passes`: costs of several rows, of a causal LM on a host.
    """

    context: Annotated[int, Within(0, 1 << 20)]
    dense_us: NotNegative
    segment_us: dict[str, float]
    bypass_us: dict[str, float]
    cost: tuple[Annotated[float, Within(0, 1)], ...]
    device: str
    others: NotNegative = 0.0
    stolen: NotNegative = 0.0
    asks: NotNegative = 0.0
    exits: tuple[NotNegative, ...] = ()
    dispatch: str = "sync"
    modes: dict[str, Mode] = field(default_factory=dict)
    passes: PassCosts | None = None

    def token_time(self, skipped: Skips, asked: bool = False) -> npt.NDArray[np.float64]:
        """Predict decode time [tokens], as a fraction of dense, of tokens with these skips [units, tokens]. `asked`:
        the policy was evaluated for them.
        """
        found: npt.NDArray[np.float64] = 1.0 + asked * self.asks - np.array(self.cost) @ skipped
        if self.exits:
            reached = np.ones_like(skipped, np.bool_)
            reached[1:] = ~skipped[:-1]
            found += np.array(self.exits) @ (reached if asked else reached & skipped)
        return found

    @property
    def dense_asked(self) -> float:
        """Time, as a fraction of dense, where the policy is asked and nothing is skipped."""
        return round(1.0 + self.asks + sum(self.exits), 5)

    @property
    def disturbed(self) -> str:
        """Warning about a table that was measured beside other load; empty for a quiet machine."""
        if self.others + self.stolen <= QUIET:
            return ""
        return (
            f"Costs were measured while {self.others:.1f} processors worked for others and {self.stolen:.1f} were "
            "withheld by the host: they and the dial may be wrong. Measure again when the machine is quiet (--measure)."
        )


@dataclass(frozen=True)
class DialPoint:
    """One calibrated setting. Per token of the calibration text, or per held-out picture, at this trade-off: mean
    layers run, mean time as a fraction of dense, mean divergence from the dense mode of the same build (`Measure`),
    and, of text, perplexity over that mode's. `differing` of the `judged` tokens or pictures have another answer than
    in that mode: another next token, another class, or without classes a cosine under COSINE.
    """

    trade_off: NotNegative
    layers: NotNegative
    time: NotNegative
    kl: NotNegative
    perplexity: NotNegative = 1.0
    differing: Annotated[int, Within(0)] = 0
    judged: Annotated[int, Within(0)] = 0


def in_mode(cost: CostTable, dial: tuple[DialPoint, ...], dispatch: str) -> tuple[CostTable, tuple[DialPoint, ...]]:
    """Return the cost table and dial of another dispatch mode: with the same decisions, and the times of that mode. As
    they are where it was not measured.
    """
    mode = cost.modes.get(dispatch)
    if mode is None:
        return cost, dial
    own = replace(cost, cost=tuple(mode.saved * each for each in cost.cost), asks=mode.asks, dispatch=dispatch)
    # A limit is the trade-off times the cost: the one is less by as much as the other is more.
    return own, tuple(
        replace(
            point,
            trade_off=point.trade_off / mode.saved,
            time=max(0.0, 1 + mode.asks - mode.saved * (1 + cost.asks - point.time)),
        )
        for point in dial
    )


@dataclass(frozen=True)
class Measure:
    """Meaning of divergence from dense where a decision is about one `item`. `lost`: what a recommended setting may
    lose up to `allowed` of, `loss` in words. `example` of an input, for a command; `pipeline`: the hub's name for such
    models.
    """

    item: str
    divergence: str
    lost: Callable[[DialPoint], float]
    allowed: float
    loss: str
    example: str
    pipeline: str

    def at(self, context: int) -> str:
        """Return what a measured time is of."""
        return f"{self.item} at {context} cached tokens" if context else self.item


def _of_inputs(item: str, example: str, pipeline: str) -> Measure:
    loss = f"0.01 of the cosine on held-out {item}s"
    return Measure(item, "1 - cosine", lambda point: point.kl, 0.01, loss, example, pipeline)


_LOST = "2% of perplexity on the calibration text"
_ASKED = '"Why is the sky blue?"'
MEASURES = {
    "prompt": Measure("token", "KL, nats", lambda at: at.perplexity - 1, 0.02, _LOST, _ASKED, "text-generation"),
    "pictures": _of_inputs("picture", "photo.jpg", "image-feature-extraction"),
    "texts": _of_inputs("text", '"a text"', "sentence-similarity"),
}
"""By what a model takes (`ModelFacts.takes`)."""


def recommended_budget(dial: Sequence[DialPoint], measure: Measure) -> float | None:
    """Return the budget that loses as much as `measure` allows on the calibration data, interpolated; None where that
    budget saves less than WORTH of the time.
    """
    points = sorted(dial, key=lambda point: -point.time)
    lost = [measure.lost(point) for point in points]
    after = next((index for index, own in enumerate(lost) if own > measure.allowed), len(points))
    if not after:
        return None
    budget = points[after - 1].time
    if after < len(points):
        share = (measure.allowed - lost[after - 1]) / (lost[after] - lost[after - 1])
        budget -= share * (points[after - 1].time - points[after].time)
    return ceil(round(1000 * budget, 6)) / 1000 if budget <= 1 - WORTH else None  # up: less may be off the dial


def trade_off_for(
    dial: Sequence[DialPoint], *, budget: float | None = None, skipped: float | None = None, max_kl: float | None = None
) -> float:
    """Return the smallest trade-off that is as fast as `budget`, or skips `skipped` layers, or diverges by `max_kl`
    (only one is given, checked by `Setting`), interpolated geometrically in the calibrated table. Raises PolicyError
    when there is no table, or when the amount is beyond what the policy reaches.
    """
    if not dial:
        raise PolicyError(
            "This build has no calibrated dial: export with a policy and build again, or, where that is done, run "
            "`dash-export build` on the device; or give the trade-off itself."
        )
    points = sorted(dial, key=lambda point: point.trade_off)
    if budget is not None:
        wanted, amounts = 1 - budget, [1 - point.time for point in points]
    elif skipped is not None:
        wanted, amounts = skipped, [points[0].layers - point.layers for point in points]
    else:
        assert max_kl is not None
        wanted, amounts = max_kl, [point.kl for point in points]
    after = next((index for index, amount in enumerate(amounts) if amount >= wanted - _ROUNDING), None)
    if after is None:
        raise out_of_reach(max(amounts), budget=budget, skipped=skipped, max_kl=max_kl)
    before = max(0, after - 1)
    rise = amounts[after] - amounts[before]
    share = min(1.0, (wanted - amounts[before]) / rise) if rise > 0 else 1.0
    high = points[after].trade_off
    low = points[before].trade_off or high / 2
    # Geometric, as skipping follows the ratio of trade-offs and the last one, where all is skipped, lies far away. From
    # dense on it begins at half the first one that skips: far below that nothing is skipped.
    return low * (high / low) ** share if high else 0.0


def trade_off_at_most(dial: Sequence[DialPoint], at_most: float, confidence: float) -> float:
    """Return the largest trade-off of the dial at which at most a share `at_most` of answers differs from dense, with
    this confidence, for data like the calibration's. Raises PolicyError where the dial cannot promise that.

    Learn then Test (arXiv 2110.01052) by fixed sequence: trade-offs are tested from dense on, each by the exact
    binomial test of "more than `at_most` differ", up to the first that the test does not reject. Tokens of one answer
    depend on each other: for text it is an estimate.
    """
    points = sorted(dial, key=lambda point: point.trade_off)[1:]
    judged = min((point.judged for point in points), default=0)
    if not judged:
        raise PolicyError("This build's dial promises nothing: it has no count of differing answers. Build again.")
    chosen = None
    for point in points:
        if binomial(point.differing, point.judged, at_most) > 1 - confidence:
            break
        chosen = point
    if chosen is None:
        needed = ceil(log(1 - confidence) / log(1 - at_most))
        why = f"{judged} were judged and {needed} are needed" if judged < needed else "more of those judged differ"
        raise PolicyError(f"No setting is sure to differ in at most {at_most:g} of answers at {confidence:g}: {why}.")
    return chosen.trade_off


def binomial(count: int, trials: int, share: float) -> float:
    """Return the probability of at most `count` of so many trials, each with probability `share`."""
    at = np.arange(min(count, trials) + 1)
    logs = [lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1) for k in at.tolist()]
    terms = np.array(logs) + at * log(share) + (trials - at) * log1p(-share)
    return float(min(1.0, np.exp(terms).sum()))


def out_of_reach(
    most: float, *, budget: float | None = None, skipped: float | None = None, max_kl: float | None = None
) -> PolicyError:
    """Return the error for the amount that is given, beyond what a policy reaches with all its units skipped: `most`,
    of the time saved or of the amount. The limit that it tells is rounded so that it may be asked for.
    """
    if budget is not None:
        asked, limit, end = f"A budget of {budget:g} is below", 1 - _floor(most, 3), "least"
    elif skipped is not None:
        asked, limit, end = f"Skipping {skipped:g} layers of a token is above", _floor(most, 2), "most"
    else:
        asked, limit, end = f"A KL of {max_kl:g} nats is above", _floor(most, 4), "most"
    return PolicyError(
        f"{asked} the {limit:g} that this policy reaches with all its units skipped: give at {end} that."
    )


def _floor(amount: float, digits: int) -> float:
    return floor(round(10.0**digits * amount, 6)) / 10.0**digits
