"""Kinds of policies, and how a session's setting becomes the rule of its tokens.

A kind is one class and one line in KINDS: which amounts it takes, which bundles it serves, and the rule that it makes
of a setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Literal, Protocol

import numpy as np

from dash_export.core.advice import policy_command
from dash_export.core.dial import CostTable, DialPoint, out_of_reach, trade_off_at_most, trade_off_for
from dash_export.core.facts import ModelFacts
from dash_export.core.own_policy import OwnRule, load_policy
from dash_export.core.policy import PolicyFacts
from dash_export.core.rule import DENSE, DecisionRule, Rule, check_max_layers, decision_rule, static_rule
from dash_export.core.units import Skips, units_of
from dash_export.errors import PolicyError
from dash_export.files.typed_json import check_fields

SURE = 1e-6
"""Least share of `at_most`, and least doubt of `confidence`: below that no calibration has enough to judge."""
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


@dataclass(frozen=True)
class Served:
    """Subject of a setting: a model, the facts of its policy, and the costs and the dial of a build."""

    model: ModelFacts
    policy: PolicyFacts
    cost: CostTable
    dial: Sequence[DialPoint]


class Kind(Protocol):
    """Kind of policy. `takes`: the fields of `Setting` that may say how much it skips; one of them must, if any."""

    takes: tuple[str, ...]

    def serves(self, policy: PolicyFacts) -> bool:
        """Return whether a bundle with this policy has what the kind needs."""
        ...

    def rules(self, setting: Setting, served: Served) -> SessionRules:
        """Return the rules of a new session. Raises PolicyError for more than the policy can give."""
        ...


class Dense:
    """Every layer, always: the kill switch."""

    takes: tuple[str, ...] = ()

    def serves(self, policy: PolicyFacts) -> bool:  # noqa: ARG002
        return True

    def rules(self, setting: Setting, served: Served) -> SessionRules:  # noqa: ARG002
        return SessionRules()


class Static:
    """The same units for every token: listed ones, or as many of the policy's order as reach the amount."""

    takes: tuple[str, ...] = ("skip", "budget", "skipped", "max_layers")

    def serves(self, policy: PolicyFacts) -> bool:
        """Return true even without an order: a list of layers needs none."""
        return bool(policy.units)

    def rules(self, setting: Setting, served: Served) -> SessionRules:
        return SessionRules(static_rule(self._places(setting, served)))

    def _places(self, setting: Setting, served: Served) -> tuple[int, ...]:
        policy, layers = served.policy, served.model.num_layers
        if setting.skip is not None:
            found = units_of(setting.skip, policy.units)
            if served.model.decides == "input" and found and found[0] != len(policy.units) - len(found):
                raise PolicyError(
                    f"What leaves skips all layers behind: give {policy.units[found[0]].first}-{layers - 1}."
                )
            return found
        wanted = setting.skipped or 0.0
        if setting.max_layers is not None:
            check_max_layers(setting.max_layers, policy.units, layers)
            wanted = layers - setting.max_layers
        order = policy.static_order
        for count in range(len(order) + 1):
            skipped = sum(len(policy.units[place].layers) for place in order[:count])
            time = float(served.cost.token_time(np.isin(range(len(policy.units)), order[:count])[:, None])[0])
            if skipped >= wanted if setting.budget is None else time <= setting.budget + 1e-9:
                return order[:count]
        if setting.budget is not None:
            raise out_of_reach(1 - time, budget=setting.budget)
        raise out_of_reach(skipped, skipped=wanted)


class Token:
    """DASH: for every token the units whose predicted damage is below the trade-off times what they save."""

    takes: tuple[str, ...] = ("trade_off", "budget", "skipped", "max_kl", "at_most", "max_layers")

    def serves(self, policy: PolicyFacts) -> bool:
        return policy.has_network

    def rules(self, setting: Setting, served: Served) -> SessionRules:
        trade_off, units = setting.trade_off, served.policy.units
        if setting.at_most is not None:
            trade_off = trade_off_at_most(served.dial, setting.at_most, setting.confidence)
        elif trade_off is None and setting.given != ("max_layers",):
            wanted = {name: getattr(setting, name) for name in ("budget", "skipped", "max_kl")}
            trade_off = trade_off_for(served.dial, **wanted)
        rule = decision_rule(units, served.cost.cost, trade_off or 0.0, setting.max_layers, served.model.num_layers)
        return SessionRules(rule, served.cost, setting.budget if setting.hold else None)


class Own:
    """A class of the user's, given as `module:Class`."""

    takes: tuple[str, ...] = ()

    def serves(self, policy: PolicyFacts) -> bool:
        return bool(policy.units)

    def rules(self, setting: Setting, served: Served) -> SessionRules:
        found = load_policy(setting.policy or "")
        return SessionRules(OwnRule(found, served.model, served.policy.units, served.cost))


KINDS: dict[str, Kind] = {"dense": Dense(), "static": Static(), "token": Token()}
OWN = "own"
"""Kind of a policy that is a class of the user's, given as `module:Class`."""
AMOUNTS = ("skip", *Token.takes)


@dataclass(frozen=True)
class Setting:
    """A session's policy and how much it skips: exactly one of these amounts (`dense` takes none).

    `skip`: these layers, whole units (static); `trade_off`: divergence (nats) per dense time; `budget`: mean time as a
    fraction of dense; `skipped`: mean layers skipped per token; `max_kl`: mean divergence from dense on the calibration
    data, nats per token; `at_most`: with this `confidence`, the share of answers that differ from dense (another next
    token, another class) on data like the calibration's; `max_layers`: a bound for every token (for `token` beside
    another amount too). A static policy skips units in its order until they reach the amount. `hold` steers a `token`
    session so that its running mean time stays at the budget, whatever the text; without it the budget is a mean over
    the calibration text. `draft`: what guesses tokens, which a dense session then checks several at a time: the text's
    own repetitions (`lookup`), a trained drafter (`layer`), what there is of both (`auto`), or nothing (`off`); the
    text stays the same. A session that skips decodes every token by itself. Raises PolicyError for wrong types;
    `check` checks the amounts.
    """

    policy: str | None = None
    skip: tuple[int, ...] | None = None
    trade_off: float | None = None
    budget: float | None = None
    skipped: float | None = None
    max_kl: float | None = None
    at_most: float | None = None
    confidence: float = 0.95
    max_layers: int | None = None
    hold: bool = True
    draft: Literal["auto", "off", "lookup", "layer"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, PolicyError)

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the amounts that are set."""
        return tuple(name for name in AMOUNTS if getattr(self, name) is not None)

    @property
    def kind(self) -> str:
        """Policy kind. Without `policy` the amounts decide: `skip` means static, another amount token, none dense."""
        if self.policy is not None:
            return OWN if ":" in self.policy else self.policy
        return "static" if self.skip is not None else "token" if self.given else "dense"

    def check(self) -> None:
        """Raise PolicyError for an unknown kind and for amounts that do not go together or are out of range."""
        if self.kind != "dense" and self.draft not in ("auto", "off"):
            raise PolicyError(
                f"draft={self.draft!r} is of a dense session: one that skips (policy {self.kind!r:.60}) decodes every "
                "token by itself. Leave draft out, or the policy and its amounts."
            )
        if self.kind == OWN and self.given:
            raise PolicyError(f"A policy of your own decides by itself: {self.given[0]} means nothing to it.")
        if self.kind not in (*KINDS, OWN):
            known = f"{', '.join(KINDS)}, and module:Class or file.py:Class for one of your own"
            raise PolicyError(f"There is no policy kind {self.kind!r:.60}. Known: {known}.")
        takes = KINDS[self.kind].takes if self.kind in KINDS else ()
        if wrong := [name for name in self.given if name not in takes]:
            owners = ", ".join(name for name, kind in KINDS.items() if wrong[0] in kind.takes)
            raise PolicyError(f"{wrong[0]} belongs to the policies {owners}, not to {self.kind!r}.")
        amounts = [name for name in self.given if name != "max_layers" or self.kind != "token"]
        if len(amounts) > 1:
            raise PolicyError(f"Give {amounts[0]} or {amounts[1]}, not both: each says how much is skipped.")
        if takes and not self.given:
            raise PolicyError(f"Say how much the policy {self.kind!r} skips: give one of {', '.join(takes)}.")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise PolicyError(f"The budget is a decode time as a fraction of dense, in (0, 1], not {self.budget!r}.")
        for name in ("at_most", "confidence"):
            if (value := getattr(self, name)) is not None and not SURE <= value <= 1 - SURE:
                raise PolicyError(f"{name} is a share from {SURE:g} to {1 - SURE:g}, not {value!r}.")
        for name in ("skipped", "max_kl"):
            if (getattr(self, name) or 0) < 0:
                raise PolicyError(f"{name} must be a finite number >= 0 (0 is dense), not {getattr(self, name)!r}.")


def kinds_of(policy: PolicyFacts) -> tuple[str, ...]:
    """Return the policy kinds that a bundle can serve; `static` without an order takes a list of layers only."""
    return tuple(name for name, kind in KINDS.items() if kind.serves(policy))


def session_rules(setting: Setting, served: Served) -> SessionRules:
    """Return the rules of a new session. Raises PolicyError for a setting that is unsound or asks for too much."""
    model, policy = served.model, served.policy
    if setting.kind == "token" and not policy.has_network:
        raise PolicyError(f"The policy 'token' needs a bundle with a policy network. {policy_command(model)}")
    if setting.kind == "static" and not policy.static_order and setting.skip is None:
        raise PolicyError(
            "The policy in this bundle has no order in which 'static' skips units: it was not trained. List the layers "
            f"to skip (skip), or use a trained policy. {policy_command(model)}"
        )
    setting.check()
    return (Own() if setting.kind == OWN else KINDS[setting.kind]).rules(setting, served)
