"""Policy files: a policy is one `.safetensors` file (weights, and facts as JSON in its metadata), with a JSON card
beside it that says how it was made. Reading checks everything and needs no torch.

A drafter's tensors are `drafter.NAME`: a matrix as int8 codes [out, in] with float16 `drafter.NAME.scales`
(`core/drafter.py`), a vector as other tensors, and the ids of its short vocabulary as int32 `drafter.tokens`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.bundle.layout import check_outside_bundles
from dash_export.core.advice import shipped_policies
from dash_export.core.drafter import Drafter, from_codes, in_codes
from dash_export.core.facts import ModelFacts
from dash_export.core.policy import FINAL_NORM, Float32Array, SkipPolicy, check_policy
from dash_export.core.units import Unit
from dash_export.errors import PolicyError
from dash_export.files.artifacts import open_regular, read_bounded, write_atomic
from dash_export.files.replacing import check_movable
from dash_export.files.resources import resource_folder
from dash_export.files.typed_json import WrongFieldError, typed

SCHEMA, WITHOUT_DRAFTER = 3, 2
"""Of a file with a drafter, and of one that versions before drafters read, too."""
_MAX_HEADER = 1 << 20
"""Bytes of a file's header; the facts of a thousand units would have 50,000, and answers have 60,000."""
_ANSWERS = "answers"
METADATA = "dash_export_policy"
_DRAFTER, _SCALES, _TOKENS = "drafter.", ".scales", "tokens"
Tensors = dict[str, npt.NDArray[Any]]
_LARGEST_CARD = 16 << 20


@dataclass(frozen=True)
class _DrafterFacts:
    """All of a drafter that is not a tensor."""

    slope: float
    offset: float
    origin: str


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
    drafter: _DrafterFacts | None = None


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
    facts = _Facts(WITHOUT_DRAFTER, *model, policy.units, policy.read, policy.origin, policy.static_order)
    text = json.dumps(card, indent=1, allow_nan=False) + "\n"
    norm = {} if policy.final_norm is None else {FINAL_NORM: policy.final_norm}
    tensors: Tensors = {name: _stored(array) for name, array in (policy.weights() | norm).items()}
    if (drafter := policy.drafter) is not None:
        facts = replace(facts, schema=SCHEMA, drafter=_DrafterFacts(drafter.slope, drafter.offset, drafter.origin))
        tensors |= _drafter_tensors(drafter)
    known = {name: value for name, value in asdict(facts).items() if value is not None}
    metadata = {METADATA: json.dumps(known)} | ({_ANSWERS: policy.answers} if policy.answers else {})
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, safetensors.numpy.save(tensors, metadata))
    write_atomic(card_path(path), text)


def _stored(array: Float32Array) -> npt.NDArray[np.float16 | np.float32]:
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array, np.float16)
    return half if np.array_equal(half, array) else np.ascontiguousarray(array, np.float32)


def _drafter_tensors(drafter: Drafter) -> Tensors:
    found: Tensors = {_DRAFTER + _TOKENS: drafter.tokens.astype(np.int32)}
    for name, array in drafter.weights.items():
        if array.ndim == 2:
            found[_DRAFTER + name], found[_DRAFTER + name + _SCALES] = in_codes(array)
        else:
            found[_DRAFTER + name] = _stored(array)
    return found


def _drafter(found: Tensors, facts: _DrafterFacts) -> Drafter:
    """Return the drafter of these tensors, named without prefix. Raises PolicyError for codes without scales."""
    tokens, codes = found.pop(_TOKENS, np.zeros(0, np.int32)), {n for n, each in found.items() if each.dtype == np.int8}
    if lost := {name + _SCALES for name in codes} ^ {name for name in found if name.endswith(_SCALES)}:
        raise PolicyError(f"{_DRAFTER}{min(lost)} is missing, or the codes that it scales are")
    weights = {name: from_codes(found[name], found.pop(name + _SCALES)) for name in codes}
    weights |= {name: array for name, array in found.items() if name not in codes}
    if tokens.dtype != np.int32 or any(array.dtype != np.float32 for array in weights.values()):
        raise PolicyError("its drafter's tokens must be int32, and its weights int8 codes or floats")
    return Drafter(weights, tokens.astype(np.int64), facts.slope, facts.offset, facts.origin)


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
        drafts = {name.removeprefix(_DRAFTER): tensors.pop(name) for name in [*tensors] if name.startswith(_DRAFTER)}
        if drafts and facts.drafter is None:
            raise PolicyError("it holds tensors of a drafter, of which its metadata says nothing")
        drafter = None if facts.drafter is None else _drafter(drafts, facts.drafter)
        norm, homes = tensors.pop(FINAL_NORM, None), defaultdict[str, dict[str, Float32Array]](dict)
        for name, array in tensors.items():
            # "network.early.weight" is "early.weight" of the network; a bypass has the name of its unit, too.
            *home, own = name.split(".", 2 if name.startswith("bypass.") else 1)
            homes[".".join(home)][own] = array
        network = homes.pop("network", None)
        bypasses = tuple(homes.pop(f"bypass.{unit.name}", {}) for unit in facts.units)
        if foreign := [f"{home}.{own}" for home, found in homes.items() for own in found]:
            raise PolicyError(f"it holds a tensor {min(foreign)!r:.60}, which is nothing of ours")
        rest = (facts.origin, facts.static_order, norm, metadata.get(_ANSWERS, ""), drafter)
        policy = SkipPolicy(facts.units, facts.read, network, bypasses, *rest)
        check_policy(policy, spec)
    except PolicyError as error:
        wrong = str(error).rstrip(".")
        advice = "Use the file as `dash-export train` wrote it, or train one for this model."
        raise PolicyError(f"{path}: {wrong}. {advice}") from error
    return policy


def _opened(path: Path) -> tuple[dict[str, str], Tensors]:
    """Return the metadata and the tensors: as float32, but for a drafter's integers. Raises PolicyError."""
    import safetensors

    try:
        with open_regular(path) as begin:
            if (header := int.from_bytes(begin.read(8), "little")) > _MAX_HEADER:
                raise ValueError(f"its header has {header} bytes; at most {_MAX_HEADER} are read")
        with safetensors.safe_open(str(path), framework="np") as file, np.errstate(all="ignore"):
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            for name, array in found.items():
                if array.dtype in (np.float16, np.float32):
                    found[name] = array.astype(np.float32)
                elif not (name.startswith(_DRAFTER) and array.dtype in (np.int8, np.int32)):
                    raise ValueError(f"{name!r:.60} has the dtype {array.dtype}; float16 or float32 is expected")
            return dict(file.metadata() or {}), found
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise PolicyError(f"it is not a sound safetensors file (truncated or damaged?): {error!s:.300}") from error


def _facts(metadata: Mapping[str, str]) -> _Facts:
    if METADATA not in metadata:
        raise PolicyError("this safetensors file holds no skip policy (its metadata does not say so)")
    try:
        data = json.loads(metadata[METADATA])
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema not in (SCHEMA, WITHOUT_DRAFTER):
            remedy = "upgrade: pip install -U dash-export" if schema > SCHEMA else "train it anew: dash-export train"
            raise PolicyError(f"it is of schema {schema}, and this dash-export reads {SCHEMA}: {remedy}")
        return typed(_Facts, data, "its metadata")
    except WrongFieldError as error:
        raise PolicyError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"the facts in its metadata are not JSON ({error})") from error
