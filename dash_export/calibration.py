"""The windows of a text that a build is calibrated on."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dash_export.errors import RequestError
from dash_export.runtime import DashRuntime

TokenIds = npt.NDArray[np.int64]


def text_windows(runtime: DashRuntime, text: str, tokens: int, window: int) -> list[TokenIds]:
    """About `tokens` tokens of `text` as windows, spread evenly over it. Raises RequestError for too short a text."""
    ids = runtime.text.encode_in_pieces(text)
    window = min(window, runtime.engines.model.max_positions)
    if len(ids) < window:
        raise RequestError(
            f"The calibration text has {len(ids)} tokens; at least {window} are needed. Give a longer text."
        )
    count = max(1, min(tokens // window, len(ids) // window))
    starts = np.linspace(0, len(ids) - window, count).astype(int)
    return [ids[start : start + window] for start in starts]
