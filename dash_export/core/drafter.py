"""The drafter of kind `layer`: the bypass of the whole stack, which guesses the token after the next one (numpy only).

Of the newest token x, not yet run through the model, it takes the embedding e (as it enters the first layer), and of
the token before the normed final state f. The stand-in for all layers but the last is linear; then a layer in the form
of the model's last one, and the model's final norm and head follow:

    h = f @ state.T + RMSNorm(e) @ embedding.T          (RMSNorm of unit gain and the model's epsilon)
    s = RMSNorm(layer(h)) * norm                        (the estimate of x's own normed final state)
    draft, chance = the likeliest of the model's logits of s among `tokens`, and its probability among them

The layer attends to the K and V that the model's last layer has in the cache, so a drafter has no cache of its own, and
nothing is to be done for a prompt. Its own K and V go into the row of x, which is free until the model runs x and
overwrites it. A further draft takes s in the place of f, and the draft as x, one row later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]

STATE, EMBEDDING, NORM, LAYER = "state.weight", "embedding.weight", "norm.weight", "layer."
"""Names of a drafter's weights; those of its layer follow LAYER as they follow `model.layers.N.` in the model."""


@dataclass(frozen=True)
class Drafter:
    """Weights by name, float32; matrices are [out, in]. `tokens` int64 [V], rising: the short vocabulary. `slope`,
    `offset`: a draft's chance to be accepted is sigmoid(slope * logit(probability) + offset). `origin`: who made it.
    """

    weights: Mapping[str, Float32Array]
    tokens: npt.NDArray[np.int64]
    slope: float = 1.0
    offset: float = 0.0
    origin: str = "none"
