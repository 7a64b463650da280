"""Costs of passes over several rows, as a build measures them (numpy only)."""

from dataclasses import dataclass

import numpy as np

from dash_export.files.typed_json import NotNegative

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
_ALL = np.arange(ROWS[-1] + 1)


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

    def of_rows(self, context: int) -> list[float]:
        """Return the times of passes of 0 (without meaning) to 16 rows after `context` cached tokens, interpolated;
        beyond what was measured it is that of the nearest.
        """
        near, *far = (np.interp(_ALL, self.rows, times) for times in self.times)
        if far:
            share = (context - self.contexts[0]) / (self.contexts[1] - self.contexts[0])
            near = near + min(1.0, max(0.0, share)) * (far[0] - near)
        return [float(time) for time in near]

    @property
    def sound(self) -> bool:
        """Whether there is a time for each of the rows and contexts, in their rising order."""
        rising = len(self.contexts) <= 2 and all(
            axis and sorted(set(axis)) == list(axis) for axis in (self.rows, self.contexts)
        )
        whole = len(self.times) == len(self.contexts) and all(len(times) == len(self.rows) for times in self.times)
        return rising and whole and min(map(min, self.times)) > 0
