"""A skip policy: the units it may skip, the network that predicts damage, the bypasses; as a record and as a file.

One linear network reads one state, the input of layer `read`, and predicts the damage of all units (docs/method.md):

    damage[u] = softplus(RMSNorm(h[read]) . weight[:, u] + bias[u])

The bypass of a unit of layers a..b is one product of x = RMSNorm(h[a]) (unit gain), or of x = h[a] where the layers
read the state itself (`Traits.norms_after`):

    [update | K_a | V_a | K_a+1 | V_a+1 | ... | V_b] = x @ weight + bias

K is before its own norm and RoPE. K_a and V_a are the model's own projections of h[a], so a policy holds the other
columns only. A bypass without weights has no update, and K and V of each layer are that layer's projections of h[a].

On disk a policy is one `.safetensors` file (weights, and facts as JSON in its metadata), with a JSON card beside it
that says how it was made. Reading checks everything and needs no torch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.bundle.advice import shipped_policies
from dash_export.bundle.records import ModelFacts
from dash_export.core.decision import Unit, check_static_order, check_units, units_of, units_text
from dash_export.errors import PolicyError
from dash_export.files.artifacts import open_regular, read_bounded, write_atomic
from dash_export.files.replacing import check_movable, check_outside_bundles
from dash_export.files.resources import resource_folder
from dash_export.files.typed_json import WrongFieldError, typed

Float32Array = npt.NDArray[np.float32]

UNIT = 4
"""Layers of a unit by default."""
SCHEMA = 2
_MAX_HEADER = 1 << 20
"""Bytes of a file's header; the facts of a thousand units would have 50,000, and answers have 60,000."""
_ANSWERS = "answers"
METADATA = "dash_export_policy"
_LARGEST_CARD = 16 << 20
_FINAL_NORM = "model.final_norm"


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
    that model, as a .jsonl file (`text/chats.py`), on which a build calibrates its dial.
    """

    units: tuple[Unit, ...]
    read: int = 0
    network: Weights | None = None
    bypasses: tuple[Weights, ...] = ()
    origin: str = "none"
    static_order: tuple[int, ...] = ()
    final_norm: Float32Array | None = field(default=None, compare=False)
    answers: str = field(default="", compare=False)

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
    rng, hidden, count = np.random.default_rng(seed), spec.hidden_size, len(policy.units)
    weight = (rng.standard_normal((hidden, count)) * 1.5 * hidden**-0.5).astype(np.float32)
    network = {"weight": weight, "bias": np.full(count, -2.0, np.float32)}
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
    if network is not None:
        network = {"weight": np.ascontiguousarray(network["weight"][:, kept]), "bias": network["bias"][list(kept)]}
    return replace(
        policy,
        units=tuple(policy.units[place] for place in kept),
        network=network if kept else None,
        bypasses=tuple(policy.bypasses[place] for place in kept),
        static_order=tuple(kept.index(place) for place in policy.static_order if place in kept),
    )


def key_value_size(spec: ModelFacts) -> int:
    """Return the number of columns of one layer's K, or V."""
    return spec.num_kv_heads * spec.head_dim


def stored_columns(unit: Unit, spec: ModelFacts) -> int:
    """Return how many columns of a bypass a policy holds: the update's, then K and V of each layer but the first."""
    return spec.hidden_size + 2 * key_value_size(spec) * (len(unit.layers) - 1)


def check_policy(policy: SkipPolicy, spec: ModelFacts) -> None:
    """Raise PolicyError when the policy is not one for a model of this shape, or holds a weight that is not finite."""
    check_units(policy.units, policy.read, spec.num_layers)
    check_static_order(policy.static_order, policy.units)
    if len(policy.bypasses) != len(policy.units):
        raise PolicyError(f"There are {len(policy.bypasses)} bypasses for {len(policy.units)} units.")
    hidden, found = spec.hidden_size, policy.weights()
    needed: dict[str, tuple[int, ...]] = {}
    if policy.network is not None:
        needed |= {"network.weight": (hidden, len(policy.units)), "network.bias": (len(policy.units),)}
    for unit, bypass in zip(policy.units, policy.bypasses, strict=True):
        if bypass:
            columns, prefix = stored_columns(unit, spec), f"bypass.{unit.name}."
            needed |= {f"{prefix}weight": (hidden, columns), f"{prefix}bias": (columns,)}
    if policy.final_norm is not None:
        found[_FINAL_NORM], needed[_FINAL_NORM] = policy.final_norm, (hidden,)
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
class _Facts:
    """Metadata of a policy file: the model that the policy is for, and all of the policy that is not a tensor."""

    schema: int
    model_type: str
    num_layers: int
    hidden_size: int
    units: tuple[Unit, ...]
    read: int
    origin: str
    static_order: tuple[int, ...] = ()


def card_path(path: str | Path) -> Path:
    """Return the path of a policy's card: `NAME.safetensors` -> `NAME.json`."""
    return Path(path).with_suffix(".json")


def policy_path(given: str | Path) -> Path:
    """Return the file, or else the policy of that name that comes with this package. Raises PolicyError."""
    folder, path = resource_folder("calibration"), Path(given)
    shipped = shipped_policies()
    if path.is_file():
        return path
    if str(given) in shipped:
        return folder / f"{given}.safetensors"
    raise PolicyError(
        f"There is no policy file {path}. Give the .safetensors file that `dash-export train` wrote, or the name of "
        f"one that comes with this package: {', '.join(shipped)} (`export` and `build` also take none and untrained)."
    )


def check_replaceable(path: Path) -> None:
    """Raise PolicyError for a name that is not NAME.safetensors, and where `save_policy` would write over something
    that is no policy and no card; OutputError for a link or a mount point, and inside bundles.
    """
    if path.suffix != ".safetensors":
        raise PolicyError(f"A policy file is called NAME.safetensors, not {path.name}.")
    check_outside_bundles(path)
    card, is_ours = card_path(path), True
    for one in (path, card):
        check_movable(one)
    try:
        if path.exists():
            _facts(_opened(path)[0])
        if card.exists():
            known = json.loads(read_bounded(card, _LARGEST_CARD))
            is_ours = isinstance(known, dict) and {"kind", "units", "settings"} <= known.keys()
    except (PolicyError, OSError, ValueError, RecursionError):
        is_ours = False
    if not is_ours:
        raise PolicyError(
            f"{path} or {card.name} beside it exists and is no skip policy: it will not be overwritten. Choose another "
            "output (-o) or remove it."
        )


def save_policy(path: str | Path, policy: SkipPolicy, spec: ModelFacts, card: Mapping[str, Any]) -> None:
    """Write the policy to `path` (`.safetensors`) and its card (JSON) beside it, each whole or not at all. Raises
    PolicyError for a policy that does not fit `spec`, a name that is not `.safetensors`, and where something that is no
    policy lies there; OutputError for a link and inside bundles.
    """
    import safetensors.numpy

    path = Path(path)
    check_policy(policy, spec)
    model = (spec.model_type, spec.num_layers, spec.hidden_size)
    facts = _Facts(SCHEMA, *model, policy.units, policy.read, policy.origin, policy.static_order)
    text = json.dumps(card, indent=1, allow_nan=False) + "\n"
    norm = {} if policy.final_norm is None else {_FINAL_NORM: policy.final_norm}
    tensors = {name: _stored(array) for name, array in (policy.weights() | norm).items()}
    metadata = {METADATA: json.dumps(asdict(facts))} | ({_ANSWERS: policy.answers} if policy.answers else {})
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, safetensors.numpy.save(tensors, metadata))
    write_atomic(card_path(path), text)


def _stored(array: Float32Array) -> npt.NDArray[np.float16 | np.float32]:
    """Return the array in float16 where that holds all of its numbers exactly, else in float32."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array, np.float16)
    return half if np.array_equal(half, array) else np.ascontiguousarray(array, np.float32)


def load_policy(path: str | Path, spec: ModelFacts) -> SkipPolicy:
    """Load the policy in `path` (or of that name, `policy_path`) for the model that `spec` describes. Raises
    PolicyError when there is no such file, when it is damaged or no policy, or when it is for another model.
    """
    path = policy_path(path)
    try:
        metadata, tensors = _opened(path)
        facts = _facts(metadata)
        known, given = (f"a {of.model_type:.40} of {of.num_layers} layers and hidden size {of.hidden_size}"
                        for of in (facts, spec))  # fmt: skip
        if known != given:
            raise PolicyError(f"it is the policy of {known}; this model is {given}")
        norm, homes = tensors.pop(_FINAL_NORM, None), defaultdict[str, dict[str, Float32Array]](dict)
        for name, array in tensors.items():
            home, _, own = name.rpartition(".")
            homes[home][own] = array
        network = homes.pop("network", None)
        bypasses = tuple(homes.pop(f"bypass.{unit.name}", {}) for unit in facts.units)
        if foreign := [f"{home}.{own}" for home, found in homes.items() for own in found]:
            raise PolicyError(f"it holds a tensor {min(foreign)!r:.60}, which is nothing of ours")
        rest = (facts.origin, facts.static_order, norm, metadata.get(_ANSWERS, ""))
        policy = SkipPolicy(facts.units, facts.read, network, bypasses, *rest)
        check_policy(policy, spec)
    except PolicyError as error:
        wrong = str(error).rstrip(".")
        advice = "Use the file as `dash-export train` wrote it, or train one for this model."
        raise PolicyError(f"{path}: {wrong}. {advice}") from error
    return policy


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Float32Array]]:
    """Return the metadata and the tensors, as float32, of a policy file. Raises PolicyError."""
    import safetensors

    try:
        with open_regular(path) as begin:
            if (header := int.from_bytes(begin.read(8), "little")) > _MAX_HEADER:
                raise ValueError(f"its header has {header} bytes; at most {_MAX_HEADER} are read")
        with safetensors.safe_open(str(path), framework="np") as file, np.errstate(all="ignore"):
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            if odd := [name for name, array in found.items() if array.dtype not in (np.float16, np.float32)]:
                raise ValueError(f"{odd[0]!r:.60} has the dtype {found[odd[0]].dtype}; float16 or float32 is expected")
            return dict(file.metadata() or {}), {name: array.astype(np.float32) for name, array in found.items()}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise PolicyError(f"it is not a sound safetensors file (truncated or damaged?): {error!s:.300}") from error


def _facts(metadata: Mapping[str, str]) -> _Facts:
    if METADATA not in metadata:
        raise PolicyError("this safetensors file holds no skip policy (its metadata does not say so)")
    try:
        data = json.loads(metadata[METADATA])
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:
            remedy = "upgrade: pip install -U dash-export" if schema > SCHEMA else "train it anew: dash-export train"
            raise PolicyError(f"it is of schema {schema}, and this dash-export reads {SCHEMA}: {remedy}")
        return typed(_Facts, data, "its metadata")
    except WrongFieldError as error:
        raise PolicyError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"the facts in its metadata are not JSON ({error})") from error
