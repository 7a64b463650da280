"""Control of how much is skipped so that a token takes no longer than promised: quality gives way before latency.

A decode step takes d * f seconds: d is the time of a dense step, f is the fraction of d by the build's cost table for
what the step ran. The prefill before a step takes r seconds. d and r are running means of measured times, over about
five steps, so they follow the number of rows and the prompts that come. The fraction granted is (seconds - r) / d, but
at least `least` and at most 1.
"""

from collections.abc import Sequence

from dash_export.core.dial import CostTable
from dash_export.core.kinds import SessionRules, Setting
from dash_export.core.rule import static_rule
from dash_export.errors import RequestError
from dash_export.runtime import DashRuntime

WEIGHT = 0.2


def paced(runtime: DashRuntime, least: float) -> Setting:
    """Return the setting of requests that have none, under a pace: its budget gives way to what the pace grants."""
    reached = [point.time for point in runtime.build.dial]
    return Setting("token", budget=max(least, min(reached))) if len(reached) > 1 else runtime.recommended


class Pace:
    """Controller of the budget. A token may take `seconds`; `least` is the lowest budget granted. For one thread."""

    def __init__(self, seconds: float, least: float, order: Sequence[int], cost: CostTable) -> None:
        """Make the sets of units to skip; `order`: places in the order of a static policy. Raises RequestError."""
        if not 0 < seconds < 1e3 or not 0 < least <= 1:
            raise RequestError(f"A pace has seconds above 0 and a least budget in (0, 1], not {seconds} and {least}.")
        self.seconds, self._least, self.granted = seconds, least, 1.0
        self._dense = self._rest = 0.0
        times = [1.0 - sum(cost.cost[place] for place in order[:count]) for count in range(len(order) + 1)]
        self._sets = [
            (time, SessionRules(static_rule(order[:count]))) for count, time in enumerate(times) if time >= least - 1e-9
        ]

    def measured(self, fraction: float, step: float, rest: float) -> None:
        """Take the times of a step: `step` seconds at `fraction` of dense, `rest` seconds of prefill before it."""
        dense = step / max(fraction, 1e-3)
        weight = WEIGHT if self._dense else 1.0
        self._dense += weight * (dense - self._dense)
        self._rest += weight * (rest - self._rest)
        self.granted = min(1.0, max(self._least, (self.seconds - self._rest) / max(self._dense, 1e-9)))

    def together(self) -> SessionRules:
        """Return the smallest set of units to skip that is fast enough. All rows share it: skipping a unit in some rows
        saves nothing while another row runs it.
        """
        return next((rules for time, rules in self._sets if time <= self.granted + 1e-9), self._sets[-1][1])
