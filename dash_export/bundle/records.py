"""The records of a bundle, with checks of their contents: `manifest.json` (the model, its graphs, its policy, the
SHA-256 of every file) and `build.json` (the engines for a target and how long each takes there).
"""

import hashlib
import json
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt

from dash_export.bundle.recipe import Recipe, recipe_faults
from dash_export.core.decision import POLICY_KINDS, DialPoint, Skips, Unit, check_static_order, check_units
from dash_export.errors import PolicyError
from dash_export.files.artifacts import FileRecord
from dash_export.files.typed_json import Bytes, NotNegative, Within

SCHEMA = 6
DAMAGED = "The bundle is damaged: export or build it again."
LARGEST_CONTEXT = 1 << 20
"""Bound of positions. Long contexts have a million."""
# Above any published model, so that an absurd manifest or config fails where it is read instead of at an allocation.
LARGEST = {
    "num_layers": 1 << 10,
    "hidden_size": 1 << 17,
    "vocab_size": 1 << 22,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 10,
    "max_positions": LARGEST_CONTEXT,
    "parameters": 1 << 50,
}
QUIET = 0.2
"""Processors that other work may take while costs are measured; above that the machine counts as busy."""
_MOST_OTHERS = 1000
"""Bound of what a record lists beside graphs and engines, so that no forged list takes long to check."""
MIXED = "mixed_"
"""Prefix, before the unit's name, of the engine in which each row of a batch runs or skips the unit by itself."""
POLICY = "policy"
"""Name of the policy's graph, and of its engine where no other engine outputs the damage."""


@dataclass(frozen=True)
class Traits:
    """Options of a model family beyond a plain decoder. The defaults are those of a plain decoder.

    `windows`: for each layer the number of tokens that a query may attend to, its own included, 0 for all; empty if all
    layers attend to all. `window_rope`: layers with a window have RoPE frequencies of their own; `unrotated`: layers
    without RoPE. `norms_after`: attention, MLP and bypasses read the state itself, and only what they add is normed; Q
    and K are normed over all heads at once. `embedding_scale` multiplies embeddings, `residual_scale` what a branch
    adds, `attention_scale` scores (0: head_dim ** -0.5), `logits_scale` logits. `score_cap` and `logits_cap`: x becomes
    cap * tanh(x / cap); 0: none.
    """

    activation: Literal["silu", "gelu_tanh"] = "silu"
    windows: tuple[Annotated[int, Within(0, LARGEST_CONTEXT)], ...] = ()
    window_rope: bool = False
    unrotated: tuple[int, ...] = ()
    norms_after: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: NotNegative = 0.0
    logits_scale: float = 1.0
    score_cap: NotNegative = 0.0
    logits_cap: NotNegative = 0.0

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def rope(self, layer: int) -> str:
        """Return the name of a layer's RoPE tables; empty where the layer has no RoPE."""
        if layer in self.unrotated:
            return ""
        return "rope.window" if self.window_rope and self.window(layer) else "rope"


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model that the runtime needs.

    `rope_frequencies`: rotary position embedding in the half-split ("neox") layout, float32 [rotary_dim / 2] with every
    scaling already applied: position p rotates pair i by p * rope_frequencies[i] radians. `rope_scale` multiplies sines
    and cosines. `window_frequencies`: those of the layers with a window, if these have others. `tie_embeddings`: the
    head's matrix is the embedding's.
    """

    name: str
    model_type: str
    num_layers: Annotated[int, Within(1, LARGEST["num_layers"])]
    hidden_size: Annotated[int, Within(1, LARGEST["hidden_size"])]
    vocab_size: Annotated[int, Within(1, LARGEST["vocab_size"])]
    num_heads: Annotated[int, Within(1, LARGEST["num_heads"])]
    num_kv_heads: Annotated[int, Within(1, LARGEST["num_kv_heads"])]
    head_dim: Annotated[int, Within(1, LARGEST["head_dim"])]
    max_positions: Annotated[int, Within(2, LARGEST["max_positions"])]
    parameters: Annotated[int, Within(1, LARGEST["parameters"])]
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    window_frequencies: tuple[float, ...] = ()
    tie_embeddings: bool = False
    traits: Traits = Traits()

    @property
    def attention_scale(self) -> float:
        """Factor of the product of query and key."""
        return self.traits.attention_scale or self.head_dim**-0.5


@dataclass(frozen=True)
class PolicyFacts:
    """Facts of the bundle's skip policy, as in a SkipPolicy; `bypass` is the form of its bypasses."""

    units: tuple[Unit, ...]
    read: int
    origin: str
    has_network: bool
    bypass: str
    fingerprint: str
    static_order: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that may be skipped."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The policy kinds this bundle can serve; `static` without an order takes a list of layers only."""
        served = {"dense": True, "static": bool(self.units), "token": self.has_network}
        return tuple(kind for kind in POLICY_KINDS if served[kind])


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `graphs`: graph name -> .onnx file; `files`: every exported file with its hash; `builds`: for
    each target its `build.json`, which lists the engines, in the version last written and the one before; `key` changes
    with everything an engine is made from; `sha256`: hash of all other fields (`sealed`).
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
class CostTable:
    """Measured on `device`: medians in microseconds at `context` cached tokens.

    `others` and `stolen`: processors that other processes and the host took meanwhile. `cost`: for each unit what
    skipping it saves, as a fraction of `dense_us`, the dense time of one token; units with equally many layers share
    one value. `asks`: what evaluating the policy adds to a token on a GPU, as the same fraction (0 on a CPU, where the
    engine of the first layers outputs the damage in any case). `dispatch`: the dispatch mode of all these times.
    """

    context: Annotated[int, Within(0, 1 << 20)]
    dense_us: NotNegative
    segment_us: dict[str, float]
    bypass_us: dict[str, float]
    cost: tuple[Annotated[float, Within(0, 1)], ...]
    device: str
    others: NotNegative = 0.0
    stolen: NotNegative = 0.0
    asks: NotNegative = 0.0
    dispatch: str = "sync"

    def token_time(self, skipped: Skips, asked: bool = False) -> npt.NDArray[np.float64]:
        """Predict decode time [tokens], as a fraction of dense, of tokens with these skips [units, tokens]. `asked`:
        the policy was evaluated for them.
        """
        found: npt.NDArray[np.float64] = 1.0 + asked * self.asks - np.array(self.cost) @ skipped
        return found

    @property
    def disturbed(self) -> str:
        """Warning about a table that was measured beside other load; empty for a quiet machine."""
        if self.others + self.stolen <= QUIET:
            return ""
        return (
            f"Costs were measured while {self.others:.1f} processors worked for others and {self.stolen:.1f} were "
            "withheld by the host: they and the dial may be wrong. Measure again when the machine is quiet (--measure)."
        )


@dataclass(frozen=True)
class Verification:
    """Agreement of engines with their portable graphs. `engines`: engine -> kind of output -> relative root mean square
    error; `compared` says what was compared, and where.
    """

    compared: str
    engines: dict[str, dict[str, NotNegative]]


@dataclass(frozen=True)
class Build:
    """`engines/<target>/build.json`. `dial`: the token policy's calibrated table; `measuring`: revision of the method
    by which costs and dial were measured; `details`: what only this kind of backend has to say (compiler flags).
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


def sealed(manifest: Manifest) -> Manifest:
    """Return the manifest with the hash of its contents."""
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
    except PolicyError as error:
        yield str(error)
    if len(model.traits.windows) not in (0, model.num_layers):
        yield "its attention windows are not one per layer."
    if 2 * max(len(model.rope_frequencies), len(model.window_frequencies)) > model.head_dim:
        yield "it rotates more dimensions than a head has."
    needed = {"embed", "head", *(f"layer_{layer:02d}" for layer in range(model.num_layers))}
    needed |= {unit.bypass for unit in policy.units} | ({POLICY} if policy.has_network else set())
    if missing := needed - set(manifest.graphs):
        yield f"there is no graph {min(missing)}."
    if unknown := set(manifest.graphs) - needed:
        yield f"there is a graph {min(unknown)!r:.60}, which nobody needs."
    records = sum(1 + len(build) for build in manifest.builds.values()) + len(manifest.files) + len(manifest.tools)
    if records > 3 * len(needed) + _MOST_OTHERS:
        yield f"it lists {records} files and tools."
    listed = {record.name for record in manifest.files if record.bytes > 0}
    if unlisted := {*manifest.graphs.values(), "onnx/embed.data"} - listed:
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
    if unknown := set(engines) - needed - {POLICY, *(MIXED + unit.name for unit in units)}:
        yield f"there is an engine {min(unknown)!r:.60}, which nobody needs."
    if build.cost.segment_us and not build.cost.dense_us > 0:
        yield "a dense token takes no time."
    if len(build.files) > 3 * len(engines) + _MOST_OTHERS or len(build.dial) > _MOST_OTHERS:
        yield f"it lists {len(build.files)} files, and {len(build.dial)} points of the dial."
    if {name for name in engines if name.startswith(MIXED)} not in (set(), {MIXED + unit.name for unit in units}):
        yield "there are engines for rows that differ of some units only."
    if POLICY in engines and not manifest.policy.has_network:
        yield f"nobody asks the engine {POLICY}."
    listed = {record.name for record in build.files or manifest.files}
    if unlisted := {record.file for record in engines.values()} - listed:
        yield f"{min(unlisted)} is not among the files."
    if len(build.cost.cost) != len(units):
        yield "the cost table does not list the units."
    if sum(build.cost.cost) >= 1:
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
