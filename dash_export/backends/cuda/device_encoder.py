"""All engines of an encoder's GPU build. States stay on the device; the host gets the answers of exits, and decides.

The loop is the host's (`host/encoder_pass.py`). Everything runs on one stream, and whoever goes on after an exit is
copied together there. Not yet run on a GPU.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import Launch
from dash_export.backends.cuda.cuda import MAIN, Cuda, CudaMemory, DeviceEngine
from dash_export.backends.host.encoder_pass import Arrays, EncoderEngines, Leaves, Pass
from dash_export.backends.host.segments import HostBackend, HostEngine, Timed
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build
from dash_export.core.units import Damages

BATCH = 32
"""Inputs that engines take at a time; more are taken in turns."""


class DeviceEncoder(EncoderEngines):
    """Counterpart of `EncoderEngines` on a device. Threads take turns, a pass at a time."""

    def __init__(self, bundle: Bundle, build: Build, device: Cuda) -> None:
        """Load all engines. Raises BackendError where the device has no room."""
        assert build.recipe.engine is not None
        device.check_room({bundle.path(engine.file): engine.bytes for engine in build.engines.values()}, 0)
        self.device, self._turn = device, threading.RLock()
        self._profiles = build.recipe.engine.profiles
        self._itemsize = 4 if build.recipe.engine.activations == "fp32" else 2
        self._memory, self._pinned = _Blocks(device.memory), _Blocks(device.pinned)
        super().__init__(bundle, build, cast("HostBackend", _MainStream(device)))

    def encode(self, array: npt.NDArray[Any], leaves: Leaves, asks: bool) -> Pass:
        with self._turn:
            if len(array) <= BATCH:
                return super().encode(array, leaves, asks)
            parts = []
            for start in range(0, len(array), BATCH):
                part = slice(start, min(start + BATCH, len(array)))
                parts.append(super().encode(array[part], _of_part(leaves, part, len(array)), asks))
        return _joined(parts)

    def _bound(self, engine: HostEngine | DeviceEngine, state: Arrays, count: int) -> tuple[Launch, Arrays]:
        """Bind an engine. `hidden_out` stays on the device; a launch whose engine gives something else, too, waits for
        it. Every pass ends with such a launch, so pinned memory is free again when the next pass takes it.
        """
        tokens, device = self.model.length(next(iter(state.values()))), self.device
        memory, shapes, uploads, downloads, found = {}, {}, [], [], Arrays()
        for name in engine.inputs:
            given: Any = state[name]
            shapes[name] = given.shape
            if isinstance(given, DeviceState):
                memory[name] = given.memory
            else:
                memory[name], pinned = self._memory.take(given.nbytes), self._pinned.take(given.nbytes)
                uploads.append((given, pinned, memory[name]))
        for name in engine.outputs:
            shape = (count, *self._shape(name, tokens))
            if name == "hidden_out":
                made = DeviceState(self, self._memory.take(prod(shape) * self._itemsize), shape)
                memory[name], found["hidden"] = made.memory, cast("npt.NDArray[Any]", made)
            else:
                found[name] = np.empty(shape, np.float32)
                memory[name], pinned = self._memory.take(found[name].nbytes), self._pinned.take(found[name].nbytes)
                downloads.append((found[name], pinned, memory[name]))
        several = int(count > 1 and self._profiles > 1)  # in the order of `tensorrt.trt_maker`
        run = cast("DeviceEngine", engine).bind(several, shapes, memory)

        def launch() -> None:
            for array, pinned, place in uploads:
                pinned.view(array.dtype)[:] = array.ravel()
                device.copy(MAIN, place, pinned)
            run(MAIN)
            for _, pinned, place in downloads:
                device.copy(MAIN, pinned, place)
            if downloads:
                device.synchronize(MAIN)
            for array, pinned, _ in downloads:
                array[:] = pinned.view(array.dtype).reshape(array.shape)

        return launch, found

    def timed(self, _context: int, batch: int = 1) -> Timed:
        context, bound, rest = super().timed(_context, batch)

        def waited(launch: Launch) -> Launch:
            def run() -> None:
                launch()
                self.device.synchronize(MAIN)

            return run

        return context, [(name, waited(run), bypass and waited(bypass)) for name, run, bypass in bound], rest

    def rows(self, state: DeviceState, kept: npt.NDArray[np.bool_]) -> DeviceState:
        """Return a state of the `kept` rows of another, copied together."""
        places, nbytes = np.flatnonzero(kept), prod(state.shape[1:]) * self._itemsize
        found = DeviceState(self, self._memory.take(len(places) * nbytes), (len(places), *state.shape[1:]))
        for place, old in enumerate(places.tolist()):
            to, source = (memory.part(at * nbytes, nbytes)
                          for memory, at in ((found.memory, place), (state.memory, old)))  # fmt: skip
            self.device.copy(MAIN, to, source)
        return found


@dataclass(frozen=True)
class DeviceState:
    """State [n, tokens, hidden] on the device, of the engines' type. The loop picks its rows as it does an array's."""

    engines: DeviceEncoder
    memory: CudaMemory
    shape: tuple[int, ...]

    def __getitem__(self, kept: npt.NDArray[np.bool_]) -> DeviceState:
        return self.engines.rows(self, kept)


class _MainStream:
    """Loader of engines for one stream."""

    def __init__(self, device: Cuda) -> None:
        self._device = device

    def load(self, path: Path) -> DeviceEngine:
        return self._device.engine(path, MAIN)


class _Blocks:
    """Blocks of memory, used again when what was taken is dropped: later work of the one stream may overwrite them.
    Their sizes are powers of two, so that passes of all numbers of inputs share a few.
    """

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make, self._free = make, defaultdict[int, list[Any]](list)

    def take(self, nbytes: int) -> Any:
        size = 1 << (nbytes - 1).bit_length()
        free = self._free[size]
        block = free.pop() if free else self._make(size)
        taken = block.part(0, nbytes) if isinstance(block, CudaMemory) else block[:nbytes]
        weakref.finalize(taken, free.append, block).atexit = False
        return taken


def _of_part(leaves: Leaves, part: slice, count: int) -> Leaves:
    """Return what says for a part of the inputs what `leaves` says for all `count`."""

    def some(unit: int, damage: Damages) -> npt.NDArray[np.bool_]:
        whole = np.zeros(count, damage.dtype)
        whole[part] = damage
        return leaves(unit, whole)[part]

    return some


def _joined(parts: list[Pass]) -> Pass:
    """Return the results of parts as those of all inputs."""

    def each(name: str, axis: int = 0) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays, axis)

    return Pass(each("pooled"), each("states"), each("logits"), each("damage", 1), each("skipped", 1))
