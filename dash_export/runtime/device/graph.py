"""`device` dispatch: a whole decode step recorded once, with a branch per unit, and launched again and again.

Main stream: inputs up, the layers before the first unit, one kernel that takes all decisions, then per segment its
launch or its branch, then results down. Policy stream: the policy, beside those layers. It never stands inside a
branch, so that it runs whatever is decided; both sides of a branch write one buffer, which is not the one they read.
The host fills inputs and limits, launches, and waits once for the end of the token.

Actions known beforehand (dense, static, forced) need no decision, and `max_layers` ranks units by damage:
`DeviceStep` launches these one by one.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from dash_export.decision import DecisionRule
from dash_export.errors import BackendError
from dash_export.runtime.device.base import Decisions, Graph, Memory, Recording, Stream
from dash_export.runtime.device.blocks import Block
from dash_export.runtime.device.engines import DeviceCache, DeviceEngines
from dash_export.runtime.device.step import ALWAYS_RUN, DeviceStep
from dash_export.runtime.rules import Rule


class GraphStep(DeviceStep):
    """Decode steps of one token under a `DecisionRule` as one graph; everything else, and what cannot be recorded, as
    `DeviceStep` does it.
    """

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int) -> None:
        super().__init__(engines, cache, sequence)
        units = len(engines.units)
        self._limits = Block(self.device, {"limit": ((units,), np.float64), "handles": ((units, 2), np.uint64)})
        self._recording: Recording | None = None
        self._graph: Graph | None = None
        self._recorded_at = 0

    def _advance(self, tokens: int | npt.NDArray[np.int64], rule: Rule) -> None:
        if not isinstance(rule, DecisionRule) or rule.fewest or not self._recorded():
            super()._advance(tokens, rule)
            return
        assert self._graph is not None
        self.input_ids[0] = tokens
        self._note_positions()
        self._limits.host["limit"][:] = rule.limits
        self._graph.launch(self.main)
        self.main.synchronize()
        self._cache.length += 1

    def _recorded(self) -> bool:
        """Whether there is a graph, which is made at first and when memory has moved since."""
        if self.engines.dispatch != "device" or self.engines.policy is None:
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
        asked = self.asked()
        sides = ((False, True) if part.unit != ALWAYS_RUN else (False,) for part in self.parts)
        contexts = [self.context(part, bypass) for part, each in zip(self.parts, sides, strict=True) for bypass in each]
        for context in contexts:
            self.main.run(context)
        self.policy.run(asked)
        self.main.synchronize()
        self.policy.synchronize()

    def _step(self, recording: Recording) -> None:
        """Enqueue one token."""
        self._recording = recording
        try:
            self._inputs.upload(self.main)
            self._limits.upload(self.main)
            self._launch_before_units(asks=True)
            self.policy.record(self._decided)
            self.main.wait(self._decided)
            decided = recording.decide(self.main, self._decisions())
            for part in self.parts[self.engines.first :]:
                if part.unit == ALWAYS_RUN:
                    self._launch(part)
                else:
                    run, skip = (partial(self._launch, part, bypass) for bypass in (False, True))
                    recording.branch(self.main, decided[part.unit], run, skip)
            self._results.download(self.main)
        finally:
            self._recording = None

    def _decisions(self) -> Decisions:
        limits, results = self._limits, self._results.memory
        handles = limits.host["handles"]
        return Decisions(
            results["damage"], limits.memory["limit"], results["skipped"], limits.memory["handles"], handles
        )

    def _write_rows(self, stream: Stream, cache: Memory, rows: Memory) -> None:
        """Where the step is recorded, at a place that is read when it runs."""
        if self._recording is None:
            super()._write_rows(stream, cache, rows)
            return
        width = self.engines.model.head_dim * self._item
        position = self._inputs.memory["write_indices"]
        self._recording.write_rows(stream, cache, self._cache.capacity * width, rows, width, position)
