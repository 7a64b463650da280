"""A policy of your own: `dash-export eval my.dash --kinds token,examples/own_policy.py:EveryOther`.

Every other token skips the half of the units that does least damage per time saved; the others run every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dash_export import State


class EveryOther:
    """One object decides for one session: what it keeps between tokens is its own."""

    def begin(self, _model: Any, _units: Sequence[Any], cost: Any) -> None:
        self.cost = np.array(cost.cost)[:, None]

    def skips(self, state: State) -> Any:
        per_time = state.damage / np.maximum(self.cost, 1e-9)
        rank = per_time.argsort(axis=0).argsort(axis=0)
        return np.logical_and(rank < len(rank) / 2, state.positions % 2 == 1)
