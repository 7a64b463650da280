"""Costs of passes over several rows, as a build measures them (numpy only)."""

from dataclasses import dataclass

import numpy as np

from dash_export.files.typed_json import NotNegative


@dataclass(frozen=True)
class PassCosts:
    """Time of a pass of `rows` rows of one sequence, the logits of all included, over that of one decoded token at as
    many cached tokens: `times` [contexts][rows]. `draft`: the same of one run of the drafter and of the embedding that
    it reads; 0 without a drafter.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    times: tuple[tuple[NotNegative, ...], ...]
    draft: NotNegative = 0.0

    def time(self, rows: int, context: int) -> float:
        """Return the time of a pass of so many rows after `context` cached tokens, interpolated; beyond what was
        measured it is that of the nearest.
        """
        return float(np.interp(context, self.contexts, [np.interp(rows, self.rows, times) for times in self.times]))

    @property
    def sound(self) -> bool:
        """Whether there is a time for each of the rows and contexts, in their rising order."""
        rising = all(axis and sorted(set(axis)) == list(axis) for axis in (self.rows, self.contexts))
        whole = len(self.times) == len(self.contexts) and all(len(times) == len(self.rows) for times in self.times)
        return rising and whole and min(map(min, self.times)) > 0
