"""A policy's bypasses completed with the model's own K and V projections, and a checkpoint with some units pruned.

A pruned model is the best case of a static policy: its units are gone for every token. A pruned unit leaves the update
of its bypass to the layer before it, whose output h becomes h + x @ weight + bias (x as in policy.py). The K and V of
the unit are gone: nothing attends to them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dash_export.core.drafter import LAYER, NORM, Drafter
from dash_export.core.policy import SkipPolicy, Weights, check_policy, half
from dash_export.core.units import Unit, units_of, units_text
from dash_export.errors import PolicyError
from dash_export.files.artifacts import content_key
from dash_export.models.config import FULL, SLIDING
from dash_export.models.spec import (
    EMBED_WEIGHT,
    FINAL_NORM,
    HEAD_WEIGHT,
    LAYERS,
    AnyCheckpoint,
    Checkpoint,
    Float32Array,
    Weight,
    layer_weight,
    row_blocks,
)

DRAFTER_MATRIX = "drafter.head.weight"
OTHER_MODEL = 0.01
"""Relative distance of final norms above which models differ. Quantised files keep norms in at least 16 bits."""


def check_model(policy: SkipPolicy, checkpoint: AnyCheckpoint) -> None:
    """Raise PolicyError when the policy was trained with another model, even with one of the same shape. A fine-tune
    that left the final norm unchanged passes as the model itself.
    """
    check_policy(policy, checkpoint.spec)
    known = policy.final_norm
    if known is None:
        return
    found = checkpoint.read(checkpoint.spec.final_norm).astype(np.float64)
    distance = float(np.linalg.norm(found - known) / np.linalg.norm(known.astype(np.float64)))
    if not distance <= OTHER_MODEL:
        raise PolicyError(
            f"This is the policy of another model of the same shape ({policy.origin}): the final norms are "
            f"{distance:.0%} apart. Give the model it was trained with, or adapt it to this one: "
            "dash-export train MODEL --skips --from POLICY.safetensors."
        )


def full_bypass(stored: Weights, unit: Unit, checkpoint: Checkpoint) -> dict[str, Float32Array]:
    """Return the whole bypass: `weight` [hidden, (hidden +) layers * 2 * kv] in numbers that 16 bits hold, and `bias`
    [columns]. The first `hidden` columns are the update; a bypass without weights has none.

    The columns that a policy does not store are the model's own K and V projections as maps of what a bypass reads
    (with a norm before attention gain[:, None] * W, else W): those of the unit's first layer or, in a bypass without
    weights, of every layer.
    """
    own = unit.layers[:1] if stored else unit.layers
    projected = [_projection(checkpoint, layer, which) for layer in own for which in ("k", "v")]
    columns, biases = map(list, zip(*projected, strict=True))
    if stored:
        hidden = checkpoint.spec.hidden_size
        columns = [stored["weight"][:, :hidden], *columns, stored["weight"][:, hidden:]]
        biases = [stored["bias"][:hidden], *biases, stored["bias"][hidden:]]
    return {"weight": half(np.concatenate(columns, axis=1)), "bias": np.concatenate(biases).astype(np.float32)}


def _projection(checkpoint: Checkpoint, layer: int, which: str) -> tuple[Float32Array, Float32Array]:
    """Return the K or V projection of a layer as a map of what a bypass reads: matrix [hidden, kv], bias [kv]."""
    matrix = checkpoint.read(layer_weight(layer, f"self_attn.{which}_proj.weight")).T
    if not checkpoint.spec.traits.norms_after:
        matrix = checkpoint.read(layer_weight(layer, "input_layernorm.weight"))[:, None] * matrix
    bias = layer_weight(layer, f"self_attn.{which}_proj.bias")
    return matrix, checkpoint.read(bias) if bias in checkpoint.weights else np.zeros(matrix.shape[1], np.float32)


def _weight_in_memory(name: str, array: Float32Array) -> Weight:
    """Return a Weight that reads `array` from memory instead of from disk."""
    return Weight(name, array.shape, "F32", lambda start, stop: array[start:stop])


def drafting(checkpoint: Checkpoint, drafter: Drafter) -> Checkpoint:
    """Return the checkpoint with a drafter's weights alone, matrices in 16 bits: those of its layer and its norm under
    the names of the model's last layer and final norm, and as DRAFTER_MATRIX the head's rows of its tokens.
    """
    spec, head = checkpoint.spec, EMBED_WEIGHT if checkpoint.spec.tie_embeddings else HEAD_WEIGHT
    last, start, rows = layer_weight(spec.num_layers - 1), 0, list[Float32Array]()
    for block in row_blocks(checkpoint.weights[head]):
        places = drafter.tokens - start
        rows.append(block[places[(places >= 0) & (places < len(block))]])
        start += len(block)
    found = {DRAFTER_MATRIX: half(np.concatenate(rows))}
    for name, array in drafter.weights.items():
        found[FINAL_NORM if name == NORM else name.replace(LAYER, last, 1)] = array
    weights = {name: _weight_in_memory(name, array) for name, array in found.items()}
    weights = {name: replace(each, dtype="F16" if len(each.shape) == 2 else "F32") for name, each in weights.items()}
    return replace(checkpoint, weights=weights)


def pruned(checkpoint: Checkpoint, policy: SkipPolicy, units: Sequence[Unit]) -> Checkpoint:
    """Return the checkpoint without these units of the policy. Raises PolicyError when they are not units of the
    policy, or when the bypass of one of them has no weights.
    """
    check_model(policy, checkpoint)
    places = units_of((layer for unit in units for layer in unit.layers), policy.units)
    bypasses = {policy.units[place]: policy.bypasses[place] for place in places}
    other = next((unit for unit, weights in bypasses.items() if not weights), None)
    if other is not None:
        raise PolicyError(f"Unit {other} has a bypass without weights: there is nothing to put in its place.")
    hidden, digest = checkpoint.spec.hidden_size, hashlib.sha256()
    gone = {layer for unit in bypasses for layer in unit.layers}
    kept = [layer for layer in range(checkpoint.spec.num_layers) if layer not in gone]
    layers, updates = len(kept), list[int]()
    weights = {name: weight for name, weight in checkpoint.weights.items() if not name.startswith(LAYERS)}
    for place, layer in enumerate(kept):
        old, new = layer_weight(layer), layer_weight(place)
        own = [name for name in checkpoint.weights if name.startswith(old)]
        weights |= {new + name.removeprefix(old): checkpoint.weights[name] for name in own}
    for unit, bypass in bypasses.items():
        before = sum(layer < unit.first for layer in kept) - 1  # the layer that takes the update
        new = layer_weight(before, f"update_{updates.count(before)}.")
        arrays = {f"{new}weight": half(bypass["weight"][:, :hidden].T.copy()), f"{new}bias": bypass["bias"][:hidden]}
        for name, array in arrays.items():
            weights[name] = _weight_in_memory(name, array)
            digest.update(array.tobytes())
        updates.append(before)
    name, traits = f"{checkpoint.spec.name}-without-{units_text(bypasses)}", checkpoint.spec.traits
    traits = replace(
        traits,
        windows=tuple(traits.windows[layer] for layer in kept) if traits.windows else (),
        unrotated=tuple(place for place, layer in enumerate(kept) if layer in traits.unrotated),
    )
    config = {**checkpoint.config, "num_hidden_layers": layers}
    # Written out: a default of the family's would count the layers that are left.
    if traits.windows or config.get("layer_types"):
        config["layer_types"] = [SLIDING if window else FULL for window in traits.windows or [0] * layers]
    if checkpoint.spec.traits.unrotated or config.get("no_rope_layers"):
        config["no_rope_layers"] = [int(layer not in traits.unrotated) for layer in range(layers)]
    return replace(
        checkpoint,
        source=name,
        spec=replace(checkpoint.spec, name=name, num_layers=layers, traits=traits, updates=tuple(updates)),
        config=config,
        weights=weights,
        assets={**checkpoint.assets, "config.json": json.dumps(config, indent=2)},
        fingerprint=content_key(checkpoint.fingerprint, units_text(bypasses), digest.hexdigest()),
    )
