"""A trained skip policy on disk: one `.safetensors` file (weights, and facts as JSON in its metadata) and a JSON card
beside it that says how the policy was made. Reading trusts nothing and needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import read_bounded, write_atomic
from dash_export.decision import Unit
from dash_export.errors import CheckpointError, PolicyError
from dash_export.models.files import require
from dash_export.models.safetensors_files import check_dtype, open_weights, read_metadata
from dash_export.models.spec import DecoderSpec, Float32Array
from dash_export.outputs import check_place
from dash_export.resources import resource_folder
from dash_export.skip_policy import Bypass, SkipPolicy, check_policy
from dash_export.typed_json import WrongFieldError, typed

SCHEMA = 2
METADATA = "dash_export_policy"
_LONGEST_ORIGIN = 200
_LARGEST_CARD = 16 << 20
_FINAL_NORM = "model.final_norm"


@dataclass(frozen=True)
class PolicyFileFacts:
    """What the metadata says: for which model the policy is, and all of it that is not a tensor."""

    schema: int
    model_type: str
    num_layers: int
    hidden_size: int
    units: tuple[Unit, ...]
    read: int
    origin: str
    static_order: tuple[int, ...] = ()


def card_path(path: str | Path) -> Path:
    """`NAME.safetensors` -> `NAME.json`."""
    return Path(path).with_suffix(".json")


def check_replaceable(path: Path) -> None:
    """Raises PolicyError where `save_policy` would write over something that is no policy and no card, or a link, and
    OutputError for a mount point.
    """
    _refuse_links(path)
    card, is_card = card_path(path), True
    for one in (path, card):
        check_place(one, [""])
    try:
        if path.exists():
            _facts(path)
        if card.exists():
            known = json.loads(read_bounded(card, _LARGEST_CARD))
            is_card = isinstance(known, dict) and {"kind", "units", "settings"} <= known.keys()
    except (CheckpointError, WrongFieldError, PolicyError, OSError, ValueError, RecursionError):
        is_card = False
    if not is_card:
        raise PolicyError(
            f"{path} or {card.name} beside it exists and is no skip policy: it will not be overwritten. Choose another "
            "output (-o) or remove it."
        )


def _refuse_links(path: Path) -> None:
    link = next((one for one in (path, card_path(path)) if one.is_symlink()), None)
    if link is not None:
        raise PolicyError(f"{link} is a link, which is not replaced: remove it, or choose another output (-o).")


def save_policy(path: str | Path, policy: SkipPolicy, spec: DecoderSpec, card: Mapping[str, Any]) -> None:
    """Write the policy to `path` (`.safetensors`) and its card beside it, each whole or not at all.

    `card` is JSON: data, seed, versions, figures. Raises PolicyError for a policy that does not fit `spec` or a name
    that is not `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise PolicyError(f"A policy file is called NAME.safetensors, not {path.name}.")
    check_policy(policy, spec)
    facts = PolicyFileFacts(
        SCHEMA,
        spec.model_type,
        spec.num_layers,
        spec.hidden_size,
        policy.units,
        policy.read,
        policy.origin,
        policy.static_order,
    )
    text = json.dumps(card, indent=1, allow_nan=False) + "\n"
    norm = {} if policy.final_norm is None else {_FINAL_NORM: policy.final_norm}
    tensors = {name: _stored(array) for name, array in (policy.weights() | norm).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_links(path)  # both, before one is written
    write_atomic(path, require("safetensors.numpy").save(tensors, {METADATA: json.dumps(asdict(facts))}))
    write_atomic(card_path(path), text)


def _stored(array: Float32Array) -> npt.NDArray[np.float16 | np.float32]:
    """In 16 bits where they hold all of it."""
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(array, np.float16)
    return half if np.array_equal(half, array) else np.ascontiguousarray(array, np.float32)


def policy_path(given: str | Path) -> Path:
    """The file, or else the policy of that name that comes with this package. Raises PolicyError."""
    folder, path = resource_folder("calibration"), Path(given)
    shipped = sorted(file.stem for file in folder.glob("*.safetensors"))
    if path.is_file():
        return path
    if str(given) in shipped:
        return folder / f"{given}.safetensors"
    raise PolicyError(
        f"There is no policy file {path}. Give the .safetensors file that `dash-export train` wrote, or the name of "
        f"one that comes with this package: {', '.join(shipped)} (`export` and `build` also take none and untrained)."
    )


def load_policy(path: str | Path, spec: DecoderSpec) -> SkipPolicy:
    """The policy in `path` (or of that name, `policy_path`), for the model `spec` describes.

    Raises PolicyError when there is no such file, when it is damaged or no policy, when it is for another model, or
    when a weight is missing, unknown, misshapen, NaN or infinite.
    """
    path = policy_path(path)
    try:
        facts = _facts(path)
        _check_model(path, facts, spec)
        policy = _read(path, facts)
        check_policy(policy, spec)
    except (CheckpointError, WrongFieldError, PolicyError) as error:
        message = str(error)
        where = "" if str(path) in message else f"{path}: "
        raise PolicyError(
            f"{where}{message.rstrip('.')}. Use the file as `dash-export train` wrote it, or train one for this model."
        ) from error
    return policy


def _facts(path: Path) -> PolicyFileFacts:
    text = read_metadata(path).get(METADATA)
    if text is None:
        raise PolicyError("this safetensors file holds no skip policy (its metadata does not say so)")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"the facts in its metadata are not JSON ({error})") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise PolicyError(
            f"it was written by a newer dash-export (schema {schema}, this one reads {SCHEMA}): "
            "upgrade with pip install -U dash-export"
        )
    if isinstance(schema, int) and schema < SCHEMA:
        raise PolicyError("it is of the time when layers were skipped one by one: train it anew (dash-export train)")
    facts = typed(PolicyFileFacts, data, "its metadata")
    if len(facts.origin) > _LONGEST_ORIGIN:
        raise PolicyError(f"its origin must be one line of at most {_LONGEST_ORIGIN} letters")
    return facts


def _check_model(path: Path, facts: PolicyFileFacts, spec: DecoderSpec) -> None:
    def shape(model: PolicyFileFacts | DecoderSpec) -> str:
        return f"a {model.model_type:.40} of {model.num_layers} layers and hidden size {model.hidden_size}"

    if shape(facts) != shape(spec):
        raise PolicyError(f"{path} is the policy of {shape(facts)}; this model is {shape(spec)}")


def _read(path: Path, facts: PolicyFileFacts) -> SkipPolicy:
    network: dict[str, Float32Array] = {}
    bypasses: dict[str, dict[str, Float32Array]] = {unit.name: {} for unit in facts.units}
    norm: Float32Array | None = None
    for name, weight in open_weights([path]).items():
        part, _, rest = name.partition(".")
        unit, _, own = rest.partition(".")
        if not (part == "network" or (part == "bypass" and unit in bypasses) or name == _FINAL_NORM):
            raise PolicyError(f"it holds a tensor {name!r:.60}, which is nothing of ours")
        check_dtype(weight)
        if not weight.shape or 0 in weight.shape:
            raise PolicyError(f"its tensor {name!r:.60} is a single number or empty")
        array = weight.read_rows(0, weight.shape[0])
        if part == "network":
            network[rest] = array
        elif part == "bypass":
            bypasses[unit][own] = array
        else:
            norm = array
    return SkipPolicy(
        facts.units,
        facts.read,
        network or None,
        tuple(Bypass(weights) for weights in bypasses.values()),
        facts.origin,
        facts.static_order,
        norm,
    )
