"""All engines of a GPU build, and the cache they share: what sessions on a device are made from."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dash_export.build_record import Build
from dash_export.bundle import Bundle
from dash_export.errors import ContextLengthError
from dash_export.runtime.device.base import Device, DeviceEngine, Memory
from dash_export.runtime.device.blocks import size_of
from dash_export.runtime.engines import SegmentEngines, policies_by_segment
from dash_export.targets import Recipe

if TYPE_CHECKING:
    from dash_export.runtime.device.step import DeviceStep

MAIN, POLICY = "main", "policy"
"""Streams: layers run on one; in `overlapped` and `device` dispatch policies run on the other."""
BESIDE = ("overlapped", "device")
"""The dispatches whose policies run beside the layers."""

logger = logging.getLogger(__name__)


class DeviceEngines:
    """What `EngineSet` is on the host. Caches do not grow: the recipe's `kv_capacity` bounds the context."""

    prefills_apart = False

    def __init__(self, bundle: Bundle, build: Build, recipe: Recipe, device: Device, dispatch: str) -> None:
        """`dispatch`: `plain` (no policy), `sync` (policies in the layers' stream), `overlapped` (in their own, beside
        a layer) or `device` (the same, recorded once, decisions and all; where a device cannot, `overlapped`).
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
        model = bundle.manifest.model
        self.model = replace(model, max_positions=min(model.max_positions, recipe.engine.kv_capacity))
        self.needs_mask = recipe.dialect == "portable"
        self.score_rows = min(recipe.engine.logit_rows, self.chunk)
        policy_stream = POLICY if dispatch in BESIDE else MAIN
        # All sessions share the streams and a scratch block that grows, and what another thread gave a stream while a
        # step is recorded would become part of it: they take turns, a step at a time.
        self.turn = threading.RLock()

        def load(name: str, stream: str = MAIN) -> DeviceEngine:
            return device.engine(bundle.path(build.engines[name].file), stream)

        points = bundle.manifest.policy.decision_points if dispatch != "plain" else {}
        policies = policies_by_segment(build, points, partial(load, stream=policy_stream))
        self.segments = [
            SegmentEngines(
                segment, load(segment.name), load(f"skip_{segment.first:02d}") if segment.gated else None, asked
            )
            for segment, asked in zip(build.segments, policies, strict=True)
        ]
        self.answers = [group for item in self.segments for group in item.policies]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of hidden states and caches."""
        return self.segments[-1].run.dtype("hidden")

    def record_no_steps(self, reason: str) -> None:
        """`device` dispatch becomes `overlapped`, for good."""
        logger.warning("dispatch 'device' is not possible here (%s): this is 'overlapped'", reason)
        self.dispatch = "overlapped"

    def rows_at_once(self, _capacity: int) -> int:
        return self.chunk

    def cache(self, _step: int) -> DeviceCache:
        return DeviceCache(self)

    def prefill_step(self, cache: DeviceCache, sequence: int) -> DeviceStep:
        return self.step(cache, sequence)

    def step(self, cache: DeviceCache, sequence: int, teacher_forced: bool = False) -> DeviceStep:
        from dash_export.runtime.device.graph import GraphStep
        from dash_export.runtime.device.step import DeviceStep

        if self.dispatch == "device" and sequence == 1 and not teacher_forced:
            return GraphStep(self, cache, sequence)
        return DeviceStep(self, cache, sequence, teacher_forced)

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
