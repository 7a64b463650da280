"""One token, or many, enqueued on a device: the dispatcher where engines run later than they are launched.

A token is one launch per segment, and one of the policy where it is asked. Hidden states alternate between two buffers,
as on the host. `overlapped`: while the layers before the first unit run on the main stream, the policy, which reads
what entered them, does so on its own; damage lands in pinned memory, the host waits for that event alone, decides about
all units, and launches the first before the layers ahead of it have ended. `sync`: the policy stands in the main stream
behind those layers. `device`: `graph.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from dash_export.decision import Skips
from dash_export.names import new_names, past_names, present_names
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.device.base import Context, Device, DeviceEngine, Memory, Stream
from dash_export.runtime.device.blocks import Block
from dash_export.runtime.device.engines import MAIN, DeviceCache, DeviceEngines, LoadedSegment
from dash_export.runtime.rules import DENSE, Rule

ALWAYS_RUN = -1


class Part:
    """One segment of a step. It does not know the step: without a circle between them a step that is dropped gives its
    memory and contexts back at once. `unit`: its place among the units, or ALWAYS_RUN.
    """

    def __init__(self, device: Device, index: int, loaded: LoadedSegment, unit: int, row_bytes: int) -> None:
        self.index, self.loaded, self.unit = index, loaded, unit
        self.contexts: dict[bool, Context] = {}
        # Engines of the `trt10` dialect give the new rows of K and V; others write the cache themselves.
        self.rows = {
            name: device.memory(row_bytes)
            for layer in loaded.segment.layers
            for name in new_names(layer)
            if name in loaded.run.outputs()
        }


class DeviceStep:
    """Engines bound to one session's memory for steps of `sequence` tokens, with the logits of the last one. The face
    is that of the host's `BoundStep`; damage is zero where nobody asked.
    """

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int) -> None:
        model, units = engines.model, len(engines.units)
        self.engines, self.device, self.sequence = engines, engines.device, sequence
        self._cache = cache
        self.main, self.policy = self.device.stream(MAIN), self.device.stream(engines.policy_stream)
        self._ready, self._decided = self.device.event("state ready"), self.device.event("decided")
        self._asked: Context | None = None
        self._item = engines.dtype.itemsize
        self._inputs = Block(
            self.device,
            {
                "input_ids": ((1, sequence), np.int64),
                "position_ids": ((1, sequence), np.int64),
                "write_indices": ((1,), np.int64),
            },
        )
        self.input_ids = self._inputs.host["input_ids"]
        self._results = Block(
            self.device,
            {
                "logits": ((1, 1, model.vocab_size), np.float32),
                "damage": ((1, sequence, units), np.float32),
                "skipped": ((units, sequence), np.bool_),
            },
        )
        self.logits: npt.NDArray[np.float32] = self._results.host["logits"]
        self.damage: npt.NDArray[np.float32] = self._results.host["damage"][0].T
        self.skipped: Skips = self._results.host["skipped"]
        self._hidden_bytes = sequence * model.hidden_size * self._item
        self.hidden = [self.device.memory(self._hidden_bytes) for _ in range(2)]
        row_bytes = model.num_kv_heads * sequence * model.head_dim * self._item
        self.parts: list[Part] = []
        for index, item in enumerate(engines.segments):
            unit = sum(part.unit != ALWAYS_RUN for part in self.parts) if item.segment.gated else ALWAYS_RUN
            self.parts.append(Part(self.device, index, item, unit, row_bytes))

    def context(self, part: Part, bypass: bool = False) -> Context:
        """Of the engine that runs or skips a part, bound to this step's memory; made when it is first needed."""
        if bypass not in part.contexts:
            engine = part.loaded.bypass if bypass else part.loaded.run
            assert engine is not None
            part.contexts[bypass] = self._bound(engine, self._memory_of(part))
        return part.contexts[bypass]

    def asked(self) -> Context:
        """The policy, bound likewise."""
        if self._asked is None:
            assert self.engines.policy is not None
            state = self.hidden[(self.engines.first - 1) % 2]
            memory = {"hidden": state, "damage": self._results.memory["damage"]}
            self._asked = self._bound(self.engines.policy, memory)
        return self._asked

    def _bound(self, engine: DeviceEngine, memory: Mapping[str, Memory]) -> Context:
        shapes = {name: self._shape(name) for name in engine.inputs()}
        bound = {name: memory[name] for name in (*engine.inputs(), *engine.outputs())}
        return engine.context(self.engines.profile(self.sequence), shapes, bound)

    def _memory_of(self, part: Part) -> dict[str, Memory]:
        memory = {
            **self._inputs.memory,
            **part.rows,
            "hidden": self.hidden[part.index % 2],
            "hidden_out": self.hidden[(part.index + 1) % 2],
            "logits": self._results.memory["logits"],
        }
        for layer in part.loaded.segment.layers:
            caches = (self._cache.keys[layer], self._cache.values[layer])
            memory |= dict(zip((*past_names(layer), *present_names(layer)), caches * 2, strict=True))
        return memory

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._inputs.host:
            return self._inputs.host[name].shape
        return (1, self.sequence, self.engines.model.hidden_size) if name == "hidden" else self._cache.shape

    # --- one step

    def decode(self, token: int, rule: Rule) -> None:
        """One token under `rule`."""
        with self.engines.turn:
            self._advance(token, rule)

    def prefill(self, tokens: npt.NDArray[np.int64]) -> None:
        """`sequence` tokens, every layer."""
        with self.engines.turn:
            self._advance(tokens, DENSE)

    def _advance(self, tokens: int | npt.NDArray[np.int64], rule: Rule) -> None:
        """All tokens do the same: they are one, or run everything."""
        self.input_ids[0] = tokens
        self.place()
        self.damage.fill(0.0)
        asks = rule.asks and self.engines.policy is not None
        self._launch_before_units(asks)
        if asks:
            self.policy.download(self._results.host["damage"], self._results.memory["damage"])
            self.policy.record(self._decided)
            self._decided.wait()
        self.skipped[:] = rule.skips(self.damage)
        for part in self.parts[self.engines.first :]:
            self._launch(part, part.unit != ALWAYS_RUN and bool(self.skipped[part.unit, 0]))
        self.main.download(self.logits, self._results.memory["logits"])
        self.main.synchronize()
        self._cache.length += self.sequence

    def launches(self) -> list[tuple[Launch, Launch | None]]:
        """Per segment what runs it and what skips it, to its end, to be timed one by one after `place`."""

        def timed(part: Part, bypass: bool) -> Launch:
            def launch() -> None:
                self._launch(part, bypass)
                self.main.synchronize()

            return launch

        return [(timed(part, False), timed(part, True) if part.unit != ALWAYS_RUN else None) for part in self.parts]

    def place(self) -> None:
        """Say where the new tokens go: the rows after the cached ones."""
        self._note_positions()
        self._inputs.upload(self.main)

    def _note_positions(self) -> None:
        start, host = self._cache.length, self._inputs.host
        host["position_ids"][0] = np.arange(start, start + self.sequence)
        host["write_indices"][0] = start

    def _launch_before_units(self, asks: bool) -> None:
        """Enqueue what comes before the first unit, and the policy where it is asked. Beside, it waits only for the
        state that it reads, and so runs beside the last of that. Nothing writes there until all is decided: the first
        unit is what follows.
        """
        for part in self.parts[: self.engines.first]:
            if asks and part.index == self.engines.first - 1:
                self.main.record(self._ready)
            self._launch(part)
        if asks:
            if self.policy is not self.main:
                self.policy.wait(self._ready)
            self.policy.run(self.asked())

    def _launch(self, part: Part, bypass: bool = False, stream: Stream | None = None) -> None:
        """Enqueue a segment or its bypass, and the cache writes that its engine leaves to the runtime."""
        stream = stream or self.main
        stream.run(self.context(part, bypass))
        for cache, rows in self._written(part):
            self._write_rows(stream, cache, rows)

    def _written(self, part: Part) -> Iterator[tuple[Memory, Memory]]:
        """(cache, new rows)"""
        for layer in part.loaded.segment.layers if part.rows else ():
            for name, cache in zip(new_names(layer), (self._cache.keys[layer], self._cache.values[layer]), strict=True):
                yield cache, part.rows[name]

    def _write_rows(self, stream: Stream, cache: Memory, rows: Memory) -> None:
        model = self.engines.model
        head = model.head_dim * self._item
        start, whole, new = self._cache.length * head, self._cache.capacity * head, self.sequence * head
        target = cache.part(start, cache.nbytes - start)
        stream.copy_rows(target, whole, rows, new, new, model.num_kv_heads)
