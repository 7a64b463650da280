"""The records of a bundle, with checks of their contents: `manifest.json` (the model, its graphs, its policy, the
SHA-256 of every file) and `build.json` (the engines for a target and how long each takes there).
"""

import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dash_export.bundle.recipe import Recipe, recipe_faults
from dash_export.core.dial import MEASURES, CostTable, DialPoint, Measure
from dash_export.core.exits import check_exits
from dash_export.core.facts import DecoderFacts, EncoderFacts, TextFacts
from dash_export.core.policy import PolicyFacts
from dash_export.core.units import Unit, check_static_order, check_units
from dash_export.errors import BundleError, PolicyError
from dash_export.files.artifacts import FileRecord
from dash_export.files.typed_json import Bytes, NotNegative

SCHEMA = 8
DAMAGED = "The bundle is damaged: export or build it again."
_MOST_OTHERS = 1000
"""Bound of what a record lists beside graphs and engines, so that no forged list takes long to check."""
MIXED = "mixed_"
"""Prefix, before the unit's name, of the engine in which each row of a batch runs or skips the unit by itself."""
DRAFTER = "drafter"
"""Name of the drafter's graph and engine."""
POLICY = "policy"
"""Name of the policy's graph, and of its engine where no other engine outputs the damage."""


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `graphs`: name -> .onnx file; `files`: every exported file with its hash; `builds`: for each
    target its `build.json`, the version last written and the one before; `key` changes with everything an engine is
    made from; `sha256`: hash of all other fields (`sealed`).
    """

    schema: int
    model: DecoderFacts | EncoderFacts | TextFacts
    policy: PolicyFacts
    graphs: dict[str, str]
    files: tuple[FileRecord, ...]
    key: str
    tools: dict[str, str] = field(default_factory=dict)
    builds: dict[str, tuple[FileRecord, ...]] = field(default_factory=dict)
    sha256: str = ""

    @property
    def measure(self) -> Measure:
        return MEASURES[self.model.takes]

    @property
    def decoder(self) -> DecoderFacts:
        """Facts of a causal LM. Raises BundleError for an encoder."""
        if not isinstance(self.model, DecoderFacts):
            raise BundleError(f"{self.model.name} is an encoder: it takes {self.model.takes}, and writes no text.")
        return self.model

    @property
    def encoder(self) -> EncoderFacts:
        """Facts of an encoder. Raises BundleError for a causal LM."""
        if not isinstance(self.model, EncoderFacts):
            raise BundleError(f"{self.model.name} is a causal LM: it continues text, and is no encoder.")
        return self.model


@dataclass(frozen=True)
class Segment:
    """Layers [first, last] compiled as one engine; a unit if `gated`. `embed`: the embedding is in it; `head`: the head
    is. An empty range (first = last + 1) is the embedding or the head alone.
    """

    first: int
    last: int
    embed: bool
    head: bool
    gated: bool

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def graphs(self) -> list[str]:
        """Names of the segment's portable graphs, in order."""
        names = [f"layer_{layer:02d}" for layer in self.layers]
        return ["embed"] * self.embed + names + ["head"] * self.head

    def engines(self, known: Container[str]) -> list[str]:
        """Return the engines, of the `known` ones of a build, that run the segment: one, or its portable graphs."""
        return self.graphs if all(graph in known for graph in self.graphs) else [self.name]

    @property
    def name(self) -> str:
        if self.first > self.last:
            return "embed" if self.embed else "head"
        return f"layer_{self.first:02d}" if self.first == self.last else f"layers_{self.first:02d}-{self.last:02d}"


@dataclass(frozen=True)
class EngineRecord:
    """One compiled engine. `file`: relative to the bundle; `bytes`: size of all that the engine maps (weights that are
    also stored packed count once); `key`: hash of its inputs; `seconds`: how long it took to make.
    """

    file: str
    bytes: Bytes
    key: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Verification:
    """Agreement of engines with their portable graphs. `engines`: engine -> kind of output -> relative root mean square
    error; `compared` says what was compared, and where.
    """

    compared: str
    engines: dict[str, dict[str, NotNegative]]


@dataclass(frozen=True)
class Build:
    """`engines/<target>/build.json`. `dial`: the token policy's calibrated table; `measuring`: revision of the method;
    `details`: what only this kind of backend has to say (compiler flags).
    """

    schema: int
    target: str
    bundle_key: str
    recipe: Recipe
    backend: str
    backend_version: str
    device: str
    segments: tuple[Segment, ...]
    engines: dict[str, EngineRecord]
    files: tuple[FileRecord, ...]
    cost: CostTable
    dial: tuple[DialPoint, ...] = ()
    measuring: int = 0
    seconds: float = 0.0
    verification: Verification | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def dispatch(self) -> str:
        """The dispatch mode that is used where nothing is said: the recipe's, or the one that was measured as best."""
        wanted = self.recipe.runtime.dispatch
        if wanted != "fastest":
            return wanted
        return self.cost.dispatch if self.cost.segment_us else "overlapped"


def sealed(manifest: Manifest) -> Manifest:
    contents = asdict(replace(manifest, sha256=""))
    return replace(manifest, sha256=hashlib.sha256(json.dumps(contents).encode()).hexdigest())


def manifest_faults(manifest: Manifest) -> Iterator[str]:
    """Yield faults of a manifest: a hash mismatch, units that do not exist or have no graph, unlisted files."""
    model, policy = manifest.model, manifest.policy
    if sealed(manifest).sha256 != manifest.sha256:
        yield "it was changed or damaged after it was made (hash mismatch)."
    try:
        check_units(policy.units, policy.read, model.num_layers)
        check_static_order(policy.static_order, policy.units)
        if model.decides == "input":
            check_exits(policy.units, model.num_layers)
    except PolicyError as error:
        yield str(error)
    yield from model.faults()
    needed = {"embed", "head", *(f"layer_{layer:02d}" for layer in range(model.num_layers))}
    needed |= {unit.bypass for unit in policy.units} | ({POLICY} if policy.has_network else set())
    needed |= {DRAFTER} if policy.drafter else set()
    if missing := needed - set(manifest.graphs):
        yield f"there is no graph {min(missing)}."
    if unknown := set(manifest.graphs) - needed:
        yield f"there is a graph {min(unknown)!r:.60}, which nobody needs."
    records = sum(1 + len(build) for build in manifest.builds.values()) + len(manifest.files) + len(manifest.tools)
    if records > 3 * len(needed) + _MOST_OTHERS:
        yield f"it lists {records} files and tools."
    listed = {record.name for record in manifest.files if record.bytes > 0}
    if unlisted := {*manifest.graphs.values(), *model.tables} - listed:
        yield f"{min(unlisted)} is not among the files."


def build_faults(build: Build, manifest: Manifest) -> Iterator[str]:
    """Yield faults of a build's record: a layer not in one segment, a segment without engine, a unit without cost."""
    units, engines = manifest.policy.units, build.engines
    yield from recipe_faults(build.recipe)
    if not _in_order(build.segments, units, manifest.model.num_layers):
        yield "the segments are not the model's layers in order."
    needed = {unit.bypass for unit in units} | {name for segment in build.segments for name in segment.engines(engines)}
    if missing := needed - set(engines):
        yield f"there is no engine {min(missing)}."
    if unknown := set(engines) - needed - {POLICY, DRAFTER, *(MIXED + unit.name for unit in units)}:
        yield f"there is an engine {min(unknown)!r:.60}, which nobody needs."
    if build.cost.segment_us and not build.cost.dense_us > 0:
        yield "a dense token takes no time."
    if len(build.files) > 3 * len(engines) + _MOST_OTHERS or len(build.dial) > _MOST_OTHERS:
        yield f"it lists {len(build.files)} files, and {len(build.dial)} points of the dial."
    if {name for name in engines if name.startswith(MIXED)} not in (set(), {MIXED + unit.name for unit in units}):
        yield "there are engines for rows that differ of some units only."
    for name, asked in ((POLICY, manifest.policy.has_network), (DRAFTER, manifest.policy.drafter)):
        if name in engines and not asked:
            yield f"nobody asks the engine {name}."
    listed = {record.name for record in build.files or manifest.files}
    if unlisted := {record.file for record in engines.values()} - listed:
        yield f"{min(unlisted)} is not among the files."
    if len(build.cost.cost) != len(units):
        yield "the cost table does not list the units."
    if len(build.cost.exits) not in {0, len(units)}:
        yield "the cost table does not list the exits."
    if build.cost.passes is not None and not build.cost.passes.sound:
        yield "the costs of passes are not one for each number of rows."
    if sum(build.cost.cost) * max([1.0, *(mode.saved for mode in build.cost.modes.values())]) >= 1:
        yield "by its cost table the units take more than a whole token."


def _in_order(segments: tuple[Segment, ...], units: tuple[Unit, ...], num_layers: int) -> bool:
    """Return whether the segments are the model, embedding to head, each layer once, and the gated ones its units."""
    firsts = [0, *(segment.last + 1 for segment in segments)]
    last = len(segments) - 1
    return (
        last >= 0
        and firsts == [*(segment.first for segment in segments), num_layers]
        and all(segment.first <= segment.last + 1 for segment in segments)
        and [Unit(segment.first, segment.last) for segment in segments if segment.gated] == list(units)
        and all(segment.embed == (place == 0) for place, segment in enumerate(segments))
        and all(segment.head == (place == last) for place, segment in enumerate(segments))
    )
