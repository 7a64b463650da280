"""`device` dispatch: a whole decode step recorded once, with a branch per gated layer, and launched again and again.

Main stream: inputs up, then per segment the decision and its branch, then results down. Policy stream: the policies
that read a segment's input, beside it. They stand beside the branches and never inside one, so that they run whatever
is decided; both sides of a branch write one buffer, which is not the one they read. The host fills inputs and limits,
launches, and waits once for the end of the token.

Actions known beforehand (dense, static, forced) need no decision: `DeviceStep` launches them one by one.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from dash_export.decision import DecisionRule
from dash_export.errors import BackendError
from dash_export.names import new_names
from dash_export.runtime.device.base import Decision, Event, Graph, Recording, Stream
from dash_export.runtime.device.blocks import Block
from dash_export.runtime.device.engines import DeviceCache, DeviceEngines
from dash_export.runtime.device.ranges import named
from dash_export.runtime.device.step import ALWAYS_RUN, DeviceStep, Part
from dash_export.runtime.rules import Rule


class GraphStep(DeviceStep):
    """Decode steps of one token under a `DecisionRule` as one graph; everything else, and what cannot be recorded, as
    `DeviceStep` does it.
    """

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int) -> None:
        super().__init__(engines, cache, sequence)
        layers = engines.model.num_layers
        self._limits = Block(
            self.device,
            {"limit": ((layers,), np.float64), "ceiling": ((layers,), np.int32), "executed": ((1,), np.int32)},
        )
        self._taken = Block(self.device, {"action": ((layers,), np.int32)})
        self._begun = [self.device.event(f"begun {part.engines.segment.name}") for part in self.parts]
        # Layers that run anyhow before each layer: the device counts the others.
        gated = {part.layer for part in self.parts}
        self._always = np.cumsum([0, *(layer not in gated for layer in range(layers - 1))])
        self._graph: Graph | None = None
        self._recorded_at = 0

    def _decode(self, token: int, rule: Rule) -> int:
        if not isinstance(rule, DecisionRule) or not self._recorded():
            return super()._decode(token, rule)
        assert self._graph is not None
        self.input_ids[0, 0] = token
        self._note_positions()
        limits = self._limits.host
        limits["limit"][:] = rule.limits
        limits["ceiling"][:] = np.array(rule.ceilings) - self._always
        with named("graph of a step"):
            self._graph.launch(self.main)
        with named("end of step"):
            self.main.synchronize()
        self._cache.length += 1
        self.actions[0] = self._taken.host["action"]
        for part in self.parts:
            if part.layer != ALWAYS_RUN:
                self._note_damage(part.layer)
        return self.actions.shape[1] - int(self.actions.sum())

    def _recorded(self) -> bool:
        """Whether there is a graph, which is made at first and when memory has moved since."""
        if self.engines.dispatch != "device":
            return False
        if self._graph is None or self._recorded_at != self.device.moves:
            self._graph = None
            self._warm_up()
            try:
                self._graph, self._recorded_at = self.device.record(self.main, self._step), self.device.moves
            except BackendError as error:
                self.engines.record_no_steps(str(error))
        return self._graph is not None

    def _warm_up(self) -> None:
        """Launch every context once: what an engine does at its first launch cannot be recorded. The row that this
        writes to the caches is the one that the token is about to write.
        """
        self.place()
        # All are made before any is launched: making one may move the memory that others work in.
        contexts = [
            (self.policy if isinstance(kind, tuple) else self.main, self.context(part, kind))
            for part in self.parts
            for kind in (*(("run", "skip") if part.layer != ALWAYS_RUN else ("run",)), *part.engines.policies)
        ]
        for stream, context in contexts:
            stream.run(context)
        self.main.synchronize()
        self.policy.synchronize()

    def _step(self, recording: Recording) -> None:
        """Enqueue one token."""
        self._inputs.upload(self.main)
        self._limits.upload(self.main)
        for part, begun in zip(self.parts, self._begun, strict=True):
            decided = None
            if part.decided is not None:
                self.main.wait(part.decided)
            if part.layer != ALWAYS_RUN:
                decided = recording.decide(self.main, self._decision_about(part.layer))
            self.main.record(begun)
            self._policy_beside(part, begun)
            run, skip = (partial(self._side, part, kind, recording) for kind in ("run", "skip"))
            if decided is None:
                run(self.main)
            else:
                recording.branch(self.main, decided, run, skip)
        self._results.download(self.main)
        self._taken.download(self.main)

    def _decision_about(self, layer: int) -> Decision:
        """With the history's cells for this action: every token writes them before a policy reads them, and those of
        layers that always run stay zero, so the history is never uploaded.
        """
        limits, histories = self._limits.memory, self._history.memory
        name, column = self._answer[layer]
        return Decision(
            damage=self._results.memory[name].part(4 * column, 4),
            limit=limits["limit"].part(8 * layer, 8),
            ceiling=limits["ceiling"].part(4 * layer, 4),
            executed=limits["executed"],
            action=self._taken.memory["action"].part(4 * layer, 4),
            history=(histories[str(layer)].part(4, 4), histories[str(layer + 1)].part(0, 4)),
        )

    def _policy_beside(self, part: Part, begun: Event) -> None:
        """The policies that read the input of `part`, and the decision about it."""
        following = self.parts[part.index + 1] if part.index + 1 < len(self.parts) else None
        if following is not None and following.decided is not None:
            self.policy.wait(begun)
            for layers in following.engines.policies:
                self.policy.run(self.context(following, layers))
            self.policy.record(following.decided)

    def _side(self, part: Part, kind: str, recording: Recording, stream: Stream) -> None:
        """A segment or its skip graph, and the cache writes that its engine leaves to the runtime."""
        stream.run(self.context(part, kind))
        width = self.engines.model.head_dim * self._item
        pitch = self._cache.capacity * width
        position = self._inputs.memory["write_indices"]
        for layer in part.engines.segment.layers if part.rows else ():
            for name, cache in zip(new_names(layer), (self._cache.keys[layer], self._cache.values[layer]), strict=True):
                recording.write_rows(stream, cache, pitch, part.rows[name], width, position)
