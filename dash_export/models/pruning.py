"""A model without some units: what a static policy is at its best, where no token may decide otherwise.

A pruned unit leaves the update of its bypass to the layer before it, h + RMSNorm(h) @ weight + bias (unit gain). Its K
and V are gone: nothing attends to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dash_export.artifacts import content_key
from dash_export.decision import Unit, units_of, units_text
from dash_export.errors import PolicyError
from dash_export.models.spec import LAYERS, Checkpoint, Float32Array, layer_weight
from dash_export.skip_policy import SkipPolicy, check_model


@dataclass(frozen=True)
class _Made:
    """A tensor that is not on disk."""

    array: Float32Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read_rows(self, start: int, stop: int) -> Float32Array:
        return self.array[start:stop]


def pruned(checkpoint: Checkpoint, policy: SkipPolicy, units: Sequence[Unit]) -> Checkpoint:
    """The checkpoint without these units of its policy. Raises PolicyError where they are none of them, or where a
    bypass of theirs has no weights.
    """
    check_model(policy, checkpoint)
    places = units_of((layer for unit in units for layer in unit.layers), policy.units)
    bypasses = {policy.units[place]: policy.bypasses[place].weights for place in places}
    other = next((unit for unit, weights in bypasses.items() if not weights), None)
    if other is not None:
        raise PolicyError(f"Unit {other} has a bypass without weights: there is nothing to put in its place.")
    hidden, digest = checkpoint.spec.hidden_size, hashlib.sha256()
    weights = {name: weight for name, weight in checkpoint.weights.items() if not name.startswith(LAYERS)}
    updates: list[int] = []
    layers = 0
    for layer in range(checkpoint.spec.num_layers):
        unit = next((unit for unit in bypasses if layer in unit.layers), None)
        if unit is None:
            old = layer_weight(layer)
            for name in filter(lambda name: name.startswith(old), checkpoint.weights):
                weights[layer_weight(layers, name.removeprefix(old))] = checkpoint.weights[name]
            layers += 1
        elif layer == unit.first:
            matrix, bias = bypasses[unit]["weight"][:, :hidden].T.copy(), bypasses[unit]["bias"][:hidden]
            own = layer_weight(layers - 1, f"update_{updates.count(layers - 1)}.")
            weights |= {f"{own}weight": _Made(matrix), f"{own}bias": _Made(bias)}
            digest.update(matrix.tobytes() + bias.tobytes())
            updates.append(layers - 1)
    config = {**checkpoint.config, "num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]  # all are alike
    return replace(
        checkpoint,
        source=f"{checkpoint.name}-without-{units_text(bypasses)}",
        spec=replace(checkpoint.spec, num_layers=layers, updates=tuple(updates)),
        config=config,
        weights=weights,
        assets={**checkpoint.assets, "config.json": json.dumps(config, indent=2)},
        fingerprint=content_key(checkpoint.fingerprint, units_text(bypasses), digest.hexdigest()),
    )
