"""All engines of a GPU build, and the cache they share: what sessions on a device are made from."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.errors import BundleError, ContextLengthError
from dash_export.manifest import DAMAGED, POLICY, Build, Segment
from dash_export.names import past_names
from dash_export.runtime.device.base import Device, DeviceEngine, Memory
from dash_export.runtime.device.blocks import size_of
from dash_export.targets import Recipe

if TYPE_CHECKING:
    from dash_export.runtime.device.step import DeviceStep

MAIN, BESIDE = "main", "beside"
"""Streams: layers run on one; in `overlapped` and `device` dispatch the policy runs on the other."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedSegment:
    """What runs a segment and, where it is a unit, what skips it."""

    segment: Segment
    run: DeviceEngine
    bypass: DeviceEngine | None


class DeviceEngines:
    """What `EngineSet` is on the host. Caches do not grow: the recipe's `kv_capacity` bounds the context."""

    mixes = False
    score_rows = 1

    def __init__(self, bundle: Bundle, build: Build, recipe: Recipe, device: Device, dispatch: str) -> None:
        """`dispatch`: `sync` (the policy in the layers' stream), `overlapped` (in its own, beside the layers before the
        first unit) or `device` (the same, recorded once, decisions and all; where a device cannot, `overlapped`).

        Raises BundleError where the build has no engine of the policy, or none that gives the state that it reads.
        """
        assert recipe.engine is not None
        self.build = build
        self.device = device
        self.dispatch = dispatch
        obstacle = device.graph_obstacle() if dispatch == "device" else None
        if obstacle is not None:
            self.record_no_steps(obstacle)
        self.kernel = recipe.engine
        self.chunk = recipe.runtime.prefill_chunk
        model, policy = bundle.manifest.model, bundle.manifest.policy
        self.model = replace(model, max_positions=min(model.max_positions, recipe.engine.kv_capacity))
        self.units = policy.units
        # All sessions share the streams and a scratch block that grows, and what another thread gave a stream while a
        # step is recorded would become part of it: they take turns, a step at a time.
        self.turn = threading.RLock()

        def load(name: str, stream: str = MAIN) -> DeviceEngine:
            return device.engine(bundle.path(build.engines[name].file), stream)

        def loaded(segment: Segment) -> LoadedSegment:
            unit = Unit(segment.first, segment.last)
            return LoadedSegment(segment, load(segment.name), load(unit.bypass) if segment.gated else None)

        self.segments = [loaded(segment) for segment in build.segments]
        gated = [index for index, segment in enumerate(build.segments) if segment.gated]
        self.first = gated[0] if gated else len(self.segments)
        """The place of the first unit's segment. The policy reads what enters the one before it."""
        self.policy: DeviceEngine | None = None
        if policy.has_network:
            reader = build.segments[self.first - 1]
            if POLICY not in build.engines or reader.embed or reader.first != policy.read:
                raise BundleError(f"{bundle.root}: the build for {build.target!r} cannot ask its policy. {DAMAGED}")
            self.policy = load(POLICY, self.policy_stream)

    @property
    def policy_stream(self) -> str:
        return MAIN if self.dispatch == "sync" else BESIDE

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of hidden states and caches."""
        item = next(item for item in self.segments if item.segment.layers)
        return item.run.dtype(past_names(item.segment.first)[0])

    def record_no_steps(self, reason: str) -> None:
        """`device` dispatch becomes `overlapped`, for good."""
        logger.warning("dispatch 'device' is not possible here (%s): this is 'overlapped'", reason)
        self.dispatch = "overlapped"

    def rows_at_once(self, _capacity: int) -> int:
        return self.chunk

    def cache(self, _step: int) -> DeviceCache:
        return DeviceCache(self)

    def step(self, cache: DeviceCache, sequence: int, teacher_forced: bool = False) -> DeviceStep:  # noqa: ARG002
        from dash_export.runtime.device.graph import GraphStep
        from dash_export.runtime.device.step import DeviceStep

        kind = GraphStep if self.dispatch == "device" and sequence == 1 else DeviceStep
        return kind(self, cache, sequence)

    def profile(self, sequence: int) -> int:
        """Which of an engine's profiles serves a step of `sequence` tokens."""
        return 0 if sequence == 1 or self.kernel.profiles == 1 else 1


class DeviceCache:
    """Keys and values per layer, [1, kv_heads, capacity, head_dim] of the engines' type; rows from `length` on are
    free.
    """

    def __init__(self, engines: DeviceEngines) -> None:
        self._engines = engines
        self.length = 0
        self.capacity = engines.kernel.kv_capacity
        model = engines.model
        self.shape = (1, model.num_kv_heads, self.capacity, model.head_dim)
        self.keys: list[Memory] = []
        self.values: list[Memory] = []

    def reserve(self, rows: int) -> bool:
        """Memory for all the capacity, once. True when it was made now. Raises ContextLengthError beyond it."""
        if rows > self.capacity:
            raise ContextLengthError(
                f"These engines hold {self.capacity} tokens and {rows} are wanted: shorten the prompt, or build with a "
                "larger kv_capacity in the recipe's [engine] table."
            )
        if self.keys:
            return False
        nbytes = size_of(self.shape, self._engines.dtype)
        layers, device = self._engines.model.num_layers, self._engines.device
        memories = [device.memory(nbytes) for _ in range(2 * layers)]  # out of memory, nothing is kept
        self.keys, self.values = memories[:layers], memories[layers:]
        return True

    def copy(self) -> DeviceCache:
        """Another cache with the same contents."""
        twin = DeviceCache(self._engines)
        twin.length = self.length
        if self.keys:
            twin.reserve(0)
        stream = self._engines.device.stream(MAIN)
        with self._engines.turn:
            for into, source in zip((*twin.keys, *twin.values), (*self.keys, *self.values), strict=True):
                stream.copy(into, source)
            stream.synchronize()
        return twin

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in (*self.keys, *self.values))
