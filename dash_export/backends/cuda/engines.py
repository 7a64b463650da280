"""All engines of a GPU build, and the KV cache on a device: sessions on a device are made from them."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from math import prod

from dash_export.backends.cuda.alone import layer_times
from dash_export.backends.cuda.cuda import BESIDE, MAIN, Cuda, CudaMemory, DeviceEngine, PromptMemory
from dash_export.backends.cuda.step import DeviceStep
from dash_export.backends.host.cache import Sequences
from dash_export.backends.host.segments import timed_token
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import DAMAGED, POLICY, Build, Segment
from dash_export.core.units import Unit
from dash_export.errors import BundleError, ContextLengthError

logger = logging.getLogger(__name__)
ALIGNED = 256
"""Alignment of the address of an engine's tensor, in bytes."""


@dataclass(frozen=True)
class LoadedSegment:
    """Engine that runs a segment and, where the segment is a unit, its bypass. `unit`: its place among the units."""

    segment: Segment
    run: DeviceEngine
    bypass: DeviceEngine | None = None
    unit: int | None = None


class DeviceEngines:
    """Counterpart of `EngineSet` on a device. Caches do not grow: the recipe's `kv_capacity` bounds the context, and
    its `sequences` bounds how many sequences decode together.
    """

    mixes = takes_embeddings = gives_state = grows = shows_states = False
    drafter = None
    mixed = ()
    timed, layer_times = timed_token, layer_times

    def __init__(self, bundle: Bundle, build: Build, device: Cuda, dispatch: str) -> None:
        """Load all engines. `dispatch`: `sync`, `overlapped` or `device` (see `step`); `device` becomes `overlapped`
        where steps cannot be recorded.

        Raises BundleError where the policy's engine is missing, or the segment before the first unit does not begin at
        the state that the policy reads, and BackendError where the device has no room.
        """
        recipe = build.recipe
        assert recipe.engine is not None
        if dispatch == "device" and not device.records:
            logger.warning("dispatch 'device' is not possible with %s: this is 'overlapped'", build.backend)
            dispatch = "overlapped"
        self.build, self.device, self.dispatch, self.recipe = build, device, dispatch, recipe.engine
        self.sequences = recipe.engine.sequences
        self.policy_stream = MAIN if dispatch == "sync" else BESIDE
        self.records = device.records
        """Whether a token can be recorded: true until an attempt fails."""
        self.launches_ahead = True
        """Whether a token can be recorded that takes the likeliest one on the device: true until an attempt fails."""
        self.itemsize = 4 if recipe.engine.activations == "fp32" else 2
        """Bytes of a number in hidden states and caches."""
        self._chunk = recipe.runtime.prefill_chunk
        model, policy = bundle.manifest.decoder, bundle.manifest.policy
        self.model = replace(model, max_positions=min(model.max_positions, recipe.engine.kv_capacity))
        self.units = policy.units
        # All sessions share the streams and their scratch memory, and work that another thread enqueues while a step is
        # recorded would become part of the recording. So sessions take turns, a step at a time.
        self.turn = threading.RLock()
        self.step_kind: type[DeviceStep] = DeviceStep
        """Kind of the steps that are made: one that measures, perhaps (`timed_step`)."""

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
        """Place of the first unit's segment. The policy reads the state that enters the segment before it."""
        self.policy: DeviceEngine | None = None
        if policy.has_network:
            reader = build.segments[self.first - 1]
            if POLICY not in build.engines or reader.embed or reader.first != policy.read:
                raise BundleError(f"{bundle.root}: the build for {build.target!r} cannot ask its policy. {DAMAGED}")
            self.policy = load(POLICY, self.policy_stream)

    def rows_at_once(self, _capacity: int) -> int:
        return self._chunk

    def cache(self, _step: int, sequences: int = 1) -> DeviceCache:
        return DeviceCache(self, sequences, self.recipe.kv_capacity)

    def step(self, cache: DeviceCache, sequence: int, _teacher_forced: bool = False, batch: int = 1) -> DeviceStep:
        return self.step_kind(self, cache, sequence, batch)


class DeviceCache(Sequences):
    """KV cache on the device: keys and values per layer, [sequences, kv_heads, capacity, head_dim] of the engines'
    type. Rows of a sequence from its length on are free.
    """

    def __init__(self, engines: DeviceEngines, sequences: int, capacity: int) -> None:
        super().__init__(sequences)
        self._engines, self.capacity, model = engines, capacity, engines.model
        self.row_bytes = model.head_dim * engines.itemsize
        self.pitch = capacity * self.row_bytes
        """Bytes from one head to the next."""
        self.sequence_bytes = model.num_kv_heads * self.pitch
        self.position_nbytes = 2 * model.num_layers * model.num_kv_heads * self.row_bytes
        self.keys: list[CudaMemory] = []
        self.values: list[CudaMemory] = []
        self.prompts = PromptMemory(engines.device)
        self.ahead: object = None
        """What the last step has launched ahead; whoever writes to the cache after it takes this away."""

    def reserve(self, rows: int) -> None:
        """Allocate memory for the whole capacity, once. Raises ContextLengthError where `rows` exceed the capacity, and
        BackendError where so much is not free.
        """
        if rows > self.capacity:
            raise ContextLengthError(
                f"These engines hold {self.capacity} tokens and {rows} are wanted: shorten the prompt, or build with a "
                "larger kv_capacity in the recipe's [engine] table."
            )
        if self.keys:
            return
        nbytes, layers = len(self.lengths) * self.sequence_bytes, self._engines.model.num_layers
        apart = -(-nbytes // ALIGNED) * ALIGNED
        # One block: an allocation itself takes longer than its bytes do, and a server keeps many prompts.
        block = self._engines.device.memory(2 * layers * apart)
        parts = [block.part(place * apart, nbytes) for place in range(2 * layers)]
        self.keys, self.values = parts[:layers], parts[layers:]

    def alone(self, index: int) -> DeviceCache:
        """Return a new cache that holds sequence `index` alone; its capacity is the sequence's length."""
        twin = DeviceCache(self._engines, 1, self.lengths[index])
        twin.take(0, self, index)
        return twin

    def take(self, index: int, source: DeviceCache, other: int = 0) -> None:
        """Replace sequence `index` by a copy of sequence `other` of `source`. Raises as `reserve`."""
        engines, length = self._engines, source.lengths[other]
        if length:
            self.reserve(length)
            self.ahead = None
            width, heads = length * self.row_bytes, engines.model.num_kv_heads
            with engines.turn:
                for into, out_of in zip((*self.keys, *self.values), (*source.keys, *source.values), strict=True):
                    to, found = into.part(index * self.sequence_bytes), out_of.part(other * source.sequence_bytes)
                    engines.device.copy_rows(MAIN, to, self.pitch, found, source.pitch, width, heads)
                engines.device.synchronize(MAIN)
        self.lengths[index] = length

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in (*self.keys, *self.values))
