"""`build.json`: what `build` made for a target, how long a layer takes there, and what cannot be in it."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from dash_export.artifacts import FileRecord
from dash_export.decision import DIALLED_KINDS, DialPoint
from dash_export.errors import BundleError
from dash_export.manifest import DAMAGED, Manifest, check_sizes

QUIET = 0.2
"""Processors that other work may take while costs are measured."""


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
    """One compiled engine: its file (relative to the bundle), the size of everything it maps in bytes (weights that are
    also stored packed once), and how long it took to make.
    """

    file: str
    bytes: int
    key: str
    seconds: float = 0.0


@dataclass(frozen=True)
class CostTable:
    """Measured on the device that built: medians in microseconds at `context` cached tokens.

    `others` and `stolen` say beside what it was measured: processors that other processes and the host took meanwhile.
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
    others: float = 0.0
    stolen: float = 0.0

    @property
    def disturbed(self) -> str:
        """What to say of a table that was measured beside other load; nothing of a quiet one."""
        if self.others + self.stolen <= QUIET:
            return ""
        return (
            f"Costs were measured while {self.others:.1f} processors worked for others and {self.stolen:.1f} were "
            "withheld by the host: they and the dial may be wrong. Measure again when the machine is quiet (--measure)."
        )


@dataclass(frozen=True)
class Build:
    """`engines/<target>/build.json`. `dial` has one calibrated table per policy kind with a trade-off; `policy_bias` is
    per gated layer, where the engines give a linear policy's score before its bias; `measuring`
    is the revision of how costs and dial were measured; `details` holds what only this kind of backend has to say
    (compiler flags).
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
    measuring: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


def policy_engines(points: Iterable[tuple[int, ...]], engines: Container[str]) -> dict[str, tuple[int, ...]]:
    """The policy engines of a build and the layers that each answers for. `points`: layers that one state decides
    about. `policy_NN` of the first answers for all of them; or each has its own (portable graphs, earlier builds).
    """
    found: dict[str, tuple[int, ...]] = {}
    for layers in points:
        alone = f"policy_{layers[-1]:02d}" in engines
        groups = [(layer,) for layer in layers] if alone else [layers]
        found |= {f"policy_{group[0]:02d}": group for group in groups}
    return found


def check_build(build: Build, manifest: Manifest, where: str) -> None:
    """Segments that cover every layer once, an engine for each, and a cost for every gated layer."""
    gated, segments = manifest.policy.gated, build.segments
    check_sizes({record.name: record.bytes for record in build.files}, where)
    check_sizes({name: record.bytes for name, record in build.engines.items()}, where)
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
        raise BundleError(f"{where}: the segments are not the model's layers in order. {DAMAGED}")
    # Within a stretch nothing is decided: no layer but one that no policy reads may lie in it.
    free = set(gated) - set(manifest.policy.decision_points)
    if not all(item.first < item.last and all(layer in free for layer in item.layers) for item in build.stretches):
        raise BundleError(f"{where}: a stretch is not of gated layers that are decided together. {DAMAGED}")
    needed = {segment.name for segment in segments} | {f"skip_{layer:02d}" for layer in gated}
    policies = set(policy_engines(manifest.policy.decision_points.values(), build.engines))
    strange = {f"policy_{layer:02d}" for layer in gated} & set(build.engines) - policies
    if strange:
        raise BundleError(f"{where}: nobody asks the engine {min(strange)}. {DAMAGED}")
    needed |= policies
    needed |= {stretch.name for stretch in build.stretches}
    if needed - set(build.engines):
        raise BundleError(f"{where}: there is no engine {min(needed - set(build.engines))}. {DAMAGED}")
    listed = {record.name for record in build.files or manifest.files}
    unlisted = {record.file for record in build.engines.values()} - listed
    if unlisted:
        raise BundleError(f"{where}: {min(unlisted)} is not among the files. {DAMAGED}")
    if set(build.cost.cost) != set(gated) or not all(map(isfinite, build.cost.cost.values())):
        raise BundleError(f"{where}: the cost table does not list the gated layers. {DAMAGED}")
    if not all(isfinite(cost) and cost >= 0 for cost in (build.cost.launch, build.cost.others, build.cost.stolen)):
        raise BundleError(f"{where}: the cost of a launch or the load is not a number >= 0. {DAMAGED}")
    if build.policy_bias and (
        set(build.policy_bias) != set(gated) or not all(map(isfinite, build.policy_bias.values()))
    ):
        raise BundleError(f"{where}: the policy's biases do not list the gated layers. {DAMAGED}")
    if not set(build.dial) <= set(DIALLED_KINDS) or not all(
        isfinite(number) and number >= 0
        for point in itertools.chain(*build.dial.values())
        for number in (point.trade_off, point.layers, point.time, point.kl)
    ):
        raise BundleError(f"{where}: the dial is not a table of finite numbers per policy kind. {DAMAGED}")
