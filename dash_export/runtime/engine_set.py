"""All engines of a build on the host, loaded: what sessions share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.errors import BundleError
from dash_export.manifest import DAMAGED, MIXED, POLICY, Build, Segment
from dash_export.runtime.backends.base import Backend, Engine
from dash_export.runtime.cache import KVCache
from dash_export.runtime.decode import BoundStep

SCORES = 32 << 20
"""Bytes of attention scores of one pass: what is larger, glibc maps and clears anew for every layer."""


@dataclass(frozen=True)
class SegmentEngines:
    """The engines of one segment by name: what runs it, one after the other, and for a unit its bypass."""

    segment: Segment
    run: Sequence[tuple[str, Engine]]
    bypass: Engine | None = None


class EngineSet:
    """All engines of a build, shared between sessions. `mixes`: whether rows of one step may differ in what they skip
    (teacher-forced passes, batches).
    """

    score_rows = 128
    """Teacher-forced steps keep the logits of all their tokens: 128 of a 50k vocabulary are 25 MB."""

    def __init__(self, bundle: Bundle, build: Build, backend: Backend) -> None:
        """Raises BundleError where an engine is missing."""
        self._bundle, self._backend, self.build = bundle, backend, build
        self._seal = bundle.verify(build.files, hashes=False)
        self.model, policy = bundle.manifest.model, bundle.manifest.policy
        self.units, self.read = policy.units, policy.read
        self.segments = []
        for segment in build.segments:
            names = segment.engines(build.engines)
            if policy.has_network and policy.read in segment.layers and POLICY in build.engines:
                names.insert(names.index(f"layer_{policy.read:02d}"), POLICY)
            run = [(name, self._load(name)) for name in names]
            bypass = self._load(Unit(segment.first, segment.last).bypass) if segment.gated else None
            self.segments.append(SegmentEngines(segment, run, bypass))
        self.mixes = all(MIXED + unit.name in build.engines for unit in self.units)
        engines = [engine for item in self.segments for _, engine in item.run]
        if policy.has_network and not any("damage" in engine.outputs for engine in engines):
            # A missing policy is no damage, and no damage is always skipped.
            raise BundleError(f"{bundle.root}: the build for {build.target!r} has no engine of the policy. {DAMAGED}")
        self.needs_mask = any("attention_mask" in engine.inputs for engine in engines)

    def _load(self, name: str) -> Engine:
        if name not in self.build.engines:
            raise BundleError(
                f"{self._bundle.root}: the build for {self.build.target!r} has no engine {name}. {DAMAGED}"
            )
        return self._backend.load(self._bundle.path(self.build.engines[name].file))

    @cached_property
    def mixed(self) -> Sequence[Engine]:
        """One engine per unit for steps whose rows differ, loaded when the first such step is made: a unit's weights
        once more. Raises BundleError where a file of the build is another one than when the others were loaded.
        """
        self._bundle.check_same(self._seal)
        mixed = [self._load(MIXED + unit.name) for unit in self.units]
        self._bundle.check_same(self._seal)
        return mixed

    def rows_at_once(self, capacity: int) -> int:
        """As many tokens as one pass may hold over a cache of `capacity` rows, for their attention scores' sake."""
        return max(1, SCORES // (4 * self.model.num_heads * capacity))

    def cache(self, step: int, sequences: int = 1) -> KVCache:
        """A cache for one session, or for a batch of `sequences`, which grows by `step` rows."""
        return KVCache(self.model, step, sequences)

    def step(self, cache: KVCache, sequence: int, teacher_forced: bool = False, batch: int = 1) -> BoundStep:
        """These engines bound to one session's memory, or to that of the first `batch` sequences of a batch."""
        return BoundStep(self, cache, sequence, teacher_forced, batch)
