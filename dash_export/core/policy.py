"""A skip policy: the units it may skip, the network that predicts damage, the bypasses.

One linear network reads one state, the input of layer `read`, and predicts the damage of all units (docs/method.md):

    damage[u] = softplus(RMSNorm(h[read]) . weight[:, u] + bias[u])

The bypass of a unit of layers a..b is one product of x = RMSNorm(h[a]) (unit gain), or of x = h[a] where the layers
read the state itself (`Traits.norms_after`):

    [update | K_a | V_a | K_a+1 | V_a+1 | ... | V_b] = x @ weight + bias

K is before its own norm and RoPE. K_a and V_a are the model's own projections of h[a], so a policy holds the other
columns only. A bypass without weights has no update, and K and V of each layer are that layer's projections of h[a].

An encoder's units are exits (`core/exits.py`): a bypass gives the answer. The state that enters layer `read` gives a
first answer, with which that of the first exit is compared, and the guard. x = [class token, mean of patches, spread of
patches], normed without gain; z = (x - mean) @ components has unit variance on the pictures it learnt from; damage is
infinite where mean(z^2) > limit[0] (the Mahalanobis distance) or |x - mean|^2 - |z * spread|^2 > limit[1] (what lies
outside of the components).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dash_export.core.drafter import Drafter, check_drafter
from dash_export.core.exits import check_exits
from dash_export.core.facts import ModelFacts
from dash_export.core.units import Unit, check_static_order, check_units, units_of, units_text
from dash_export.errors import PolicyError

Float32Array = npt.NDArray[np.float32]

UNIT = 4
"""Layers of a unit by default."""
FINAL_NORM = "model.final_norm"
"""Name of a policy's tensor `final_norm`."""
LARGEST = float(np.finfo(np.float16).max)
"""Bound of the magnitude of a bypass's numbers: the largest of float16."""


def half(array: Float32Array) -> Float32Array:
    """Round to float16, clipped to its range, and return float32: a bundle keeps bypasses in float16."""
    return np.clip(array, -LARGEST, LARGEST).astype(np.float16).astype(np.float32)


Weights = Mapping[str, Float32Array]
"""Weights by name. Those of a bypass, the replacement of a skipped unit: none, or `weight` [hidden, columns] and `bias`
[columns], with the columns of the update (`hidden`), then those of K and V of each layer but the first.
"""


@dataclass(frozen=True)
class SkipPolicy:
    """Units, damage network and bypasses of one model.

    `read`: the layer whose input decides. `network`: `weight` [hidden, units] and `bias` [units], float32; None without
    a token policy. `bypasses`: one per unit. `static_order`: indices of units in the order in which a static policy
    skips them; empty where the units are not ranked. `final_norm` [hidden]: gain of the final norm of the model that
    the policy was trained with; it tells that model from another one of the same shape. `answers`: held-out answers of
    that model, as a .jsonl file (`text/chats.py`), on which a build calibrates its dial. `drafter` guesses tokens.
    """

    units: tuple[Unit, ...]
    read: int = 0
    network: Weights | None = None
    bypasses: tuple[Weights, ...] = ()
    origin: str = "none"
    static_order: tuple[int, ...] = ()
    final_norm: Float32Array | None = field(default=None, compare=False)
    answers: str = field(default="", compare=False)
    drafter: Drafter | None = field(default=None, compare=False)

    @property
    def form(self) -> str:
        """Names of the bypasses' forms, for messages and records: linear, or none for one without weights."""
        return ", ".join(sorted({"linear" if bypass else "none" for bypass in self.bypasses})) or "none"

    def in_half(self) -> SkipPolicy:
        """Return the policy with bypasses rounded to float16: engines hold 8 bits, and a file takes half the size."""
        halves = ({name: half(array) for name, array in bypass.items()} for bypass in self.bypasses)
        return replace(self, bypasses=tuple(halves))

    def weights(self) -> dict[str, Float32Array]:
        """Return every weight under one flat name, as it is hashed and stored."""
        flat = {f"network.{name}": value for name, value in (self.network or {}).items()}
        for unit, bypass in zip(self.units, self.bypasses, strict=True):
            flat |= {f"bypass.{unit.name}.{name}": value for name, value in bypass.items()}
        return flat


def no_policy(num_layers: int, units: Sequence[Unit] | None = None) -> SkipPolicy:
    """Return a policy with empty bypasses and no network: the bundle then serves `dense` and `static`."""
    units = default_units(num_layers) if units is None else tuple(units)
    read = max(units[0].first - 1, 0) if units else 0
    check_units(units, read, num_layers)
    return SkipPolicy(units, read, None, tuple({} for _ in units))


def untrained_policy(spec: ModelFacts, units: Sequence[Unit] | None = None, seed: int = 0) -> SkipPolicy:
    """Return a policy with a seeded random network in the shapes of a trained one: noise, to measure and test with."""
    policy = no_policy(spec.num_layers, units)
    if not policy.units:
        return policy
    network = spec.random_network(len(policy.units), np.random.default_rng(seed))
    return replace(policy, network=network, origin=f"untrained (seed {seed})")


def default_units(num_layers: int) -> tuple[Unit, ...]:
    """Split the layers but the first fifth and the last two into units of UNIT layers, or one less."""
    first, stop = max(2, num_layers // 5), min(max(num_layers - 2, 3), num_layers)
    count = max(1, -(-(stop - first) // UNIT)) if stop > first else 0
    cuts = [first + (stop - first) * cut // count for cut in range(count + 1)] if count else []
    return tuple(Unit(a, b - 1) for a, b in pairwise(cuts))


def narrowed(policy: SkipPolicy, layers: Iterable[int]) -> SkipPolicy:
    """Return the policy with the units of these layers only. Raises PolicyError where they are not whole units."""
    kept = units_of(layers, policy.units)
    network = policy.network
    if "limit" in (network or {}):
        raise PolicyError("The exits of an encoder's policy build on one another: train it again with these --units.")
    if network is not None:
        own = {"weight": np.ascontiguousarray(network["weight"][:, kept]), "bias": network["bias"][list(kept)]}
        network = {**network, **own}
    return replace(
        policy,
        units=tuple(policy.units[place] for place in kept),
        network=network if kept else None,
        bypasses=tuple(policy.bypasses[place] for place in kept),
        static_order=tuple(kept.index(place) for place in policy.static_order if place in kept),
    )


def check_policy(policy: SkipPolicy, spec: ModelFacts) -> None:
    """Raise PolicyError when the policy is not one for a model of this shape, or holds a weight that is not finite."""
    check_units(policy.units, policy.read, spec.num_layers)
    check_static_order(policy.static_order, policy.units)
    if spec.decides == "input":
        check_exits(policy.units, spec.num_layers)
    if policy.drafter is not None:
        check_drafter(policy.drafter, spec.drafter_shapes(), getattr(spec, "vocab_size", 0))
    if len(policy.bypasses) != len(policy.units):
        raise PolicyError(f"There are {len(policy.bypasses)} bypasses for {len(policy.units)} units.")
    found, needed = policy.weights(), dict[str, tuple[int, ...]]()
    if policy.network is not None:
        given = {name: array.shape for name, array in policy.network.items()}
        shapes = spec.network_shapes(len(policy.units), given)
        needed |= {f"network.{name}": shape for name, shape in shapes.items()}
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        if bypass or spec.decides == "input":
            needed |= {f"bypass.{unit.name}.{name}": shape for name, shape in spec.bypass_shapes(unit).items()}
    if policy.final_norm is not None:
        found[FINAL_NORM], needed[FINAL_NORM] = policy.final_norm, (spec.hidden_size,)
        if not policy.final_norm.any():
            raise PolicyError("The final norm by which the policy knows its model is zero.")
    if missing := needed.keys() - found.keys():
        raise PolicyError(f"The policy of the units {units_text(policy.units):.100} lacks {min(missing)}.")
    if unknown := found.keys() - needed.keys():
        raise PolicyError(f"The policy holds {min(unknown):.60}, which is nothing of ours.")
    for name, shape in needed.items():
        if found[name].shape != shape:
            raise PolicyError(f"The policy's {name} has shape {list(found[name].shape)}; {list(shape)} was expected.")
        if not np.isfinite(found[name]).all():
            raise PolicyError(f"The policy's {name} holds NaN or infinity: the file or its training went wrong.")
        if name.startswith("bypass.") and np.abs(found[name]).max(initial=0) > LARGEST:
            raise PolicyError(f"The policy's {name} holds numbers over {LARGEST:.0f}, the largest of 16 bits.")


@dataclass(frozen=True)
class PolicyFacts:
    """Facts of the bundle's skip policy, as in a SkipPolicy; `bypass` is the form of its bypasses, `drafter` the origin
    of its drafter, empty where there is none.
    """

    units: tuple[Unit, ...]
    read: int
    origin: str
    has_network: bool
    bypass: str
    fingerprint: str
    static_order: tuple[int, ...] = ()
    drafter: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that may be skipped."""
        return tuple(layer for unit in self.units for layer in unit.layers)
