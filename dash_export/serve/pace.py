"""How much is skipped so that a token takes no longer than was promised: quality bends before latency breaks.

A step takes d * f, where f is its time of dense by the build's cost table, and what is prefilled before it r. Both are
running means of what was measured, over about five steps, so they follow the number of rows and the prompts that come.
The fraction granted is (seconds - r) / d, between the least that is allowed and 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from dash_export.errors import RequestError
from dash_export.manifest import CostTable
from dash_export.runtime.rules import FixedRule, SessionRules

WEIGHT = 0.2


class Pace:
    """For one thread. `seconds` a token may take; `least`: the lowest budget that is granted."""

    def __init__(self, seconds: float, least: float, order: Sequence[int], cost: CostTable) -> None:
        """`order`: places of units as a static policy skips them. Raises RequestError."""
        if not 0 < seconds < 1e3 or not 0 < least <= 1:
            raise RequestError(f"A pace has seconds above 0 and a least budget in (0, 1], not {seconds} and {least}.")
        self._seconds, self._least, self.granted = seconds, least, 1.0
        self._dense = self._rest = 0.0
        times = [1.0 - sum(cost.cost[place] for place in order[:count]) for count in range(len(order) + 1)]
        self._sets = [
            (time, SessionRules(FixedRule(order[:count]))) for count, time in enumerate(times) if time >= least - 1e-9
        ]

    def measured(self, fraction: float, step: float, rest: float) -> None:
        """Seconds of a step that ran `fraction` of dense, and of the prompts before it."""
        dense = step / max(fraction, 1e-3)
        weight = WEIGHT if self._dense else 1.0
        self._dense += weight * (dense - self._dense)
        self._rest += weight * (rest - self._rest)
        self.granted = min(1.0, max(self._least, (self._seconds - self._rest) / max(self._dense, 1e-9)))

    def together(self) -> SessionRules:
        """One set for all rows, the smallest that is fast enough: what each skips for itself, another row runs."""
        return next((rules for time, rules in self._sets if time <= self.granted + 1e-9), self._sets[-1][1])
