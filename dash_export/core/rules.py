"""Rules, which decide the actions of a token, and how a session's setting becomes its rule."""

from collections.abc import Iterable, Sequence
from math import exp, floor, log
from typing import Protocol

import numpy as np

from dash_export.bundle.advice import policy_command
from dash_export.bundle.records import Build, CostTable, ModelFacts, PolicyFacts
from dash_export.core.decision import (
    OWN,
    Damages,
    DecisionRule,
    DialPoint,
    Setting,
    Skips,
    check_max_layers,
    decision_rule,
    units_of,
)
from dash_export.core.own_policy import OwnRule, State, load_policy
from dash_export.errors import PolicyError

_ROUNDING = 1e-9
"""Tolerance: a setting read off the dial must be reachable although 1 - time is rounded."""


class Rule(Protocol):
    """Rule that decides which units are skipped. `asks`: whether it uses damage; if not, a device need not run the
    policy.
    """

    @property
    def asks(self) -> bool: ...

    def skips(self, damage: Damages) -> Skips:
        """Return the skips [units, tokens] for damage [units, tokens]."""
        ...


class FixedRule:
    """Rule with actions known beforehand: `dense` skips no unit, `static` skips the units at these places."""

    asks = False

    def __init__(self, skipped: Iterable[int] = ()) -> None:
        self.skipped = frozenset(skipped)

    def skips(self, damage: Damages) -> Skips:
        skipped = np.zeros(damage.shape, np.bool_)
        skipped[list(self.skipped)] = True
        return skipped


class ForcedRule:
    """Rule with given actions, skipped [units, tokens]: for comparing with the oracle, so damage is computed too."""

    asks = True

    def __init__(self, skipped: Skips) -> None:
        self._skipped = skipped

    def skips(self, damage: Damages) -> Skips:  # noqa: ARG002
        return self._skipped


DENSE = FixedRule()


def skips_for(rule: Rule, state: State, tokens: slice = slice(None)) -> Skips:
    """Return the skips [units, tokens] of some tokens of a step. A rule with `decide` sees the whole state, others only
    damage.
    """
    decide = getattr(rule, "decide", None)
    return rule.skips(state.damage[:, tokens]) if decide is None else decide(state.of(tokens))


HOLD_GAIN = 0.5
"""Change of the trade-off's logarithm when a token takes one dense token time too much: a few per cent per token."""
HOLD_RANGE = 16.0
"""The trade-off stays within this factor of the calibrated one, whatever the text."""


class SessionRules:
    """Rule for the next token of one session: `rule`. With a `budget`, `rule` is a `DecisionRule` whose trade-off is
    adjusted to hold the running mean of time at the budget, by integral feedback on the trade-off's logarithm.

    Time is that of the cost table, as a fraction of dense, so the same text gets the same actions in a new
    conversation. The time of a rewound answer stays counted. Excess that no trade-off can remove is not accumulated:
    the logarithm is bounded.
    """

    def __init__(self, rule: Rule = DENSE, cost: CostTable | None = None, budget: float | None = None) -> None:
        self.calibrated, self._cost, self.budget = rule, cost, budget
        self.restart()

    def restart(self) -> None:
        """Begin a new conversation."""
        self.rule: Rule = self.calibrated
        self._log_scale = 0.0
        if isinstance(self.rule, OwnRule):
            self.rule.restart()

    def decoded(self, skipped: Skips) -> None:
        """Adjust the rule after a token that was decoded with these skips [units, 1]."""
        if self.budget is None or self._cost is None or not isinstance(self.calibrated, DecisionRule):
            return
        excess = float(self._cost.token_time(skipped, asked=True)[0]) - self.budget
        bound = log(HOLD_RANGE)
        self._log_scale = min(bound, max(-bound, self._log_scale + HOLD_GAIN * excess))
        self.rule = self.calibrated.scaled(exp(self._log_scale))


def session_rules(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> SessionRules:
    """Return the rules of a new session. Raises PolicyError for a setting that is unsound or asks for more than the
    policy can give.
    """
    if setting.kind == "token" and not policy.has_network:
        raise PolicyError(f"The policy 'token' needs a bundle with a policy network. {policy_command(model)}")
    if setting.kind == "static" and not policy.static_order and setting.skip is None:
        raise PolicyError(
            "The policy in this bundle has no order in which 'static' skips units: it was not trained. List the layers "
            f"to skip (skip), or use a trained policy. {policy_command(model)}"
        )
    setting.check()
    if setting.kind == OWN:
        return SessionRules(OwnRule(load_policy(setting.policy or ""), model, policy.units, build.cost))
    if setting.kind == "dense":
        return SessionRules()
    if setting.kind == "static":
        return SessionRules(FixedRule(_static_places(setting, model, policy, build)))
    trade_off = setting.trade_off
    if trade_off is None and setting.given != ("max_layers",):
        trade_off = trade_off_for(build.dial, budget=setting.budget, skipped=setting.skipped, max_kl=setting.max_kl)
    rule = decision_rule(policy.units, build.cost.cost, trade_off or 0.0, setting.max_layers, model.num_layers)
    return SessionRules(rule, build.cost, setting.budget if setting.hold else None)


def _static_places(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> tuple[int, ...]:
    """Return places of units that a static policy skips: of the listed layers, or as many of its order as are asked."""
    if setting.skip is not None:
        return units_of(setting.skip, policy.units)
    wanted = setting.skipped or 0.0
    if setting.max_layers is not None:
        check_max_layers(setting.max_layers, policy.units, model.num_layers)
        wanted = model.num_layers - setting.max_layers
    order = policy.static_order
    for count in range(len(order) + 1):
        skipped = sum(len(policy.units[place].layers) for place in order[:count])
        time = 1.0 - sum(build.cost.cost[place] for place in order[:count])
        if skipped >= wanted if setting.budget is None else time <= setting.budget + 1e-9:
            return order[:count]
    if setting.budget is not None:
        raise out_of_reach(1 - time, budget=setting.budget)
    raise out_of_reach(skipped, skipped=wanted)


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
