"""Where the actions of a token come from. Each rule answers one token (`skips`) and many at once (`decide`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action

Damage = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Actions = npt.NDArray[np.int8]


class Rule(Protocol):
    """`executed` is how many layers the token has run so far."""

    def skips(self, layer: int, damage: float, executed: int) -> bool: ...

    def decide(self, layer: int, damage: Damage, executed: Counts) -> Actions: ...


class FixedRule:
    """Actions known beforehand: `dense` (no layer), `static` (a set of layers)."""

    def __init__(self, skipped: Iterable[int] = ()) -> None:
        self._skipped = frozenset(skipped)

    def skips(self, layer: int, damage: float, executed: int) -> bool:  # noqa: ARG002
        return layer in self._skipped

    def decide(self, layer: int, damage: Damage, executed: Counts) -> Actions:  # noqa: ARG002
        return np.full(executed.shape, Action.SKIP if layer in self._skipped else Action.RUN, np.int8)


class ForcedRule:
    """Actions given per token and layer, int8 [tokens, layers]: for comparing with the oracle."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions

    def skips(self, layer: int, damage: float, executed: int) -> bool:  # noqa: ARG002
        return bool(self._actions[0, layer] == Action.SKIP)

    def decide(self, layer: int, damage: Damage, executed: Counts) -> Actions:  # noqa: ARG002
        return self._actions[:, layer]


DENSE = FixedRule()
