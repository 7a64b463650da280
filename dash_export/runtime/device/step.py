"""One token, or many, enqueued on a device: the dispatcher where engines run later than they are launched.

Hidden states alternate between two buffers, as on the host. `overlapped`: while segment i runs on the main stream, the
policies that read its input do so on the policy stream; their damage lands in pinned memory, the host waits for that
event alone, decides, and launches the next segment before segment i has ended. `sync`: the policy
stands in the main stream behind the segment whose input it reads. `plain`: nothing is asked and nothing waited for.
`device`: `graph.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.decision import Action
from dash_export.names import new_names, past_names, present_names
from dash_export.runtime.backends.base import Launch
from dash_export.runtime.device.base import Context, Device, DeviceEngine, Memory
from dash_export.runtime.device.blocks import Block, size_of
from dash_export.runtime.device.engines import BESIDE, MAIN, POLICY, DeviceCache, DeviceEngines
from dash_export.runtime.device.ranges import named
from dash_export.runtime.engines import SegmentEngines
from dash_export.runtime.rules import Rule

ALWAYS_RUN = -1

Kind = str | tuple[int, ...]
"""Which engine of a part: `run`, `skip`, or the policy about these layers that is asked before it."""


class Part:
    """One segment of a step. It does not know the step: without a circle between them a step that is dropped gives its
    memory and contexts back at once.
    """

    def __init__(self, device: Device, index: int, engines: SegmentEngines[DeviceEngine], row_bytes: int) -> None:
        self.index, self.engines = index, engines
        segment = engines.segment
        self.layer = segment.first if segment.gated else ALWAYS_RUN
        self.count = len(segment.layers)
        self.done = device.event(f"done {segment.name}")
        self.decided = device.event(f"decided {segment.name}") if engines.policies else None
        self.contexts: dict[Kind, Context] = {}
        # Engines of the `trt10` dialect give the new rows of K and V; others write the cache themselves.
        self.rows = {
            name: device.memory(row_bytes)
            for layer in segment.layers
            for name in new_names(layer)
            if name in engines.run.outputs()
        }


class DeviceStep:
    """Engines bound to one session's memory for steps of `sequence` tokens. The face is that of the host's
    `BoundStep`.
    """

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int, teacher_forced: bool = False) -> None:
        """`teacher_forced` steps give the logits of all their tokens, others those of the last one."""
        model = engines.model
        self.engines, self.device, self.sequence = engines, engines.device, sequence
        self._cache, self._teacher_forced = cache, teacher_forced
        self.main = self.device.stream(MAIN)
        self.policy = self.device.stream(POLICY) if engines.dispatch in BESIDE else self.main
        self._item = engines.dtype.itemsize
        rows = sequence if teacher_forced else 1
        inputs: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            "input_ids": ((1, sequence), np.int64),
            "position_ids": ((1, sequence), np.int64),
            "write_indices": ((1,), np.int64),
            "logit_rows": ((rows,), np.int64),
        }
        if engines.needs_mask:
            inputs["attention_mask"] = ((1, 1, sequence, cache.capacity), np.bool_)
        self._inputs = Block(self.device, inputs)
        self.input_ids = self._inputs.host["input_ids"]
        self._inputs.host["logit_rows"][:] = np.arange(sequence - rows, sequence)
        # a[l-1], a[l] in row l, as on the host; row by row on the device, for a policy reads it while others are made.
        self._history = Block(
            self.device, {f"{layer}": ((1, sequence, 2), np.float32) for layer in range(model.num_layers + 1)}
        )
        results = Block(
            self.device,
            {
                "logits": ((1, rows, model.vocab_size), np.float32),
                **{f"damage {layers[0]}": ((1, sequence, len(layers)), np.float32) for layers in engines.answers},
            },
        )
        self.logits, self._results = results.host["logits"], results
        # What one policy says of several layers lies side by side.
        self._answer = {
            layer: (f"damage {layers[0]}", column) for layers in engines.answers for column, layer in enumerate(layers)
        }
        self.damage = np.zeros((model.num_layers, sequence), np.float32)
        self.actions = np.zeros((sequence, model.num_layers), np.int8)
        self._hidden_bytes = sequence * model.hidden_size * self._item
        self.hidden = [self.device.memory(self._hidden_bytes) for _ in range(3 if teacher_forced else 2)]
        row_bytes = model.num_kv_heads * sequence * model.head_dim * self._item
        self.parts = [Part(self.device, index, item, row_bytes) for index, item in enumerate(engines.segments)]
        # A part's policies are decided together: the first of their layers waits for all.
        self._decided = {min(part.engines.policies)[0]: part.decided for part in self.parts if part.decided is not None}

    def context(self, part: Part, kind: Kind) -> Context:
        """Of an engine of a part, bound to this step's memory; made when it is first needed."""
        if kind not in part.contexts:
            engines = part.engines
            engine = (
                engines.policies[kind] if isinstance(kind, tuple) else {"run": engines.run, "skip": engines.skip}[kind]
            )
            assert engine is not None
            memory = self._memory_of(part, kind)
            names = (*engine.inputs(), *engine.outputs())
            shapes = {name: self._shape(name) for name in engine.inputs()}
            profile = self.engines.profile(self.sequence)
            part.contexts[kind] = engine.context(profile, shapes, {name: memory[name] for name in names})
        return part.contexts[kind]

    def _memory_of(self, part: Part, kind: Kind) -> Mapping[str, Memory]:
        here, there = self.hidden[part.index % 2], self.hidden[(part.index + 1) % 2]
        if isinstance(kind, tuple):
            # The input of the segment before, which is the other buffer.
            history = self._history.memory[str(kind[0] - 1)]
            return {"hidden": there, "actions": history, "damage": self._results.memory[f"damage {kind[0]}"]}
        out = self.hidden[2] if self._teacher_forced and kind == "skip" else there
        memory = {
            **self._inputs.memory,
            **part.rows,
            "hidden": here,
            "hidden_out": out,
            "logits": self._results.memory["logits"],
        }
        for layer in part.engines.segment.layers:
            caches = (self._cache.keys[layer], self._cache.values[layer])
            memory |= dict(zip((*past_names(layer), *present_names(layer)), caches * 2, strict=True))
        return memory

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._inputs.host:
            return self._inputs.host[name].shape
        if name == "hidden":
            return (1, self.sequence, self.engines.model.hidden_size)
        return (1, self.sequence, 2) if name == "actions" else self._cache.shape

    # --- one step

    def decode(self, token: int, rule: Rule) -> int:
        """One token under `rule`; returns the layers it ran. Logits, damage and `actions` are this object's arrays."""
        with self.engines.turn:
            return self._decode(token, rule)

    def prefill(self, tokens: npt.NDArray[np.int64], ask: bool = False) -> None:
        """`sequence` tokens, every layer. `ask`: the tokens' damage is wanted too."""
        with self.engines.turn:
            self._prefill(tokens, ask)

    def teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None:
        """`sequence` known tokens in one pass under `rule`, except rows where `dense` is true: what decode would have
        done. Where tokens differ both graphs run, and rows are copied.
        """
        with self.engines.turn:
            self._teacher_force(tokens, rule, dense)

    def _decode(self, token: int, rule: Rule) -> int:
        self.input_ids[0, 0] = token
        asks = self._begin(rule.asks)
        executed = 0
        for part in self.parts:
            layer = part.layer
            if layer == ALWAYS_RUN:
                self._launch(part, "run")
                executed += part.count
            elif rule.skips(layer, float(self._decision(part)[0]) if asks else 0.0, executed):  # in double, as all do
                self._note_skips(layer, slice(None))
                self._launch(part, "skip")
            else:
                self._launch(part, "run")
                executed += 1
            self._look_ahead(part, asks)
        self._end()
        return executed

    def _prefill(self, tokens: npt.NDArray[np.int64], ask: bool) -> None:
        self.input_ids[0] = tokens
        asks = self._begin(ask)
        for part in self.parts:
            if asks and part.layer != ALWAYS_RUN:
                self._decision(part)
            self._launch(part, "run")
            self._look_ahead(part, asks)
        self._end()

    def _teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None:
        self.input_ids[0] = tokens
        asks = self._begin(rule.asks)
        executed = np.zeros(self.sequence, np.int64)
        for part in self.parts:
            layer = part.layer
            if layer == ALWAYS_RUN:
                self._launch(part, "run")
                executed += part.count
            else:
                damage = self._decision(part) if asks else self.damage[layer]
                skipped = (rule.decide(layer, damage, executed) == Action.SKIP) & ~dense
                self._note_skips(layer, skipped)
                executed += ~skipped
                if not skipped.all():
                    self._launch(part, "run")
                if skipped.any():
                    self._launch(part, "skip")
                    self._select(part, skipped)
            self._look_ahead(part, asks)
        self._end()

    def launches(self) -> list[tuple[Launch, Launch | None]]:
        """Per segment what runs it and what skips it, to its end, to be timed one by one after `place`."""

        def timed(part: Part, kind: str) -> Launch:
            def launch() -> None:
                self._launch(part, kind)
                self.main.synchronize()

            return launch

        return [(timed(part, "run"), timed(part, "skip") if part.layer != ALWAYS_RUN else None) for part in self.parts]

    def place(self) -> None:
        """Say where the new tokens go: the rows after the cached ones."""
        self._note_positions()
        self._inputs.upload(self.main)

    def _note_positions(self) -> None:
        start, host = self._cache.length, self._inputs.host
        host["position_ids"][0] = np.arange(start, start + self.sequence)
        host["write_indices"][0] = start
        if "attention_mask" in host:
            host["attention_mask"][0, 0] = np.arange(self._cache.capacity) <= host["position_ids"][0][:, None]

    def _begin(self, wanted: bool) -> bool:
        """Start a step. Returns whether policies are asked."""
        self.place()
        self.actions.fill(Action.RUN)
        self.damage.fill(0.0)
        for history in self._history.host.values():
            history.fill(0.0)
        return wanted and self.engines.dispatch != "plain"

    def _end(self) -> None:
        self.main.download(self.logits, self._results.memory["logits"])
        with named("end of step"):
            self.main.synchronize()
        self._cache.length += self.sequence

    def _launch(self, part: Part, kind: str) -> None:
        """Enqueue a segment or its skip graph, and the cache writes that its engine leaves to the runtime."""
        context = self.context(part, kind)
        with named(context.name):
            self.main.run(context)
        start = self._cache.length * self.engines.model.head_dim * self._item
        for layer in part.engines.segment.layers if part.rows else ():
            for name, cache in zip(new_names(layer), (self._cache.keys[layer], self._cache.values[layer]), strict=True):
                self._write_rows(cache, start, part.rows[name])
        self.main.record(part.done)

    def _write_rows(self, cache: Memory, start: int, rows: Memory) -> None:
        model = self.engines.model
        head = model.head_dim * self._item
        whole, new = self._cache.capacity * head, self.sequence * head
        target = cache.part(start, cache.nbytes - start)
        self.main.copy_rows(target, whole, rows, new, new, model.num_kv_heads)

    def _look_ahead(self, part: Part, asks: bool) -> None:
        """Enqueue the policies that read the input of `part`, which has been launched.

        Overlapped, it waits only for what made the input of `part`, and so runs beside it.
        """
        following = self.parts[part.index + 1] if part.index + 1 < len(self.parts) else None
        if not asks or following is None or following.decided is None:
            return
        if self.policy is not self.main:
            self.policy.wait(self.parts[part.index - 1].done)
        for layers, engine in following.engines.policies.items():
            context = self.context(following, layers)
            history = str(layers[0] - 1)
            if "actions" in engine.inputs():
                self.policy.upload(self._history.memory[history], self._history.host[history])
            with named(context.name):
                self.policy.run(context)
            name = f"damage {layers[0]}"
            self.policy.download(self._results.host[name], self._results.memory[name])
        self.policy.record(following.decided)
        if self.policy is not self.main and following.layer == ALWAYS_RUN:
            self.main.wait(following.decided)  # it writes what they read, and no host waits before it

    def _decision(self, part: Part) -> npt.NDArray[np.float32]:
        """Damage [sequence] of skipping a gated part: the one thing the host waits for, once where layers are decided
        together.
        """
        if (decided := self._decided.get(part.layer)) is not None:
            with named(f"decide {part.engines.segment.name}"):
                decided.wait()
        self._note_damage(part.layer)
        found: npt.NDArray[np.float32] = self.damage[part.layer]
        return found

    def _note_damage(self, layer: int) -> None:
        """What a policy has said of it."""
        name, column = self._answer[layer]
        self.damage[layer] = self._results.host[name][0, :, column]

    def _note_skips(self, layer: int, skipped: Any) -> None:
        self.actions[skipped, layer] = Action.SKIP
        self._history.host[str(layer)][0, skipped, 1] = 1.0
        self._history.host[str(layer + 1)][0, skipped, 0] = 1.0

    def _select(self, part: Part, skipped: npt.NDArray[np.bool_]) -> None:
        """Rows of skipped tokens from the skip graph's buffer over those of the layer, run by run."""
        row = size_of((self.engines.model.hidden_size,), self.engines.dtype)
        into, source = self.hidden[(part.index + 1) % 2], self.hidden[2]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], skipped, [False]]).astype(np.int8)))
        for first, stop in edges.reshape(-1, 2).tolist():
            nbytes = (stop - first) * row
            self.main.copy(into.part(first * row, nbytes), source.part(first * row, nbytes))
        self.main.record(part.done)
