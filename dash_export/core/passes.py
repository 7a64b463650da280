"""Cost of rows: the time of a pass of several rows, measured at build (numpy only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from dash_export.files.typed_json import NotNegative, Within

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
CONTEXTS = (256, 4096)
_ALL = np.arange(ROWS[-1] + 1)


@dataclass(frozen=True)
class PassCosts:
    """`times` [contexts][rows]: the time of a pass of so many rows, with the logits of all, over that of one decoded
    token at the same number of cached tokens. `draft`: the time of one run of the trained drafter, over that of a token
    at the first context.
    """

    rows: tuple[Annotated[int, Within(1, 64)], ...]
    contexts: tuple[Annotated[int, Within(0, 1 << 20)], ...]
    times: tuple[tuple[NotNegative, ...], ...]
    draft: NotNegative = 0.0

    def of_rows(self, context: int) -> list[float]:
        """Return the times of passes of 0 (without meaning) to 16 rows at so many cached tokens, interpolated."""
        near, *far = (np.interp(_ALL, self.rows, times) for times in self.times)
        if far and self.contexts[1] > self.contexts[0]:
            share = (context - self.contexts[0]) / (self.contexts[1] - self.contexts[0])
            near = near + min(1.0, max(0.0, share)) * (far[0] - near)
        return [float(time) for time in near]
