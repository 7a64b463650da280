"""The network of a policy, which predicts damage: one hidden layer, all weights float32.

    damage[u] = softplus(relu(x @ hidden_weight + hidden_bias) . weight[:, u] + bias[u])

`hidden_weight` [hidden, width], `hidden_bias` [width], `weight` [width, units], `bias` [units].
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Weights = Mapping[str, Float32Array]

WIDTH = 64
"""Columns of the hidden layer of a network that begins anew."""


def random_hidden_layer(hidden: int, rng: np.random.Generator) -> dict[str, Float32Array]:
    """Return the first half of a network's weights, at random: its columns vary by about 1 before the relu."""
    weight = (rng.standard_normal((hidden, WIDTH)) * hidden**-0.5).astype(np.float32)
    return {"hidden_weight": weight, "hidden_bias": np.zeros(WIDTH, np.float32)}


def with_hidden_layer(network: Weights) -> Weights:
    """Return a network without a hidden layer, as policies of the second schema have it, as one with it:
    s = relu(s) - relu(-s).
    """
    weight, signs = network["weight"], np.eye(len(network["bias"]), dtype=np.float32)
    return {
        "hidden_weight": np.concatenate([weight, -weight], 1),
        "hidden_bias": np.zeros(2 * len(signs), np.float32),
        "weight": np.concatenate([signs, -signs]),
        "bias": network["bias"],
    }


def network_shapes(network: Weights, hidden: int, units: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that its weights must have."""
    width = network["hidden_bias"].size if "hidden_bias" in network else WIDTH
    return {"hidden_weight": (hidden, width), "hidden_bias": (width,), "weight": (width, units), "bias": (units,)}
