"""The network of an encoder's policy: what it reads of a state, the damage that it learns, the guard's distances."""

from __future__ import annotations

from math import log

import numpy as np
import numpy.typing as npt

from dash_export.core.policy import Weights
from dash_export.train.image_passes import Floats, unit_normed

Doubles = npt.NDArray[np.float64]


def pooled_features(state: Floats, special: int, epsilon: float) -> Floats:
    """Return what the network reads [n, features] of a state [n, tokens, hidden]: the class token, mean and spread of
    the patches, all normed without gain (the formula of `graphs/portable/encoder_graphs.py`).
    """
    read = unit_normed(state, epsilon)
    patches = read[:, special:]
    parts = [patches.mean(axis=1), patches.std(axis=1)]
    found: Floats = np.concatenate([read[:, 0], *parts] if special else parts, axis=1)
    return found


def unit_damages(lost: Doubles) -> Doubles:
    """Return the damage [n, units] of each unit: what skipping it adds to the divergence [n, choices], on average over
    all choices of the others.
    """
    count = round(log(lost.shape[1], 2))
    choices = np.arange(lost.shape[1])
    found = [lost[:, choices >> unit & 1 == 1].mean(axis=1) - lost[:, choices >> unit & 1 == 0].mean(axis=1)
             for unit in range(count)]  # fmt: skip
    damages: Doubles = np.maximum(np.stack(found, axis=1), 1e-7)
    return damages


def fitted_network(features: Floats, damages: Doubles, components: int, ridge: float) -> dict[str, Floats]:
    """Return the network: principal components of the features, of unit variance, and a ridge regression of log damage
    on these. `limit` is still infinite.
    """
    mean = features.mean(axis=0, dtype=np.float64)
    _, spread, axes = np.linalg.svd(features - mean, full_matrices=False)
    kept = min(components, len(features) // 4)
    scale = spread[:kept] / np.sqrt(len(features) - 1)
    components = axes[:kept].T / np.maximum(scale, 1e-9)
    read = (features - mean) @ components
    target = np.log(np.expm1(np.minimum(damages, 20.0)))  # the inverse of softplus
    bias = target.mean(axis=0)
    weight = np.linalg.solve(read.T @ read + ridge * len(read) * np.eye(kept), read.T @ (target - bias))
    found = {"mean": mean, "components": components, "spread": scale, "weight": weight, "bias": bias}
    found["limit"] = np.full(2, np.inf)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def predicted(network: Weights, features: Floats) -> tuple[Doubles, Doubles]:
    """Return damage [n, units], and distances [n, 2] from the pictures that the network learnt from: mean square of the
    components, and the square of what lies outside of them.
    """
    centred = (features - network["mean"]).astype(np.float64)
    read = centred @ network["components"].astype(np.float64)
    outside = (centred**2).sum(axis=1) - ((read * network["spread"]) ** 2).sum(axis=1)
    damage = np.logaddexp(0, read @ network["weight"] + network["bias"])
    return damage, np.stack([(read * read).mean(axis=1), outside], axis=1)
