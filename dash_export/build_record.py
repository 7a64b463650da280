"""`build.json`: what `build` made for a target, how long a layer takes there, and what cannot be in it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import FileRecord
from dash_export.decision import DialPoint, Skips
from dash_export.errors import BundleError
from dash_export.manifest import DAMAGED, Manifest, check_sizes

QUIET = 0.2
"""Processors that other work may take while costs are measured."""


@dataclass(frozen=True)
class Segment:
    """Layers [first, last] compiled as one engine, a unit if `gated`; `embed` and `head` say whether it begins or ends
    the model.

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
    def graphs(self) -> list[str]:
        """Its portable graphs, in order."""
        names = [f"layer_{layer:02d}" for layer in self.layers]
        return ["embed"] * self.embed + names + ["head"] * self.head

    def engines(self, known: Container[str]) -> list[str]:
        """Which of a build's engines run it: one, or its portable graphs."""
        return self.graphs if all(graph in known for graph in self.graphs) else [self.name]

    @property
    def name(self) -> str:
        if self.first > self.last:
            return "embed" if self.embed else "head"
        return f"layer_{self.first:02d}" if self.first == self.last else f"layers_{self.first:02d}-{self.last:02d}"


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

    `others` and `stolen` say beside what it was measured: processors that other processes and the host took meanwhile.
    `cost`: per unit what skipping it saves, (run - bypass) as a fraction of `dense_us`, the dense time of one token;
    units of as many layers share one.
    """

    context: int
    dense_us: float
    segment_us: dict[str, float]
    bypass_us: dict[str, float]
    cost: tuple[float, ...]
    device: str
    others: float = 0.0
    stolen: float = 0.0

    def token_time(self, skipped: Skips) -> npt.NDArray[np.float64]:
        """Decode time as a fraction of dense, predicted, of tokens with these skips [units, tokens]: [tokens]."""
        found: npt.NDArray[np.float64] = 1.0 - np.array(self.cost) @ skipped
        return found

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
    """`engines/<target>/build.json`. `dial` is the token policy's calibrated table; `measuring` is the revision of
    how costs and dial were measured; `details` holds what only this kind of backend has to say (compiler flags).
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
    dial: tuple[DialPoint, ...] = ()
    measuring: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


MIXED = "mixed_"
"""What the engine is called, before the unit's name, in which every row runs or skips as it is told."""
POLICY = "policy"
"""The engine of a policy that is no output of another one."""


def check_build(build: Build, manifest: Manifest, where: str) -> None:
    """Segments that cover every layer once, an engine for each, and a cost for every unit."""
    units, segments = manifest.policy.units, build.segments
    check_sizes({record.name: record.bytes for record in build.files}, where)
    check_sizes({name: record.bytes for name, record in build.engines.items()}, where)
    following = [*(segment.first for segment in segments[1:]), manifest.model.num_layers]
    ends = [segment.embed for segment in segments], [segment.head for segment in segments]
    if (
        [segment.last + 1 for segment in segments] != following
        or not all(0 <= segment.first <= segment.last + 1 for segment in segments)
        or (segments and segments[0].first)
        or [(segment.first, segment.last) for segment in segments if segment.gated]
        != [(unit.first, unit.last) for unit in units]
        or ends != ([True] + [False] * (len(segments) - 1), [False] * (len(segments) - 1) + [True])
    ):
        raise BundleError(f"{where}: the segments are not the model's layers in order. {DAMAGED}")
    needed = {unit.bypass for unit in units}
    for segment in segments:
        needed |= set(segment.engines(build.engines))
    if needed - set(build.engines):
        raise BundleError(f"{where}: there is no engine {min(needed - set(build.engines))}. {DAMAGED}")
    mixed = {name for name in build.engines if name.startswith(MIXED)}
    if mixed not in (set(), {MIXED + unit.name for unit in units}):
        raise BundleError(f"{where}: there are engines for rows that differ of some units only. {DAMAGED}")
    if POLICY in build.engines and not manifest.policy.has_network:
        raise BundleError(f"{where}: nobody asks the engine {POLICY}. {DAMAGED}")
    listed = {record.name for record in build.files or manifest.files}
    unlisted = {record.file for record in build.engines.values()} - listed
    if unlisted:
        raise BundleError(f"{where}: {min(unlisted)} is not among the files. {DAMAGED}")
    if len(build.cost.cost) != len(units) or not all(0 <= cost <= 1 for cost in build.cost.cost):
        raise BundleError(f"{where}: the cost table does not list the units, as fractions of a token. {DAMAGED}")
    if not all(isfinite(load) and load >= 0 for load in (build.cost.others, build.cost.stolen)):
        raise BundleError(f"{where}: the load while costs were measured is not a number >= 0. {DAMAGED}")
    if not all(
        isfinite(number) and number >= 0
        for point in build.dial
        for number in (point.trade_off, point.layers, point.time, point.kl)
    ):
        raise BundleError(f"{where}: the dial is not a table of finite numbers. {DAMAGED}")
