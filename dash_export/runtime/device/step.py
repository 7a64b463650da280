"""One token, or many, enqueued on a device: the counterpart of `decode.BoundStep` where engines run later than they are
launched.

A token is one launch per segment, and one of the policy where a rule uses damage. Hidden states alternate between two
buffers, as on the host. The dispatch modes differ in who waits for the policy:

- `sync`: the policy runs in the layers' stream. The host waits for its damage, decides, and launches the rest.
- `overlapped`: while the last layers before the first unit run on the main stream, the policy, which reads the state
  that entered them, runs on a stream of its own. The host waits only for the damage, and launches the first unit before
  the layers ahead of it have ended.
- `device`: as `overlapped`, but recorded once as a graph: a kernel takes all decisions, and every unit is a branch. The
  host fills inputs and limits, launches, and waits once for the end of the token. The kernel knows no `max_layers`
  (which ranks units by damage) and no forced actions: such tokens are launched one by one, as in `overlapped`.

In every mode a token whose actions are known beforehand (dense, static) is a graph of its own without decisions: this
is what skipping has to beat. Where nothing can be recorded, it is launched one by one too.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dash_export.decision import DecisionRule, Skips
from dash_export.errors import BackendError
from dash_export.names import new_names, past_names, present_names
from dash_export.runtime.backends import Launch as HostLaunch
from dash_export.runtime.device.buffers import Mirror
from dash_export.runtime.device.cuda import BESIDE, MAIN, CudaMemory, DeviceEngine, Launch
from dash_export.runtime.device.cuda_graph import CudaGraph
from dash_export.runtime.rules import DENSE, Rule

if TYPE_CHECKING:
    from dash_export.runtime.device.engines import DeviceCache, DeviceEngines, LoadedSegment

logger = logging.getLogger(__name__)

GRAPHS = 4
"""How many graphs of known actions a step keeps."""
READY, DECIDED = "state ready", "decided"
"""Events: the state that the policy reads is there; its damage is there."""


@dataclass(frozen=True)
class Part:
    """One segment, bound to a step's memory. `unit`: its place among the units. Where its engines leave the writing of
    K and V to the runtime, `new_rows` has (cache, rows), and `copies` has (sequence, its cache, its rows) of the same.

    A Part does not refer to its step: without a cycle, a step that is dropped frees its memory and contexts at once.
    """

    unit: int | None
    run: Launch
    bypass: Launch | None
    new_rows: list[tuple[CudaMemory, CudaMemory]]
    copies: list[tuple[int, CudaMemory, CudaMemory]]


class DeviceStep:
    """Engines bound to memory for steps of `sequence` tokens of one sequence, or of one token of each of the cache's
    first `batch` sequences. `logits` [batch, 1, vocab] are those of the last token; `damage` [units, tokens] is zero
    where no rule asked for it.

    Sequences decide together: a unit is skipped where every one of them would skip it.
    """

    final_state = None

    def __init__(self, engines: DeviceEngines, cache: DeviceCache, sequence: int, batch: int = 1) -> None:
        assert 1 in (sequence, batch)
        self.engines, self.device, self.sequence, self.batch = engines, engines.device, sequence, batch
        self._cache = cache
        self._graph: CudaGraph | None = None
        self._known = OrderedDict[bytes, CudaGraph]()
        self._warm = False
        model, units, item = engines.model, len(engines.units), engines.itemsize
        space = self._space = self.device if sequence == 1 else cache.prompts.again()
        self._new_bytes = sequence * model.num_kv_heads * cache.row_bytes
        self._ids = Mirror(space, (batch, sequence), np.int64)
        self._positions = Mirror(space, (batch, sequence), np.int64)
        self._limits = Mirror(space, (batch, units), np.float64)
        self._logits = Mirror(space, (batch, 1, model.vocab_size), np.float32)
        self._damage = Mirror(space, (batch, sequence, units), np.float32)
        self._skipped = Mirror(space, (units,), np.bool_)
        self.logits: npt.NDArray[np.float32] = self._logits.host
        self.damage: npt.NDArray[np.float32] = self._damage.host.reshape(batch * sequence, units).T
        self.skipped: Skips = np.zeros(self.damage.shape, np.bool_)
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
        new_rows = []
        for layer in loaded.segment.layers:
            names = zip(past_names(layer), present_names(layer), new_names(layer), strict=True)
            for (past, present, new), caches in zip(names, (self._cache.keys, self._cache.values), strict=True):
                memory[past] = memory[present] = caches[layer]
                if new in loaded.run.outputs:
                    memory[new] = self._space.memory(self.batch * self._new_bytes)
                    new_rows.append((caches[layer], memory[new]))
        bypass = self._bind(loaded.bypass, memory) if loaded.bypass is not None and self.sequence == 1 else None
        copies = [
            (index, into.part(index * self._cache.sequence_bytes), rows.part(index * self._new_bytes))
            for into, rows in new_rows
            for index in range(self.batch)
        ]
        return Part(loaded.unit, self._bind(loaded.run, memory), bypass, new_rows, copies)

    def _bind(self, engine: DeviceEngine, memory: dict[str, CudaMemory]) -> Launch:
        memory = self._memory | memory
        shapes = {name: self._shapes.get(name, self._cache_shape) for name in engine.inputs}
        # In the order of `building.gpu_backends`.
        profile = 0 if self.engines.recipe.profiles == 1 else 2 if self.batch > 1 else int(self.sequence > 1)
        return engine.bind(profile, shapes, {name: memory[name] for name in (*engine.inputs, *engine.outputs)})

    # --- one step

    def decode(self, token: int, rule: Rule) -> None:
        """Decode one token under `rule`."""
        self._advance(token, [rule])

    def prefill(self, tokens: npt.NDArray[np.int64]) -> None:
        """Prefill tokens [sequence] through every layer."""
        self._advance(tokens, [DENSE])

    def decode_batch(self, tokens: Sequence[int], rules: Sequence[Rule]) -> None:
        """Decode one token of every sequence, each under a rule of its own."""
        self._advance(np.array(tokens)[:, None], rules)

    def _advance(self, tokens: int | npt.NDArray[np.int64], rules: Sequence[Rule]) -> None:
        """Run a step for all sequences. `rules`: one for each sequence."""
        with self.engines.turn:
            self._ids.host[:] = tokens
            self._note_positions()
            graph = self._graph_for(rules)
            if graph is None:
                self._launch_all(rules)
            else:
                graph.launch(MAIN)
            self.device.synchronize(MAIN)
            if graph is not None and graph is self._graph:
                self.skipped[:] = self._skipped.host[:, None]
            for index in range(self.batch):
                self._cache.lengths[index] += self.sequence

    def _agreed(self, rules: Sequence[Rule]) -> Skips:
        """Return the units that all rules skip [units, 1]. All tokens of a step do the same."""
        first, *others = (rule.skips(self.damage[:, index : index + 1]) for index, rule in enumerate(rules))
        return np.logical_and.reduce([first, *others]) if others else first

    def _launch_all(self, rules: Sequence[Rule]) -> None:
        """Launch a step one by one, as in `sync` and `overlapped`."""
        asks = self._asks(rules)
        self._upload_inputs()
        self._launch_before_units(asks)
        self.damage.fill(0.0)
        if asks:
            stream = self.engines.policy_stream
            self.device.copy(stream, self._damage.host, self._damage.memory)
            self.device.record(stream, DECIDED)
            self.device.wait_for_event(DECIDED)
        self.skipped[:] = self._agreed(rules)
        for part in self.parts[self.engines.first :]:
            self.launch(part, part.unit is not None and bool(self.skipped[part.unit, 0]))
        self.device.copy(MAIN, self.logits, self._logits.memory)

    def _asks(self, rules: Sequence[Rule]) -> bool:
        """Return whether damage matters: not where the rules known beforehand (a dense one) leave no unit to skip."""
        known = [rule for rule in rules if not rule.asks]
        if self._policy is None or len(known) == len(rules):
            return False
        return not known or bool(self._agreed(known).any())

    def _graph_for(self, rules: Sequence[Rule]) -> CudaGraph | None:
        """Return the recorded step, and fill in what it needs; None where the step must be launched one by one. Graphs
        are for tokens whose actions are known and, in `device` dispatch, for rules that the kernel knows.
        """
        engines = self.engines
        if self.sequence > 1 or not engines.records:
            return None
        if not self._asks(rules):
            return self._known_graph(rules)
        deciding = [rule for rule in rules if isinstance(rule, DecisionRule) and not rule.fewest]
        if engines.dispatch != "device" or len(deciding) < len(rules):
            return None
        if self._graph is None:
            self._graph = self._recorded(len(engines.units), self._record)
        self._limits.host[:] = [rule.limits for rule in deciding]
        return self._graph

    def _known_graph(self, rules: Sequence[Rule]) -> CudaGraph | None:
        self.damage.fill(0.0)
        self.skipped[:] = self._agreed(rules)
        key = self.skipped.tobytes()
        if key not in self._known:
            graph = self._recorded(0, partial(self._record_known, self.skipped[:, 0].tolist()))
            if graph is None:
                return None
            self._known[key] = graph
            if len(self._known) > GRAPHS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _recorded(self, units: int, record: Callable[[CudaGraph], None]) -> CudaGraph | None:
        """Record a graph, or return None where that is impossible: then no graph with decisions is tried again or, if
        this one had none, no graph at all.
        """
        engines = self.engines
        self._warm_up()
        try:
            return self.device.graph(MAIN, units, record)
        except BackendError as error:
            if units:
                logger.warning("dispatch 'device' is not possible here (%s): this is 'overlapped'", error)
                engines.dispatch = "overlapped"
            else:
                logger.info("steps are not recorded here (%s): engines are launched one by one", error)
                engines.records = False
            return None

    def _warm_up(self) -> None:
        """Launch everything once: what an engine does at its first launch cannot be recorded. The cache row that this
        writes is the one that the token is about to write.
        """
        if self._warm:
            return
        self._upload_inputs()
        for part in self.parts:
            for launch in filter(None, (part.run, part.bypass)):
                launch(MAIN)
        self.device.synchronize(MAIN)
        if self._policy is not None:
            self._policy(self.engines.policy_stream)
            self.device.synchronize(self.engines.policy_stream)
        self._warm = True

    def _record_known(self, skipped: Sequence[bool], graph: CudaGraph) -> None:
        """Record a token whose actions are known."""
        self._upload_inputs()
        for part in self.parts:
            self.launch(part, part.unit is not None and skipped[part.unit], graph)
        self.device.copy(MAIN, self._logits.host, self._logits.memory)

    def _record(self, graph: CudaGraph) -> None:
        """Record a token of `device` dispatch, whatever its decisions."""
        self._upload_inputs()
        self.device.copy(MAIN, self._limits.memory, self._limits.host)
        self._launch_before_units(True, graph)
        self.device.record(BESIDE, DECIDED)
        self.device.wait(MAIN, DECIDED)
        graph.decide(MAIN, self._damage.memory, self._limits.memory, self._skipped.memory)
        for part in self.parts[self.engines.first :]:
            if part.unit is None:
                self.launch(part, graph=graph)
            else:
                run, skip = (partial(self.launch, part, bypass, graph) for bypass in (False, True))
                graph.branch(MAIN, part.unit, run, skip)
        for result in (self._logits, self._damage, self._skipped):
            self.device.copy(MAIN, result.host, result.memory)

    def _launch_before_units(self, asks: bool, graph: CudaGraph | None = None) -> None:
        """Enqueue the segments before the first unit, and the policy if `asks`. On a stream of its own the policy waits
        only for the state that it reads, and runs beside the last of these segments. That state is not overwritten
        before the decision: the first unit would overwrite it, and is launched later.
        """
        stream = self.engines.policy_stream
        for index, part in enumerate(self.parts[: self.engines.first]):
            if asks and index == self.engines.first - 1:
                self.device.record(MAIN, READY)
            self.launch(part, graph=graph)
        if asks:
            assert self._policy is not None
            if stream != MAIN:
                self.device.wait(stream, READY)
            self._policy(stream)

    def launch(self, part: Part, bypass: bool = False, graph: CudaGraph | None = None, stream: str = MAIN) -> None:
        """Enqueue a segment or its bypass, and the cache writes that its engine leaves to the runtime. New rows go
        after the cached ones or, where the step is recorded in `graph`, to a position that is read when it runs.
        """
        launch = part.bypass if bypass else part.run
        assert launch is not None
        launch(stream)
        cache, heads = self._cache, self.engines.model.num_kv_heads
        if graph is not None and part.new_rows:
            graph.write_rows(stream, part.new_rows, cache.pitch, cache.row_bytes, self._positions.memory)
            return
        width = self.sequence * cache.row_bytes
        for index, into, rows in part.copies:
            free = into.part(cache.lengths[index] * cache.row_bytes)
            self.device.copy_rows(stream, free, cache.pitch, rows, width, width, heads)

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

        def launch(part: Part, bypass: bool) -> None:
            self.launch(part, bypass)
            self.device.synchronize(MAIN)

        return [
            (partial(launch, part, False), partial(launch, part, True) if part.bypass else None) for part in self.parts
        ]
