"""Token settings that save as much on the very tokens they are judged on, whatever the calibration text skips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, log

from dash_export.decision import Setting, trade_off_for
from dash_export.evaluation.results import Result
from dash_export.manifest import Build

TOLERANCE = 0.02
"""Of what is to be saved."""
PASSES = 8
LARGEST_MOVE = 3.0
SMALL = 1e-6

Measure = Callable[[Sequence[Setting]], Sequence[Result]]


@dataclass
class _Search:
    """One setting on its way: `low` and `high` are the nearest (log of a trade-off, what it saved) on either side of
    `wanted`.
    """

    setting: Setting
    wanted: float
    best: Result
    low: tuple[float, float] | None = None
    high: tuple[float, float] | None = None
    last: bool | None = None
    stuck: bool = False

    def saved(self, result: Result, layers: float) -> float:
        """What a result saved: time, as a fraction of dense, or layers."""
        return 1 - result.time if self.setting.budget is not None else layers - result.layers

    def take(self, result: Result, layers: float) -> None:
        """Take in what another trade-off gave."""
        assert result.setting.trade_off is not None
        saved = self.saved(result, layers)
        point = log(result.setting.trade_off), saved
        side = saved < self.wanted
        self.stuck = side == self.last
        self.last = side
        if side:
            self.low = point
        else:
            self.high = point
        if abs(saved - self.wanted) < abs(self.saved(self.best, layers) - self.wanted):
            self.best = result

    def done(self, layers: float) -> bool:
        return abs(self.saved(self.best, layers) - self.wanted) <= TOLERANCE * self.wanted

    def found(self) -> Result:
        """The nearest, with what was asked for and the trade-off that gave it."""
        return replace(self.best, setting=replace(self.setting, trade_off=self.best.setting.trade_off))

    def following(self) -> Setting:
        """The setting to try next."""
        if self.low is not None and self.high is not None:
            (left, less), (right, more) = self.low, self.high
            # On the chord, or in the middle where the last two fell on one side: this bends, or goes in steps.
            share = 0.5 if self.stuck else (self.wanted - less) / (more - less)
            place = left + share * (right - left)
        else:
            known = self.low or self.high
            assert known is not None
            place, saved = known
            # As if what is saved grew with the trade-off; where that was not enough, a long way.
            ratio = LARGEST_MOVE if self.stuck else max(self.wanted / max(saved, SMALL), saved / self.wanted)
            place += log(min(ratio, LARGEST_MOVE)) * (1 if saved < self.wanted else -1)
        return replace(self.setting, budget=None, skipped=None, trade_off=exp(place))


def matched(build: Build, results: Sequence[Result], measure: Measure) -> list[Result]:
    """`results` (dense first), where every token setting with a budget, or a number of skipped layers, is at the
    trade-off that comes nearest to saving that much on these tokens (its setting names both): found by `measure`,
    which takes settings that begin with dense, in at most `PASSES` passes. What cannot be met here stays off by what
    its result says.
    """
    dense = results[0]
    searches = {}
    for index, result in enumerate(results):
        setting = result.setting
        given = setting.budget is not None or setting.skipped is not None
        if setting.kind == "token" and given and result.tokens:
            trade_off = trade_off_for(build.dial, budget=setting.budget, skipped=setting.skipped)
            wanted = 1 - setting.budget if setting.budget is not None else setting.skipped
            if trade_off > 0 and wanted:
                begun = replace(result, setting=replace(setting, budget=None, skipped=None, trade_off=trade_off))
                searches[index] = search = _Search(setting, wanted, begun)
                search.take(begun, dense.layers)
    for _ in range(PASSES - 1):
        missing = [search for search in searches.values() if not search.done(dense.layers)]
        if not missing:
            break
        found = measure([dense.setting, *(search.following() for search in missing)])
        for search, result in zip(missing, found[1:], strict=True):
            search.take(result, dense.layers)
    return [searches[index].found() if index in searches else result for index, result in enumerate(results)]
