"""A step's memory, and its engines bound to it: segments, bypasses and the policy, to be launched in any order.

Hidden states alternate between two buffers, as on the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dash_export.backends.base import Launch as HostLaunch
from dash_export.backends.cuda.cuda import MAIN, CudaMemory, DeviceEngine, Launch, Mirror
from dash_export.bundle.layout import new_names, past_names, present_names
from dash_export.core.sampling import Draw

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceCache, DeviceEngines, LoadedSegment

READY = "state ready"
"""Event: the state that the policy reads is there."""
POLICY = -1
"""Place of the policy, where a segment's is its number."""


@dataclass(frozen=True)
class Part:
    """One segment, bound to a step's memory. `unit`: its place among the units. Where its engines leave the writing of
    K and V to the runtime, `new_rows` has the addresses (cache, new rows) of each.

    A Part does not refer to its step: without a cycle, a step that is dropped frees its memory and contexts at once.
    """

    unit: int | None
    run: Launch
    bypass: Launch | None
    new_rows: Mirror | None


class BoundEngines:
    """Engines bound for steps of `sequence` tokens of one sequence, or of one token of each of `batch` sequences."""

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int, batch: int = 1) -> None:
        assert 1 in (sequence, batch)
        self.engines, self.device, self.sequence, self.batch = engines, engines.device, sequence, batch
        self._cache = cache
        model, units, item = engines.model, len(engines.units), engines.itemsize
        space = self._space = self.device if sequence == 1 else cache.prompts.again()
        sides = 2 if sequence == 1 else 1  # of results: a step may run ahead while the host reads the last one's
        self._ids = Mirror(space, (batch, sequence), np.int64, 1 + sides)  # given, and drawn ahead
        self._draws = Mirror(space, (batch, len(Draw._fields)), np.float64, sides)
        self._positions = Mirror(space, (batch, sequence), np.int64)
        self._limits = Mirror(space, (batch, units), np.float64)
        self._logits = Mirror(space, (batch, 1, model.vocab_size), np.float32, sides)
        self._damage = Mirror(space, (batch, sequence, units), np.float32, sides)
        self._skipped = Mirror(space, (units,), np.bool_, sides)
        self._shapes = {
            "input_ids": (batch, sequence),
            "position_ids": (batch, sequence),
            "write_indices": (batch,),
            "hidden": (batch, sequence, model.hidden_size),
        }
        self._cache_shape = (batch, model.num_kv_heads, cache.capacity, model.head_dim)
        self._memory = {
            "input_ids": self._ids.memory,
            "position_ids": self._positions.memory,
            "write_indices": self._positions.memory,  # [batch]: positions of the first tokens
            "logits": self._logits.memory,
            "damage": self._damage.memory,
        }
        self._hidden = [space.memory(batch * sequence * model.hidden_size * item) for _ in range(2)]
        self.parts = [self._bind_part(index, segment) for index, segment in enumerate(engines.segments)]
        self._policy: Launch | None = None
        if engines.policy is not None and sequence == 1:  # prompts are dense
            self._policy = self._bind(engines.policy, {"hidden": self._hidden[(engines.first - 1) % 2]})

    def _bind_part(self, index: int, loaded: LoadedSegment) -> Part:
        memory = {"hidden": self._hidden[index % 2], "hidden_out": self._hidden[(index + 1) % 2]}
        rows = list[tuple[int, int]]()
        nbytes = self.batch * self.sequence * self.engines.model.num_kv_heads * self._cache.row_bytes
        for layer in loaded.segment.layers:
            names = zip(past_names(layer), present_names(layer), new_names(layer), strict=True)
            for (past, present, new), caches in zip(names, (self._cache.keys, self._cache.values), strict=True):
                memory[past] = memory[present] = caches[layer]
                if new in loaded.run.outputs:
                    memory[new] = self._space.memory(nbytes)
                    rows.append((caches[layer].address, memory[new].address))
        bypass = self._bind(loaded.bypass, memory) if loaded.bypass is not None and self.sequence == 1 else None
        table = Mirror(self._space, (len(rows), 2), np.uint64) if rows else None
        if table is not None:
            table.host[:] = rows
            self.device.copy("setup", table.memory, table.host)
            self.device.synchronize("setup")
        return Part(loaded.unit, self._bind(loaded.run, memory), bypass, table)

    def _bind(self, engine: DeviceEngine, memory: dict[str, CudaMemory]) -> Launch:
        memory = self._memory | memory
        shapes = {name: self._shapes.get(name, self._cache_shape) for name in engine.inputs}
        # In the order of `tensorrt.trt_maker`.
        profile = 0 if self.engines.recipe.profiles == 1 else 2 if self.batch > 1 else int(self.sequence > 1)
        return engine.bind(profile, shapes, {name: memory[name] for name in (*engine.inputs, *engine.outputs)})

    def _launch_before_units(self, asks: bool, launch: Callable[..., None]) -> None:
        """`launch` the segments before the first unit, and the policy if `asks`: on a stream of its own it waits only
        for its state, which is not overwritten before the decision, and is there before the segment that hides it.
        """
        stream = self.engines.policy_stream
        for place in range(self.engines.first):
            if asks and stream != MAIN and place == self.engines.first - 1:
                self.device.record(MAIN, READY)
                self.device.wait(stream, READY)
                launch(POLICY, stream=stream)
            launch(place)
        if asks and stream == MAIN:
            launch(POLICY)

    def bound(self, place: int, bypass: bool = False) -> Launch:
        """Return the bound engine of the policy, or of a segment or its bypass."""
        part = self.parts[place]
        launch = self._policy if place == POLICY else part.bypass if bypass else part.run
        assert launch is not None
        return launch

    def launch(self, place: int, bypass: bool = False, stream: str = MAIN) -> None:
        """Enqueue the policy, or a segment or its bypass with the cache writes that its engine leaves to the runtime:
        of all new rows in one kernel, to the positions of the tokens, which it reads when it runs.
        """
        self.bound(place, bypass)(stream)
        part = self.parts[place]
        if place == POLICY or part.new_rows is None:
            return
        cache, table = self._cache, part.new_rows
        blocks = self.batch * self.sequence, len(table.host), self.engines.model.num_kv_heads
        sizes = [(size // 2, ctypes.c_longlong) for size in (cache.row_bytes, cache.pitch)]
        memories, numbers = (table.memory, self._positions.memory), [(self.sequence, ctypes.c_int), *sizes]
        self.device.kernel("write_rows", stream, blocks, 64, memories, numbers)

    def _note_positions(self) -> None:
        for index, length in enumerate(self._cache.lengths[: self.batch]):
            self._positions.host[index] = np.arange(length, length + self.sequence)

    def _upload_inputs(self) -> None:
        for item in (self._ids, self._positions):
            self.device.copy(MAIN, item.memory, item.host)

    # --- for timing launches

    def place(self) -> None:
        """Tell the engines where the new tokens go: the rows after the cached ones."""
        self._note_positions()
        self._upload_inputs()

    def launches(self) -> list[tuple[HostLaunch, HostLaunch | None]]:
        """Return (run, bypass) of every segment, to be timed one by one after `place`. A call waits for its own end."""

        def run(place: int, bypass: bool) -> None:
            self.launch(place, bypass)
            self.device.synchronize(MAIN)

        return [
            (partial(run, place, False), partial(run, place, True) if part.bypass else None)
            for place, part in enumerate(self.parts)
        ]
