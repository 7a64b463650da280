"""`manifest.json`: what the model is, its graphs, its policy, the SHA-256 of every file; and what cannot be in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain

from dash_export.artifacts import FileRecord
from dash_export.decision import POLICY_KINDS, Unit, check_units
from dash_export.errors import BundleError, PolicyError

SCHEMA = 3
DAMAGED = "The bundle is damaged: export or build it again."
LARGEST_CONTEXT = 1 << 24
"""Positions; ten million are the most that are published."""
# Above any published model, so that an absurd manifest fails here instead of at an allocation.
_LARGEST = {
    "num_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 22,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "max_positions": LARGEST_CONTEXT,
    "parameters": 1 << 50,
}
_LARGEST_FILE = 1 << 50


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime must know of the model."""

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    parameters: int
    rms_norm_eps: float


@dataclass(frozen=True)
class PolicyFacts:
    """The skip policy in the bundle: the units it may skip, the layer whose input decides, whether there is a network,
    the form of the bypasses, and in which order static policies skip units (places in `units`; empty: not ranked).
    """

    units: tuple[Unit, ...]
    read: int
    origin: str
    has_network: bool
    bypass: str
    fingerprint: str
    static_order: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """All that may be skipped."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The policy kinds this bundle can serve; `static` without an order takes a list of layers only."""
        served = {"dense": True, "static": bool(self.units), "token": self.has_network}
        return tuple(kind for kind in POLICY_KINDS if served[kind])


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `graphs` maps a graph's name to its .onnx file; `files` lists every exported file with its hash,
    `builds` every target's `build.json`, which lists its engines: the one that is being written and the one before;
    `key` changes when anything an engine is made from
    does; `sha256` is of all the rest of the manifest (`sealed`).
    """

    schema: int
    model: ModelFacts
    policy: PolicyFacts
    graphs: dict[str, str]
    files: tuple[FileRecord, ...]
    key: str
    tools: dict[str, str] = field(default_factory=dict)
    builds: dict[str, tuple[FileRecord, ...]] = field(default_factory=dict)
    sha256: str = ""


def sealed(manifest: Manifest) -> Manifest:
    """The manifest with the hash of its contents."""
    contents = asdict(replace(manifest, sha256=""))
    return replace(manifest, sha256=hashlib.sha256(json.dumps(contents).encode()).hexdigest())


def check_sizes(sizes: Mapping[str, int], where: str) -> None:
    """Of files, in bytes: sizes that can be."""
    wrong = next((name for name, size in sizes.items() if not 0 <= size <= _LARGEST_FILE), None)
    if wrong is not None:
        raise BundleError(f"{where}: {wrong} cannot have {sizes[wrong]!r:.40} bytes. {DAMAGED}")


def check_manifest(manifest: Manifest, where: str) -> None:
    """Contents that are those that were written, sizes that can be, units that exist, and a graph for each."""
    model, policy = manifest.model, manifest.policy
    if sealed(manifest).sha256 != manifest.sha256:
        raise BundleError(f"{where} was changed or damaged after it was made (hash mismatch). {DAMAGED}")
    sizes = {name: getattr(model, name) for name in _LARGEST}
    wrong = [f"{name} = {size}" for name, size in sizes.items() if not 1 <= size <= _LARGEST[name]]
    if wrong:
        raise BundleError(f"{where}: {', '.join(wrong)} cannot be. {DAMAGED}")
    try:
        check_units(policy.units, policy.read, model.num_layers)
    except PolicyError as error:
        raise BundleError(f"{where}: {error} {DAMAGED}") from error
    order = policy.static_order
    if len(set(order)) != len(order) or not set(order) <= set(range(len(policy.units))):
        raise BundleError(f"{where}: the static order lists a unit that is not there, or one twice. {DAMAGED}")
    needed = {"embed", "head", *(f"layer_{layer:02d}" for layer in range(model.num_layers))}
    needed |= {unit.bypass for unit in policy.units} | ({"policy"} if policy.has_network else set())
    if needed - set(manifest.graphs):
        raise BundleError(f"{where}: there is no graph {min(needed - set(manifest.graphs))}. {DAMAGED}")
    check_sizes({record.name: record.bytes for record in (*manifest.files, *chain(*manifest.builds.values()))}, where)
    listed = {record.name for record in manifest.files if record.bytes > 0}
    unlisted = {*manifest.graphs.values(), "onnx/rope.data"} - listed
    if unlisted:
        raise BundleError(f"{where}: {min(unlisted)} is not among the files. {DAMAGED}")
