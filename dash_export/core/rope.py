"""Tables of the rotary position embedding, which every layer's graph takes as inputs. They are nowhere on a disk: for a
long context they would be a quarter of a small model.
"""

import numpy as np
import numpy.typing as npt

from dash_export.core.facts import DecoderFacts


def rope_tables(model: DecoderFacts, rows: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return `rope.cos` and `rope.sin`, float32 [rows, rotary_dim / 2], for the positions from 0 on; and
    `rope.window.cos` and `rope.window.sin` where layers with a window have others.
    """
    kinds = {"rope": (model.rope_frequencies, model.rope_scale), "rope.window": (model.window_frequencies, 1.0)}
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name, (frequencies, scale) in kinds.items():
        if frequencies:
            angles = np.outer(np.arange(rows), np.array(frequencies))
            found |= {f"{name}.{turn.__name__}": (turn(angles) * scale).astype(np.float32) for turn in (np.cos, np.sin)}
    return found
