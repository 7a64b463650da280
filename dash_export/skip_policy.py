"""A skip policy as data: the units it may skip, the network that predicts damage, the bypasses. No framework needed.

One linear network reads one state, what enters layer `read`, and answers for all units (docs/method.md):

    damage[u] = softplus(RMSNorm(h[read]) . weight[:, u] + bias[u])

A skipped unit of layers a..b is one product of x = RMSNorm(h[a]) (unit gain), its bypass:

    [update | K_a | V_a | K_a+1 | V_a+1 | ... | V_b] = x @ weight + bias

K is before its per-head norm and RoPE. K_a and V_a are the model's own projections of that state, so a policy holds
the other columns only; a bypass without weights updates nothing and takes every layer's own projections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from dash_export.decision import Unit, check_units, units_of, units_text
from dash_export.errors import PolicyError
from dash_export.models.spec import FINAL_NORM, Checkpoint, DecoderSpec, Float32Array


@dataclass(frozen=True)
class Bypass:
    """What a skipped unit does instead. `weights`: none, or `weight` [hidden, columns] and `bias` [columns]. Columns:
    the update's `hidden`, then K and V of each layer but the first.
    """

    weights: Mapping[str, Float32Array] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """As it is printed."""
        return "linear" if self.weights else "none"

    def in_half(self) -> Bypass:
        """Rounded to what 16 bits hold: engines have 8, and a file of it half the size."""
        return Bypass({name: array.astype(np.float16).astype(np.float32) for name, array in self.weights.items()})


@dataclass(frozen=True)
class SkipPolicy:
    """Units, damage network and bypasses of one model.

    `read`: the layer whose input decides. `network` is None for a bundle without a token policy; otherwise `weight`
    [hidden, units] and `bias` [units], float32. `bypasses`: one per unit. `static_order`: places of units in the order
    in which a static policy skips them; empty where nobody ranked them. `final_norm` [hidden]: the gain of the final
    norm of the model it was trained with, by which another model of the same shape is told apart; None in what was not
    trained.
    """

    units: tuple[Unit, ...]
    read: int = 0
    network: Mapping[str, Float32Array] | None = None
    bypasses: tuple[Bypass, ...] = ()
    origin: str = "none"
    static_order: tuple[int, ...] = ()
    final_norm: Float32Array | None = field(default=None, compare=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """All that may be skipped."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def form(self) -> str:
        """Of its bypasses, as it is printed."""
        return ", ".join(sorted({bypass.form for bypass in self.bypasses})) or "none"

    def weights(self) -> dict[str, Float32Array]:
        """Every weight under one flat name, as it is hashed and stored."""
        flat = {f"network.{name}": value for name, value in (self.network or {}).items()}
        for unit, bypass in zip(self.units, self.bypasses, strict=True):
            flat |= {f"bypass.{unit.name}.{name}": value for name, value in bypass.weights.items()}
        return flat


def narrowed(policy: SkipPolicy, layers: Iterable[int]) -> SkipPolicy:
    """The same policy with fewer units that may be skipped, those of these layers. Raises PolicyError where they are
    not whole units.
    """
    kept = units_of(layers, policy.units)
    network = policy.network
    if network is not None:
        network = {"weight": np.ascontiguousarray(network["weight"][:, kept]), "bias": network["bias"][list(kept)]}
    return replace(
        policy,
        units=tuple(policy.units[place] for place in kept),
        network=network if kept else None,
        bypasses=tuple(policy.bypasses[place] for place in kept),
        static_order=tuple(kept.index(place) for place in policy.static_order if place in kept),
    )


UNIT = 4
"""Layers of a unit where nobody says which."""


def default_units(num_layers: int, size: int = UNIT) -> tuple[Unit, ...]:
    """Units of `size` layers, or one less, out of all but the first fifth and the last two layers."""
    first, stop = max(2, num_layers // 5), max(num_layers - 2, 3)
    stop = min(stop, num_layers)
    count = max(1, -(-(stop - first) // size)) if stop > first else 0
    cuts = [first + (stop - first) * cut // count for cut in range(count + 1)] if count else []
    return tuple(Unit(a, b - 1) for a, b in pairwise(cuts))


def check_policy(policy: SkipPolicy, spec: DecoderSpec) -> None:
    """Raises PolicyError when the policy is not one for a model of this shape, or holds a weight that is not finite."""
    check_units(policy.units, policy.read, spec.num_layers)
    order = policy.static_order
    if len(set(order)) != len(order) or not set(order) <= set(range(len(policy.units))):
        raise PolicyError(f"static_order must list places of units, each at most once; got {list(order)}.")
    if len(policy.bypasses) != len(policy.units):
        raise PolicyError(f"There are {len(policy.bypasses)} bypasses for {len(policy.units)} units.")
    found = policy.weights()
    needed = _weight_shapes(policy, spec)
    if set(found) != set(needed):
        missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
        what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]:.60}, which is nothing of ours"
        raise PolicyError(f"The policy of the units {units_text(policy.units):.100} {what}.")
    for name, shape in needed.items():
        array = found[name]
        if array.shape != shape:
            raise PolicyError(f"The policy's {name} has shape {list(array.shape)}; {list(shape)} was expected.")
        if not np.isfinite(array).all():
            raise PolicyError(f"The policy's {name} holds NaN or infinity: the file or its training went wrong.")
    norm = policy.final_norm
    if norm is not None and not (norm.shape == (spec.hidden_size,) and np.isfinite(norm).all() and norm.any()):
        raise PolicyError("The final norm by which the policy knows its model is not one of such a model.")


OTHER_MODEL = 0.01
"""Relative distance of two final norms, of which quantised files keep at least 16 bits."""


def check_model(policy: SkipPolicy, checkpoint: Checkpoint) -> None:
    """Raises PolicyError when the policy was trained with another model, of whatever shape. A fine-tune that left the
    final norm as it was passes for the model itself.
    """
    check_policy(policy, checkpoint.spec)
    known = policy.final_norm
    if known is None:
        return
    found = checkpoint.weights[FINAL_NORM].read_rows(0, len(known)).astype(np.float64)
    distance = float(np.linalg.norm(found - known) / np.linalg.norm(known.astype(np.float64)))
    if not distance <= OTHER_MODEL:
        raise PolicyError(
            f"This is the policy of another model of the same shape ({policy.origin}): the final norms are "
            f"{distance:.0%} apart. Give the model it was trained with, or adapt it to this one: "
            "dash-export train MODEL --from POLICY.safetensors."
        )


def key_value_size(spec: DecoderSpec) -> int:
    """Columns of one layer's K, or V."""
    return spec.num_kv_heads * spec.head_dim


def stored_columns(unit: Unit, spec: DecoderSpec) -> int:
    """Columns of a bypass as a policy holds it: the update's, then K and V of each layer but the first."""
    return spec.hidden_size + 2 * key_value_size(spec) * (len(unit.layers) - 1)


def _weight_shapes(policy: SkipPolicy, spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every weight the policy must have."""
    hidden, shapes = spec.hidden_size, {}
    if policy.network is not None:
        shapes = {"network.weight": (hidden, len(policy.units)), "network.bias": (len(policy.units),)}
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        if not bypass.weights:
            continue
        columns, prefix = stored_columns(unit, spec), f"bypass.{unit.name}."
        shapes |= {f"{prefix}weight": (hidden, columns), f"{prefix}bias": (columns,)}
    return shapes


def full_bypass(bypass: Bypass, unit: Unit, checkpoint: Checkpoint) -> dict[str, Float32Array]:
    """The bypass with all its columns: `weight` [hidden, (hidden +) layers * 2 * kv], `bias`.

    The model's own projections of x = RMSNorm(h) of unit gain are gain[:, None] * W: of the first layer, or, in a
    bypass without weights, of every layer; that one has no columns for an update.
    """
    stored = bypass.weights
    own = unit.layers[:1] if stored else unit.layers
    projected = [_projection(checkpoint, layer, which) for layer in own for which in ("k", "v")]
    columns = [matrix for matrix, _ in projected]
    biases = [bias for _, bias in projected]
    if stored:
        hidden = checkpoint.spec.hidden_size
        columns = [stored["weight"][:, :hidden], *columns, stored["weight"][:, hidden:]]
        biases = [stored["bias"][:hidden], *biases, stored["bias"][hidden:]]
    full = {"weight": np.concatenate(columns, axis=1), "bias": np.concatenate(biases)}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in full.items()}


def _projection(checkpoint: Checkpoint, layer: int, which: str) -> tuple[Float32Array, Float32Array]:
    """K or V of a layer as a map of RMSNorm(h) of unit gain: matrix [hidden, kv] and bias [kv]."""
    weights, prefix = checkpoint.weights, f"model.layers.{layer}."

    def read(name: str) -> Float32Array:
        weight = weights[prefix + name]
        return weight.read_rows(0, weight.shape[0])

    matrix = read("input_layernorm.weight")[:, None] * read(f"self_attn.{which}_proj.weight").T
    bias = f"self_attn.{which}_proj.bias"
    known = prefix + bias in checkpoint.spec.weight_shapes()
    return matrix, read(bias) if known else np.zeros(matrix.shape[1], np.float32)


def no_policy(num_layers: int, units: Sequence[Unit] | None = None) -> SkipPolicy:
    """Bypasses without weights and no network: the bundle then serves `dense` and `static`."""
    units = default_units(num_layers) if units is None else tuple(units)
    read = max(units[0].first - 1, 0) if units else 0
    check_units(units, read, num_layers)
    return SkipPolicy(units, read, None, tuple(Bypass() for _ in units))


def untrained_policy(spec: DecoderSpec, units: Sequence[Unit] | None = None, seed: int = 0) -> SkipPolicy:
    """A seeded random network with the shapes of a trained one: it decides by noise and is there to measure and to
    test.
    """
    policy = no_policy(spec.num_layers, units)
    if not policy.units:
        return policy
    rng, hidden, count = np.random.default_rng(seed), spec.hidden_size, len(policy.units)
    weight = (rng.standard_normal((hidden, count)) * 1.5 * hidden**-0.5).astype(np.float32)
    network = {"weight": weight, "bias": np.full(count, -2.0, np.float32)}
    return replace(policy, network=network, origin=f"untrained (seed {seed})")
