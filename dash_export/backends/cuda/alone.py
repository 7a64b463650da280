"""Engines of a device launched one at a time. On states that are given: what each gives is read back, to be compared,
and how long the device took. And with the times of the layers inside each.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.cuda.bound import POLICY, BoundEngines
from dash_export.backends.cuda.cuda import MAIN, Cuda, Launch, Mirror
from dash_export.bundle import records
from dash_export.core.units import Unit

if TYPE_CHECKING:
    from dash_export.backends.cuda.engines import DeviceCache, DeviceEngines

Floats = npt.NDArray[np.float32]
BEGUN, DONE = "alone begun", "alone done"
"""Events around the last engine that was launched."""


class LoneEngines(BoundEngines):
    """Engines bound for steps of `sequence` tokens. `cache.lengths[0]` says where the step's tokens go."""

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int) -> None:
        super().__init__(engines, cache, sequence)
        model, activations = engines.model, engines.build.recipe.engine
        assert activations is not None
        self._bf16 = activations.activations == "bf16"
        self._kind = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[activations.activations]
        self._state = Mirror(self.device, (sequence, model.hidden_size), self._kind)
        self._rows = Mirror(self.device, (model.num_kv_heads, sequence, model.head_dim), self._kind)

    def begin(self, ids: npt.NDArray[np.int64]) -> None:
        """Begin a step of tokens [sequence]."""
        self._ids.host[:] = ids
        self.place()

    def run(self, place: int, bypass: bool, state: Floats | None) -> Floats:
        """Run the segment at `place`, or its bypass, on a state [sequence, hidden]; None: on the tokens. Return the
        state that it gives or, of the last segment, the logits [1, vocab] of the last token.
        """
        if state is not None:
            self._give(place, state)
        self._stamped(place, bypass, MAIN)
        is_last = place + 1 == len(self.parts)
        if is_last:
            self.device.copy(MAIN, self._logits.host, self._logits.memory)
        else:
            self.device.copy(MAIN, self._state.host, self._hidden[(place + 1) % 2])
        self.device.synchronize(MAIN)
        return self._logits.host[0].copy() if is_last else self._floats(self._state.host)

    def damage(self, state: Floats | None = None) -> Floats:
        """Return what the policy says [units] of a state [1, hidden]; None: of the one that the segment before the
        first unit was last given.
        """
        if state is not None:
            self._give(self.engines.first - 1, state)
            self.device.synchronize(MAIN)
        stream = self.engines.policy_stream
        self._stamped(POLICY, False, stream)
        self.device.copy(stream, self._damage.host, self._damage.memory)
        self.device.synchronize(stream)
        found: Floats = self._damage.host[0, 0].copy()
        return found

    @property
    def device_us(self) -> float:
        """Microseconds that the device took for the last engine, and the cache writes that it leaves to the runtime."""
        return self.device.between(BEGUN, DONE)

    def fill(self, layer: int, keys: Floats, values: Floats) -> None:
        """Write keys and values [kv_heads, rows, head_dim] of a layer into the cache, from the first position on."""
        cache = self._cache
        for memory, given in ((cache.keys[layer], keys), (cache.values[layer], values)):
            held, width = Mirror(self.device, given.shape, self._kind), given.shape[1] * cache.row_bytes
            held.host[:] = self._narrow(given)
            self.device.copy(MAIN, held.memory, held.host)
            self.device.copy_rows(MAIN, memory, cache.pitch, held.memory, width, width, len(given))
            self.device.synchronize(MAIN)

    def rows(self, layer: int) -> list[Floats]:
        """Return the keys and the values [sequence, kv_heads * head_dim] that this step has written of a layer."""
        cache, found = self._cache, []
        width = self.sequence * cache.row_bytes
        for memory in (cache.keys[layer], cache.values[layer]):
            written = memory.part(cache.lengths[0] * cache.row_bytes)
            self.device.copy_rows(MAIN, self._rows.memory, width, written, cache.pitch, width, len(self._rows.host))
            self.device.copy(MAIN, self._rows.host, self._rows.memory)
            self.device.synchronize(MAIN)
            found.append(self._floats(self._rows.host).swapaxes(0, 1).reshape(self.sequence, -1))
        return found

    def _give(self, place: int, state: Floats) -> None:
        self._state.host[:] = self._narrow(state)
        self.device.copy(MAIN, self._hidden[place % 2], self._state.host)

    def _stamped(self, place: int, bypass: bool, stream: str) -> None:
        self.device.stamp(stream, BEGUN)
        self.launch(place, bypass, stream)
        self.device.stamp(stream, DONE)

    def _narrow(self, array: Floats) -> npt.NDArray[Any]:
        return _bf16(array) if self._bf16 else array

    def _floats(self, array: npt.NDArray[Any]) -> Floats:
        return (array.astype(np.uint32) << 16).view(np.float32) if self._bf16 else array.astype(np.float32)


def layer_times(engines: DeviceEngines, context: int, repeats: int) -> list[dict[str, Any]]:
    """Launch every engine of a token at `context` cached ones alone and as it is, without graphs: `repeats` times, then
    as often with the backend's profiler of layers, which makes a launch slower. Return a row per engine: its `name`;
    `device_us`, the median microseconds without the profiler; `layers`, name -> median microseconds, in the order they
    ran. Raises BackendError where the backend has no such profiler.
    """
    cache, found, device = engines.cache(context), list[dict[str, Any]](), engines.device
    cache.reserve(context + 1)
    cache.lengths[0] = context
    with engines.turn:
        step = BoundEngines(engines, cache, 1)
        step.place()
        for place, loaded in enumerate(engines.segments):
            own = loaded.segment
            pieces = [(own.name, place, False)]
            pieces += [(Unit(own.first, own.last).bypass, place, True)] if own.gated else []
            asked = engines.policy is not None and place == engines.first - 1
            pieces += [(records.POLICY, POLICY, False)] if asked else []
            for name, which, bypass in pieces:
                launch, stream = step.bound(which, bypass), engines.policy_stream if which == POLICY else MAIN
                run = partial(_launched, device, launch, stream, repeats)
                found.append({"name": name, "device_us": run(), "layers": device.layer_times(launch, run)})
    return found


def _launched(device: Cuda, launch: Launch, stream: str, repeats: int) -> float:
    """Launch an engine alone, once to warm up and then `repeats` times. Return the median microseconds of these."""
    took = []
    for _ in range(1 + repeats):
        device.stamp(stream, BEGUN)
        launch(stream)
        device.stamp(stream, DONE)
        device.synchronize(stream)
        took.append(device.between(BEGUN, DONE))
    return median(took[1:])


def _bf16(array: Floats) -> npt.NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, as numbers of 16 bits."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
