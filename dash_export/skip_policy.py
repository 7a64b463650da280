"""A skip policy as data: which layers it may skip, the network that predicts damage, the compensation. No framework
needed.

The network of a gated layer reads the state one layer earlier (docs/method.md: "one layer ahead"): r = l - 1. It is
linear, or has one hidden layer; with or without the last two actions:

    damage[l] = softplus(RMSNorm(h[r]) . w_state [+ [a[l-2], a[l-1]] . w_actions] + b)
    damage[l] = softplus(w_out . relu(RMSNorm(h[r]) @ W_state [+ [a[l-2], a[l-1]] @ W_actions] + b) + b_out)

A linear one that reads no actions may read an earlier state, the same one for several layers: then these are decided
at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from dash_export.decision import check_reads, decision_points, spans
from dash_export.errors import PolicyError
from dash_export.models.spec import FINAL_NORM, Checkpoint, DecoderSpec, Float32Array

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

    @property
    def rank(self) -> int:
        """0 where it has none."""
        return int(self.weights["down"].shape[-1]) if "down" in self.weights else 0

    def in_half(self) -> Compensation:
        """Rounded to what 16 bits hold: engines have 8, and a file of it half the size."""
        return Compensation(
            self.kind, {name: array.astype(np.float16).astype(np.float32) for name, array in self.weights.items()}
        )


@dataclass(frozen=True)
class SkipPolicy:
    """Gated layers, damage network and compensation of one model.

    `network` is None for a bundle without a token policy; otherwise it holds, stacked over the gated layers, `state`
    [gated, hidden, width], `bias` [gated, width], `actions` [gated, 2, width] where it reads them, and `out` [gated,
    width] and `out_bias` [gated] where it has a hidden layer (without, the width is 1), all float32. `static_order` and
    `cosine_order` are gated layers in the order in which a static policy of 1, 2, 3 ... layers skips them: greedily by
    KL, and by the cosine similarity of a layer's input and output (ShortGPT, arXiv 2403.03853); empty where nobody
    ranked them. `reads`: per gated layer the layer whose input its network reads; empty is one layer ahead.
    `final_norm` [hidden]: the gain of the final norm of the model it was trained with, by which another model of the
    same shape is told apart; None in what was not trained, or by an earlier version.
    """

    gated: tuple[int, ...]
    network: Mapping[str, Float32Array] | None = None
    compensation: Compensation = Compensation()
    origin: str = "none"
    static_order: tuple[int, ...] = ()
    cosine_order: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    final_norm: Float32Array | None = field(default=None, compare=False)

    @property
    def decision_points(self) -> dict[int, tuple[int, ...]]:
        """The layer whose input is read -> the gated layers that are decided there."""
        return decision_points(self.gated, self.reads)

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


def narrowed(policy: SkipPolicy, gated: Iterable[int]) -> SkipPolicy:
    """The same policy with fewer layers that may be skipped. Raises PolicyError for a layer that it does not gate."""
    layers = tuple(sorted(set(gated)))
    wrong = sorted(set(layers) - set(policy.gated))
    if wrong:
        raise PolicyError(
            f"The policy knows nothing about skipping layers {spans(wrong)}. Its gated layers: {spans(policy.gated)}."
        )
    rows = [policy.gated.index(layer) for layer in layers]

    def kept(weights: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
        return {name: stacked[rows] for name, stacked in weights.items()}

    return replace(
        policy,
        gated=layers,
        network=None if policy.network is None else kept(policy.network),
        compensation=replace(policy.compensation, weights=kept(policy.compensation.weights)),
        static_order=tuple(layer for layer in policy.static_order if layer in layers),
        cosine_order=tuple(layer for layer in policy.cosine_order if layer in layers),
        reads=tuple(policy.reads[row] for row in rows) if policy.reads else (),
    )


def default_gated(num_layers: int, essential: Iterable[int] = ()) -> tuple[int, ...]:
    """All layers but the first two, the last and those calibration finds essential."""
    kept = {0, 1, num_layers - 1} | set(essential)
    return tuple(layer for layer in range(num_layers) if layer not in kept)


def all_at_once(gated: tuple[int, ...]) -> tuple[int, ...]:
    """`reads` of a policy that decides about all layers from one state: what enters the layer before the first."""
    return (gated[0] - 1,) * len(gated)


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


def check_policy(policy: SkipPolicy, spec: DecoderSpec) -> None:
    """Raises PolicyError when the policy is not one for a model of this shape, or holds a weight that is not finite."""
    if policy.gated != check_gated(policy.gated, spec.num_layers):
        raise PolicyError("Gated layers must be in rising order, each once.")
    for name in ("static_order", "cosine_order"):
        order = getattr(policy, name)
        if len(set(order)) != len(order) or not set(order) <= set(policy.gated):
            raise PolicyError(f"{name} must list gated layers, each at most once; got {list(order)}.")
    check_reads(policy.gated, policy.reads)
    if policy.reads and policy.network is None:
        raise PolicyError("A policy without a network reads no state.")
    if policy.reads and (policy.width or policy.reads_actions):
        raise PolicyError("Only a linear network that reads no actions decides by an earlier state.")
    kind = policy.compensation.kind
    if kind not in COMPENSATIONS:
        raise PolicyError(f"There is no compensation {kind!r}. Known: {', '.join(COMPENSATIONS)}.")
    found = policy.weights()
    needed = _weight_shapes(policy, spec.hidden_size)
    if set(found) != set(needed):
        missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
        what = f"lacks {missing[0]}" if missing else f"holds {unknown[0]:.60}, which is nothing of ours"
        raise PolicyError(f"The policy (compensation {kind!r}) {what}.")
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


def _weight_shapes(policy: SkipPolicy, hidden: int) -> dict[str, tuple[int, ...]]:
    """Every weight the policy must have. Width and rank are what its own `bias` and `down` say."""
    count, shapes = len(policy.gated), {}
    if policy.network is not None:
        bias = policy.network.get("bias")
        hidden_layer = "out" in policy.network or "out_bias" in policy.network
        width = bias.shape[1] if hidden_layer and bias is not None and bias.ndim == 2 else 1
        shapes = {"network.state": (count, hidden, width), "network.bias": (count, width)}
        if "actions" in policy.network:
            shapes["network.actions"] = (count, HISTORY, width)
        if hidden_layer:
            shapes |= {"network.out": (count, width), "network.out_bias": (count,)}
    if policy.compensation.kind == "scale":
        shapes |= {"compensation.factor": (count,)}
    elif policy.compensation.kind == "low_rank":
        down = policy.compensation.weights.get("down")
        rank = down.shape[2] if down is not None and down.ndim == 3 else 0
        shapes |= {"compensation.down": (count, hidden, rank), "compensation.up": (count, rank, hidden)}
    return shapes


def no_policy(num_layers: int, gated: Iterable[int] | None = None) -> SkipPolicy:
    """Skip graphs without a network: the bundle then serves `dense`, `static` and `random`."""
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
