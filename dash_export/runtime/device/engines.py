"""All engines of a GPU build, and the cache they share: what sessions on a device are made from."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from math import prod

from dash_export.bundle import Bundle
from dash_export.decision import Unit
from dash_export.errors import BundleError, ContextLengthError
from dash_export.manifest import DAMAGED, POLICY, Build, Segment
from dash_export.runtime.device.base import BESIDE, MAIN, Device, DeviceEngine, Memory
from dash_export.runtime.device.step import DeviceStep, PromptMemory
from dash_export.targets import Recipe


@dataclass(frozen=True)
class LoadedSegment:
    """The engine that runs a segment and, where it is a unit, what skips it. `unit`: its place among the units."""

    segment: Segment
    run: DeviceEngine
    bypass: DeviceEngine | None = None
    unit: int | None = None


class DeviceEngines:
    """The device's counterpart of `EngineSet`. Caches do not grow: the recipe's `kv_capacity` bounds the context."""

    mixes = takes_embeddings = gives_state = False
    score_rows = 1

    def __init__(self, bundle: Bundle, build: Build, recipe: Recipe, device: Device, dispatch: str) -> None:
        """`dispatch`: `sync`, `overlapped` or `device` (`step`), which becomes `overlapped` where steps cannot be
        recorded.

        Raises BundleError where the build has no engine of the policy, or none that gives the state that it reads, and
        BackendError where the device has no room.
        """
        assert recipe.engine is not None
        self.build, self.device, self.dispatch, self.recipe = build, device, dispatch, recipe.engine
        self.policy_stream = MAIN if dispatch == "sync" else BESIDE
        self.records = True
        """Whether a token can be recorded, as far as anybody has tried."""
        self.itemsize = 4 if recipe.engine.activations == "fp32" else 2
        """Bytes of a number in hidden states and caches."""
        self._chunk = recipe.runtime.prefill_chunk
        model, policy = bundle.manifest.model, bundle.manifest.policy
        self.model = replace(model, max_positions=min(model.max_positions, recipe.engine.kv_capacity))
        self.units = policy.units
        # All sessions share the streams and their scratch memory, and what another thread gave a stream while a step is
        # recorded would become part of it: they take turns, a step at a time.
        self.turn = threading.RLock()

        shape = (2 * self.model.num_layers, model.num_kv_heads, recipe.engine.kv_capacity, model.head_dim)
        files = {bundle.path(engine.file): engine.bytes for engine in build.engines.values()}
        device.check_room(files, prod(shape) * self.itemsize)

        def load(name: str, stream: str = MAIN) -> DeviceEngine:
            return device.engine(bundle.path(build.engines[name].file), stream)

        self.segments: list[LoadedSegment] = []
        gated = [place for place, segment in enumerate(build.segments) if segment.gated]
        for place, segment in enumerate(build.segments):
            run = load(segment.name)
            if segment.gated:
                bypass = load(Unit(segment.first, segment.last).bypass)
                self.segments.append(LoadedSegment(segment, run, bypass, gated.index(place)))
            else:
                self.segments.append(LoadedSegment(segment, run))
        self.first = gated[0] if gated else len(self.segments)
        """The place of the first unit's segment. The policy reads what enters the one before it."""
        self.policy: DeviceEngine | None = None
        if policy.has_network:
            reader = build.segments[self.first - 1]
            if POLICY not in build.engines or reader.embed or reader.first != policy.read:
                raise BundleError(f"{bundle.root}: the build for {build.target!r} cannot ask its policy. {DAMAGED}")
            self.policy = load(POLICY, self.policy_stream)

    def rows_at_once(self, _capacity: int) -> int:
        return self._chunk

    def cache(self, _step: int) -> DeviceCache:
        return DeviceCache(self)

    def step(self, cache: DeviceCache, sequence: int, teacher_forced: bool = False) -> DeviceStep:  # noqa: ARG002
        return DeviceStep(self, cache, sequence)


class DeviceCache:
    """Keys and values per layer, [1, kv_heads, capacity, head_dim] of the engines' type; rows from `length` on are
    free.
    """

    def __init__(self, engines: DeviceEngines) -> None:
        self._engines, model = engines, engines.model
        self.length, self.capacity = 0, engines.recipe.kv_capacity
        self.shape = (1, model.num_kv_heads, self.capacity, model.head_dim)
        self.keys: list[Memory] = []
        self.values: list[Memory] = []
        self.prompts = PromptMemory(engines.device)

    def reserve(self, rows: int) -> bool:
        """Memory for all the capacity, once. True when it was made now. Raises ContextLengthError beyond it."""
        if rows > self.capacity:
            raise ContextLengthError(
                f"These engines hold {self.capacity} tokens and {rows} are wanted: shorten the prompt, or build with a "
                "larger kv_capacity in the recipe's [engine] table."
            )
        if self.keys:
            return False
        nbytes, layers = prod(self.shape) * self._engines.itemsize, self._engines.model.num_layers
        memories = [self._engines.device.memory(nbytes) for _ in range(2 * layers)]  # out of memory, nothing is kept
        self.keys, self.values = memories[:layers], memories[layers:]
        return True

    def copy(self) -> DeviceCache:
        """Another cache with the same contents."""
        twin = DeviceCache(self._engines)
        twin.length = self.length
        if self.keys:
            twin.reserve(0)
        with self._engines.turn:
            for into, source in zip((*twin.keys, *twin.values), (*self.keys, *self.values), strict=True):
                self._engines.device.copy(MAIN, into, source)
            self._engines.device.synchronize(MAIN)
        return twin

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in (*self.keys, *self.values))
