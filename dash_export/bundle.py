"""The artifact on disk: layout, manifest, build record, verification. What is loaded from it is never trusted blindly.

smollm2.dash/
  manifest.json                 what the model is, its graphs, its policy, SHA-256 of every file
  config.json tokenizer.json .. as a Hugging Face folder has them
  onnx/*.onnx, *.data           the portable graphs
  engines/<target>/build.json   what `build` made for a target: engines, segments, cost table, SHA-256 of every file
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dash_export.artifacts import FileRecord, sha256_file
from dash_export.decision import DIALLED_KINDS, POLICY_KINDS, DialPoint, check_reads, decision_points
from dash_export.errors import BundleError, NewerBundleError, PolicyError, StaleBuildError
from dash_export.targets import build_options
from dash_export.typed_json import WrongFieldError, typed

SCHEMA = 1
# Above any published model, so that an absurd manifest fails here instead of at an allocation.
_LARGEST = {
    "num_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 22,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "max_positions": 1 << 24,
}
MANIFEST = "manifest.json"
BUILD = "build.json"
_DAMAGED = "The bundle is damaged: export or build it again."


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
    """The skip policy in the bundle: which layers it may skip, whether there is a network, what compensates a skip, in
    which order static policies skip layers (empty: not ranked), and the layer whose input each decision reads (empty:
    one layer ahead).
    """

    gated: tuple[int, ...]
    origin: str
    has_network: bool
    compensation: str
    fingerprint: str
    static_order: tuple[int, ...] = ()
    cosine_order: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()

    @property
    def decision_points(self) -> dict[int, tuple[int, ...]]:
        """The layer whose input is read -> the gated layers that are decided there; empty without a network."""
        return decision_points(self.gated, self.reads) if self.has_network else {}

    def read_in(self, segment: Segment) -> int | None:
        """The layer of a segment whose input decides about later ones."""
        return next((layer for layer in segment.layers if layer in self.decision_points), None)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The policy kinds this bundle can serve; `static` without an order takes a list of layers only."""
        served = {
            "dense": True,
            "static": bool(self.gated),
            "cosine": bool(self.cosine_order),
            "random": bool(self.gated),
            "sequence": self.has_network,
            "token": self.has_network,
        }
        return tuple(kind for kind in POLICY_KINDS if served[kind])


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `graphs` maps a graph's name to its .onnx file; `files` lists every file with its hash; `key`
    changes when
    anything an engine is made from does."""

    schema: int
    model: ModelFacts
    policy: PolicyFacts
    graphs: dict[str, str]
    files: tuple[FileRecord, ...]
    key: str
    tools: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """Layers [first, last] compiled as one engine; `embed` and `head` say whether it begins or ends the model.

    An empty range (first = last + 1) is the embedding or the head alone.
    """

    first: int
    last: int
    embed: bool
    head: bool
    gated: bool

    @classmethod
    def whole(cls, num_layers: int) -> Segment:
        """The model as one engine."""
        return cls(0, num_layers - 1, True, True, False)

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def name(self) -> str:
        if self.first > self.last:
            return "embed" if self.embed else "head"
        return f"layer_{self.first:02d}" if self.first == self.last else f"layers_{self.first:02d}-{self.last:02d}"


@dataclass(frozen=True)
class Stretch:
    """Consecutive gated layers [first, last] compiled as one more engine: one launch where all of them run, or all
    are skipped.
    """

    first: int
    last: int
    skips: bool

    @property
    def segment(self) -> Segment:
        """Its layers as one segment."""
        return Segment(self.first, self.last, False, False, True)

    @property
    def layers(self) -> range:
        return self.segment.layers

    @property
    def name(self) -> str:
        return f"{'skips' if self.skips else 'layers'}_{self.first:02d}-{self.last:02d}"


@dataclass(frozen=True)
class EngineRecord:
    """One compiled engine: its file (relative to the bundle), the size of everything it maps in bytes, and how long it
    took to make.
    """

    file: str
    bytes: int
    key: str
    seconds: float = 0.0


@dataclass(frozen=True)
class CostTable:
    """Measured on the device that built: medians in microseconds at `context` cached tokens.

    `cost[l]` is (run - skip) of gated layer l as a fraction of `dense_us`, the dense time of one token; layers of
    identical shape share one. `launch`: what one launch more takes, as such a fraction, where a build has stretches; a
    dense token takes as few as can be.
    """

    context: int
    dense_us: float
    segment_us: dict[str, float]
    skip_us: dict[str, float]
    cost: dict[int, float]
    device: str
    launch: float = 0.0


@dataclass(frozen=True)
class Build:
    """`engines/<target>/build.json`. `dial` has one calibrated table per policy kind with a trade-off; `policy_bias` is
    per gated layer, where the engines give a linear policy's score before its bias; `details` holds what only this kind
    of backend has to say (compiler flags).
    """

    schema: int
    target: str
    bundle_key: str
    recipe: dict[str, Any]
    backend: str
    backend_version: str
    device: str
    segments: tuple[Segment, ...]
    engines: dict[str, EngineRecord]
    files: tuple[FileRecord, ...]
    cost: CostTable
    dial: dict[str, tuple[DialPoint, ...]] = field(default_factory=dict)
    policy_bias: dict[int, float] = field(default_factory=dict)
    stretches: tuple[Stretch, ...] = ()
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


_T = TypeVar("_T")


def from_json(kind: type[_T], data: Any, where: str) -> _T:
    """JSON -> frozen dataclass, checked field by field. Raises BundleError that names the field."""
    try:
        return typed(kind, data, where)
    except WrongFieldError as error:
        raise BundleError(f"{error} {_DAMAGED}") from error


def to_json(record: Any) -> str:
    return json.dumps(asdict(record), indent=1, sort_keys=False) + "\n"


def safe_path(root: Path, relative: str) -> Path:
    """A path inside the bundle. Raises BundleError for one that leaves it, by `..`, an absolute name or a link."""
    pure = PurePosixPath(relative)
    path = root / pure
    try:
        inside = path != root and path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a loop of links
        inside = False
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not inside:
        raise BundleError(
            f"{root.name}: the path {relative!r} leaves the bundle. Do not use this bundle; export the model again."
        )
    return path


class Bundle:
    """A verified bundle. Opening checks the manifest; `verify` checks the files that are about to be used."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | Path) -> Bundle:
        """Read and check `manifest.json`. Raises BundleError when it is missing, damaged, unsafe or from a newer
        program.
        """
        root = Path(root)
        root = root if root.name else root.absolute()  # "." has none, and messages and kits take the bundle's
        data = _read_json(root, MANIFEST, _no_bundle(root))
        _refuse_newer(data, root)
        manifest = from_json(Manifest, data, f"{root.name}/{MANIFEST}")
        for name in [*manifest.graphs.values(), *(record.name for record in manifest.files)]:
            safe_path(root, name)
        _check_manifest(manifest, f"{root.name}/{MANIFEST}")
        return cls(root, manifest)

    def path(self, relative: str) -> Path:
        return safe_path(self.root, relative)

    def graph(self, name: str) -> Path:
        return self.path(self.manifest.graphs[name])

    def targets(self) -> list[str]:
        """The targets this bundle has finished builds for."""
        return sorted(path.parent.name for path in self.root.glob(f"engines/*/{BUILD}"))

    def load_build(self, target: str) -> Build:
        """Read `build.json` of a target. Raises BundleError when there is none or it is of an earlier export."""
        folder = f"engines/{target}"
        self.path(folder)
        if not self.path(f"{folder}/{BUILD}").is_file():
            built = ", ".join(self.targets()) or "none yet"
            state = "is unfinished" if self.path(folder).is_dir() else "does not exist"
            raise BundleError(
                f"{self.root}: the build for target {target!r} {state} (built: {built}). "
                f"Run: {self.build_command(target)}"
            )
        data = _read_json(self.root, f"{folder}/{BUILD}", "")
        _refuse_newer(data, self.root)
        build = from_json(Build, data, f"{self.root.name}/{folder}/{BUILD}")
        for name in [*(engine.file for engine in build.engines.values()), *(record.name for record in build.files)]:
            self.path(name)
        if build.bundle_key != self.manifest.key:
            raise StaleBuildError(
                f"{self.root}: the engines for {target!r} were built from an earlier export. "
                f"Run: {self.build_command(target)}"
            )
        _check_build(build, self.manifest, f"{self.root.name}/{folder}/{BUILD}")
        return build

    def build_command(self, target: str) -> str:
        """What makes a target's engines, for messages."""
        return f"dash-export build {self.root} {build_options(target)}"

    def verify(self, records: Iterable[FileRecord], *, hashes: bool = True) -> None:
        """Check that files exist with the recorded size and SHA-256. Raises BundleError naming the first that does
        not.
        """
        for record in records:
            path = self.path(record.name)
            if not path.is_file():
                raise BundleError(f"{self.root}: {record.name} is missing. {self._repair(record.name)}")
            if path.stat().st_size != record.bytes or (hashes and sha256_file(path) != record.sha256):
                raise BundleError(
                    f"{self.root}: {record.name} is not the file that was written (hash mismatch). "
                    f"It was changed or damaged after it was made. {self._repair(record.name)}"
                )

    def _repair(self, name: str) -> str:
        """What to do about a damaged file: engines are made from the rest, which may well be whole."""
        folder, _, rest = name.partition("/")
        if folder == "engines":
            return f"Run: {self.build_command(rest.partition('/')[0])}"
        return "The bundle is damaged: export and build it again."


def _refuse_newer(data: Any, root: Path) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerBundleError(
            f"{root} was written by a newer dash-export (schema {schema}, this one reads {SCHEMA}). "
            "Upgrade: pip install -U dash-export."
        )


def _check_manifest(manifest: Manifest, where: str) -> None:
    """Sizes that can be, gated layers that exist, and a graph for each."""
    model, gated = manifest.model, manifest.policy.gated
    sizes = {name: getattr(model, name) for name in _LARGEST}
    wrong = [f"{name} = {size}" for name, size in sizes.items() if not 1 <= size <= _LARGEST[name]]
    if wrong:
        raise BundleError(f"{where}: {', '.join(wrong)} cannot be. {_DAMAGED}")
    if list(gated) != sorted({layer for layer in gated if 0 < layer < model.num_layers}):
        raise BundleError(f"{where}: a gated layer does not exist or is there twice. {_DAMAGED}")
    try:
        check_reads(gated, manifest.policy.reads)
    except PolicyError as error:
        raise BundleError(f"{where}: {error} {_DAMAGED}") from error
    for order in (manifest.policy.static_order, manifest.policy.cosine_order):
        if len(set(order)) != len(order) or not set(order) <= set(gated):
            raise BundleError(f"{where}: an order of layers lists one that is not gated, or one twice. {_DAMAGED}")
    needed = {"embed", "head", *(f"layer_{layer:02d}" for layer in range(model.num_layers))}
    needed |= {f"skip_{layer:02d}" for layer in gated} | ({"policy"} if manifest.policy.has_network else set())
    if needed - set(manifest.graphs):
        raise BundleError(f"{where}: there is no graph {min(needed - set(manifest.graphs))}. {_DAMAGED}")
    listed = {record.name for record in manifest.files if record.bytes > 0}
    unlisted = {*manifest.graphs.values(), "onnx/rope.data"} - listed
    if unlisted:
        raise BundleError(f"{where}: {min(unlisted)} is not among the files. {_DAMAGED}")


def _check_build(build: Build, manifest: Manifest, where: str) -> None:
    """Segments that cover every layer once, an engine for each, and a cost for every gated layer."""
    gated, segments = manifest.policy.gated, build.segments
    following = [*(segment.first for segment in segments[1:]), manifest.model.num_layers]
    ends = [segment.embed for segment in segments], [segment.head for segment in segments]
    if (
        [segment.last + 1 for segment in segments] != following
        or not all(0 <= segment.first <= segment.last + 1 for segment in segments)
        or (segments and segments[0].first)
        or tuple(segment.first for segment in segments if segment.gated) != gated
        or any(segment.gated and segment.first != segment.last for segment in segments)
        or ends != ([True] + [False] * (len(segments) - 1), [False] * (len(segments) - 1) + [True])
    ):
        raise BundleError(f"{where}: the segments are not the model's layers in order. {_DAMAGED}")
    # Within a stretch nothing is decided: no layer but one that no policy reads may lie in it.
    free = set(gated) - set(manifest.policy.decision_points)
    if not all(item.first < item.last and all(layer in free for layer in item.layers) for item in build.stretches):
        raise BundleError(f"{where}: a stretch is not of gated layers that are decided together. {_DAMAGED}")
    needed = {segment.name for segment in segments} | {f"skip_{layer:02d}" for layer in gated}
    needed |= {f"policy_{layer:02d}" for layer in gated if manifest.policy.has_network}
    needed |= {stretch.name for stretch in build.stretches}
    if needed - set(build.engines):
        raise BundleError(f"{where}: there is no engine {min(needed - set(build.engines))}. {_DAMAGED}")
    if set(build.cost.cost) != set(gated) or not all(map(isfinite, build.cost.cost.values())):
        raise BundleError(f"{where}: the cost table does not list the gated layers. {_DAMAGED}")
    if not isfinite(build.cost.launch) or build.cost.launch < 0:
        raise BundleError(f"{where}: the cost of a launch is not a number >= 0. {_DAMAGED}")
    if build.policy_bias and (
        set(build.policy_bias) != set(gated) or not all(map(isfinite, build.policy_bias.values()))
    ):
        raise BundleError(f"{where}: the policy's biases do not list the gated layers. {_DAMAGED}")
    if not set(build.dial) <= set(DIALLED_KINDS) or not all(
        isfinite(number) and number >= 0
        for point in itertools.chain(*build.dial.values())
        for number in (point.trade_off, point.layers, point.time, point.kl)
    ):
        raise BundleError(f"{where}: the dial is not a table of finite numbers per policy kind. {_DAMAGED}")


def _no_bundle(root: Path) -> str:
    if not root.exists():
        return f"There is no bundle at {root}. Make one: dash-export export MODEL -o {root}"
    return (
        f"{root} is not a finished bundle: it has no {MANIFEST}. "
        f"Run the export again to complete it: dash-export export MODEL -o {root}"
    )


def _read_json(root: Path, name: str, missing: str) -> Any:
    path = safe_path(root, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(missing) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}). The bundle is damaged: export or build it again."
        ) from error
