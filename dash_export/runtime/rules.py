"""Where the actions of a token come from: a rule, which a session may change from token to token (`SessionRules`)."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, log
from typing import Protocol

import numpy as np

from dash_export.decision import Damages, DecisionRule, Skips
from dash_export.manifest import CostTable


class Rule(Protocol):
    """`asks`: whether damage means anything to it; on a device a policy that nobody asks is not run."""

    @property
    def asks(self) -> bool: ...

    def skips(self, damage: Damages) -> Skips:
        """damage [units, tokens] -> which of them are skipped."""
        ...


class FixedRule:
    """Actions known beforehand: `dense` (no unit), `static` (these places of units)."""

    asks = False

    def __init__(self, skipped: Iterable[int] = ()) -> None:
        self.skipped = frozenset(skipped)

    def skips(self, damage: Damages) -> Skips:
        skipped = np.zeros(damage.shape, np.bool_)
        skipped[list(self.skipped)] = True
        return skipped


class ForcedRule:
    """Actions given, skipped [units, tokens]: for comparing with the oracle, damage and all."""

    asks = True

    def __init__(self, skipped: Skips) -> None:
        self._skipped = skipped

    def skips(self, damage: Damages) -> Skips:  # noqa: ARG002
        return self._skipped


DENSE = FixedRule()


class SessionRules:
    """The rule of every token of one session; here it is always the same one.

    The session tells what happens. Whatever it remembers is one session's, so every session needs an object of its own.
    """

    foreseeable = True
    """Whether a teacher-forced pass can know the rule of a token before the tokens ahead of it are decided."""

    def __init__(self, rule: Rule = DENSE) -> None:
        self.rule = rule

    def decoded(self, skipped: Skips) -> None:
        """A token was decoded with these skips [units, 1]."""

    def rewind(self, length: int) -> None:
        """Tokens from position `length` on are forgotten."""


HOLD_GAIN = 0.5
"""How much the logarithm of the trade-off moves per dense token time that was spent too much or too little: settles
within some tens of tokens, and moves a few per cent per token."""
HOLD_RANGE = 16.0
"""The trade-off stays within this factor of the calibrated one, whatever the text."""


class HeldRules(SessionRules):
    """A token policy whose running mean time is held at the budget: integral feedback on the trade-off's logarithm.

    Time is that of the cost table, as a fraction of dense, so that the same text gets the same actions in a new
    conversation; what an answer took that was rewound stays counted. The integral of (time - budget) is bounded by
    HOLD_RANGE: what cannot be reached is not piled up.
    """

    foreseeable = False

    def __init__(self, rule: DecisionRule, cost: CostTable, budget: float) -> None:
        super().__init__(rule)
        self._calibrated = rule
        self._cost = cost
        self._budget = budget
        self._log_scale = 0.0

    def decoded(self, skipped: Skips) -> None:
        time = float(self._cost.token_time(skipped)[0])
        bound = log(HOLD_RANGE)
        self._log_scale = min(bound, max(-bound, self._log_scale + HOLD_GAIN * (time - self._budget)))
        self.rule = self._calibrated.scaled(exp(self._log_scale))

    def rewind(self, length: int) -> None:
        if length == 0:
            self._log_scale = 0.0
            self.rule = self._calibrated
