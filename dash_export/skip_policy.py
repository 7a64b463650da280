"""A skip policy as data: which layers it may skip, the network that predicts damage, the compensation. No framework
needed.

The network of gated layer l+1 reads the state one layer earlier (DESIGN: "one layer ahead"). It is linear, or has one
hidden layer; with or without the last two actions:

    damage[l+1] = softplus(RMSNorm(h[l]) . w_state [+ [a[l-1], a[l]] . w_actions] + b)
    damage[l+1] = softplus(w_out . relu(RMSNorm(h[l]) @ W_state [+ [a[l-1], a[l]] @ W_actions] + b) + b_out)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from dash_export.errors import PolicyError
from dash_export.models.spec import DecoderSpec, Float32Array

COMPENSATIONS = ("none", "scale", "low_rank")
HISTORY = 2
"""How many earlier actions the network reads."""


@dataclass(frozen=True)
class Compensation:
    """What is added for a skipped layer: `none`; `scale`: factor * h; `low_rank`: RMSNorm(h) @ down @ up.

    Weights are stacked over gated layers: `factor` [gated]; `down` [gated, hidden, rank], `up` [gated, rank, hidden].
    """

    kind: str = "none"
    weights: Mapping[str, Float32Array] = field(default_factory=dict)


@dataclass(frozen=True)
class SkipPolicy:
    """Gated layers, damage network and compensation of one model.

    `network` is None for a bundle without a token policy; otherwise it holds, stacked over the gated layers, `state`
    [gated, hidden, width], `bias` [gated, width], `actions` [gated, 2, width] where it reads them, and `out` [gated,
    width] and `out_bias` [gated] where it has a hidden layer (without, the width is 1), all float32.
    """

    gated: tuple[int, ...]
    network: Mapping[str, Float32Array] | None = None
    compensation: Compensation = Compensation()
    origin: str = "none"

    @property
    def width(self) -> int:
        """Units of the network's hidden layer; 0 for a linear network and for none."""
        return int(self.network["out"].shape[1]) if self.network is not None and "out" in self.network else 0

    @property
    def reads_actions(self) -> bool:
        """Whether the network reads the last two actions."""
        return self.network is not None and "actions" in self.network

    def weights(self) -> dict[str, Float32Array]:
        """Every weight under one flat name, as it is hashed and stored."""
        flat = {f"network.{name}": value for name, value in (self.network or {}).items()}
        return flat | {f"compensation.{name}": value for name, value in self.compensation.weights.items()}


def default_gated(num_layers: int, essential: Iterable[int] = ()) -> tuple[int, ...]:
    """All layers but the first two, the last and those calibration finds essential."""
    kept = {0, 1, num_layers - 1} | set(essential)
    return tuple(layer for layer in range(num_layers) if layer not in kept)


def check_gated(gated: Iterable[int], num_layers: int) -> tuple[int, ...]:
    """Sorted, unique gated layers; raises PolicyError for a layer that does not exist or may never be skipped."""
    layers = tuple(sorted(set(gated)))
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        raise PolicyError(f"Gated layers {wrong} do not exist: this model has layers 0 to {num_layers - 1}.")
    if layers and layers[0] == 0:
        # Deciding is one layer ahead: nothing has been read before layer 0.
        raise PolicyError("Layer 0 cannot be gated: its decision would need the input of a layer before it.")
    return layers


def no_policy(num_layers: int, gated: Iterable[int] | None = None) -> SkipPolicy:
    """Skip graphs without a network: the bundle then serves `dense` and `static`."""
    return SkipPolicy(check_gated(default_gated(num_layers) if gated is None else gated, num_layers))


def untrained_policy(
    spec: DecoderSpec, gated: Iterable[int] | None = None, width: int = 64, seed: int = 0
) -> SkipPolicy:
    """A seeded random network with the shapes of a trained one: it decides by noise and is there to measure and to
    test. Width 0 is a linear network, which does not read actions.
    """
    layers = check_gated(default_gated(spec.num_layers) if gated is None else gated, spec.num_layers)
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> Float32Array:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    count, hidden = len(layers), spec.hidden_size
    if width == 0:
        linear = {
            "state": normal(count, hidden, 1, scale=1.5 * hidden**-0.5),
            "bias": np.full((count, 1), -2.0, np.float32),
        }
        return SkipPolicy(layers, linear, Compensation(), f"untrained (seed {seed})")
    network = {
        "state": normal(count, hidden, width, scale=hidden**-0.5),
        "actions": normal(count, HISTORY, width, scale=0.5),
        "bias": np.zeros((count, width), np.float32),
        "out": normal(count, width, scale=1.5 * width**-0.5),
        "out_bias": np.full(count, -2.0, np.float32),
    }
    return SkipPolicy(layers, network, Compensation(), f"untrained (seed {seed})")
