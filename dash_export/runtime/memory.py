"""The memory of a step, and engines bound to it.

Every buffer has one address for its life, hidden states alternate between two buffers, and each KV cache array is bound
as past and present alike, so a write is in place; what a skip graph gives for the cache instead of writing it is
written after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.build_record import Segment, Stretch
from dash_export.names import POLICY_STATE, new_names, past_names, present_names, short_name
from dash_export.runtime.backends.base import Engine, Launch
from dash_export.runtime.cache import KVCache
from dash_export.runtime.engines import SegmentEngines
from dash_export.runtime.plan import BoundSegment, BoundStretch

if TYPE_CHECKING:
    from dash_export.runtime.engine_set import EngineSet

SKIPPED = 2
"""Index of the buffer that skip graphs write where rows differ in their actions."""


class StepMemory:
    """The arrays of steps of `sequence` tokens of each of the cache's first `batch` sequences: `input_ids` [batch,
    sequence], `logits` [batch, rows, vocab], `history` [layers + 1, batch, sequence, 2], `damage` [layers, tokens],
    `hidden` states [batch, sequence, hidden]; `score_of` a gated layer [batch, sequence], which lie in `score` one
    after another.
    """

    def __init__(self, engines: EngineSet, cache: KVCache, sequence: int, batch: int, all_logits: bool) -> None:
        model = engines.model
        shape = (batch, sequence)
        self.sequence, self.batch = sequence, batch
        self._cache = cache
        self._model = model
        self.input_ids = np.zeros(shape, np.int64)
        self.logits = np.zeros((batch, sequence if all_logits else 1, model.vocab_size), np.float32)
        # a[l-1], a[l] for every layer l: layer l's engine reads row l.
        self.history = np.zeros((model.num_layers + 1, *shape, 2), np.float32)
        self.damage = np.zeros((model.num_layers, batch * sequence), np.float32)
        # What one engine answers is one array: [batch, 1, sequence] about one layer, [batch, sequence, layers] about
        # several. Of one token all of them in the order of layers.
        self._points = engines.decision_points
        self.score = np.zeros(batch * sequence * len(engines.gated), np.float32)
        self._answers: dict[int, npt.NDArray[np.float32]] = {}
        self.score_of: dict[int, npt.NDArray[np.float32]] = {}
        for layers in engines.answers:
            start = batch * sequence * len(self.score_of)
            answer = self.score[start : start + batch * sequence * len(layers)].reshape(batch, sequence, len(layers))
            self.score_of |= {layer: answer[..., index] for index, layer in enumerate(layers)}
            self._answers[layers[0]] = answer if len(layers) > 1 else answer.reshape(batch, 1, sequence)
        # Two buffers in turn; run and skip write the same one, but where rows differ skip has its own and each row
        # takes from the one or the other.
        self._rows_differ = all_logits or batch > 1
        self.hidden = [np.zeros((*shape, model.hidden_size), np.float32) for _ in range(3 if self._rows_differ else 2)]
        self._position_ids = np.zeros(shape, np.int64)
        self._write_indices = np.zeros(batch, np.int64)
        self._seqlens_k = np.zeros(batch, np.int32)
        self._total = np.zeros(1, np.int32)
        self._mask = np.zeros((batch, 1, sequence, cache.capacity), np.bool_) if engines.needs_mask else None
        self._inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "position_ids": self._position_ids,
            "write_indices": self._write_indices,
            "seqlens_k": self._seqlens_k,
            "total_length": self._total,
            "first_logit": np.array([0 if all_logits else sequence - 1], np.int64),
        }
        if self._mask is not None:
            self._inputs["attention_mask"] = self._mask

    def bind(
        self, segments: Sequence[SegmentEngines[Engine]], stretches: Sequence[tuple[Stretch, Engine]]
    ) -> list[BoundSegment]:
        """`stretches` are for the decoding of one token."""
        bound = []
        state = self.hidden[0]
        for index, item in enumerate(segments):
            segment = item.segment
            here, there = self.hidden[index % 2], self.hidden[(index + 1) % 2]
            skipped = {"hidden_out": self.hidden[SKIPPED] if self._rows_differ else there}
            shared = self._shared(segment.layers, here)
            policies = []
            for (layer, *_), engine in item.policies.items():
                inputs = {"hidden": state, "actions": self.history[layer - 1], "layer": np.array([layer])}
                policies.append(engine.bind(inputs, self._decision(layer)))
            # What policy engines of their own read: the input of this segment's layer, or of one inside it.
            state = np.zeros_like(here) if POLICY_STATE in item.run.outputs else here
            outputs = shared | self._outputs(segment) | {POLICY_STATE: state}
            bound.append(
                BoundSegment(
                    segment.first if segment.gated else -1,
                    len(segment.layers),
                    item.run.bind(shared, outputs | {"hidden_out": there}),
                    None
                    if item.skip is None
                    else self._bind_skip(item.skip, segment.layers, shared, outputs | skipped),
                    _in_turn(policies),
                    there,
                    self._bind_stretches(index, [item for item in stretches if item[0].first == segment.first]),
                )
            )
        return bound

    def _bind_stretches(self, index: int, stretches: Sequence[tuple[Stretch, Engine]]) -> tuple[BoundStretch, ...]:
        """Those that begin with the segment of this index. Where one of an even number of layers runs it writes what it
        reads: all that reads it leads to the graph's last node, which writes.
        """
        found = []
        for stretch, engine in stretches:
            count = len(stretch.layers)
            here, there = self.hidden[index % 2], self.hidden[(index + count) % 2]
            inputs = self._shared(stretch.layers, here)
            if stretch.skips:
                # Its K and V may be computed when the state has been: neither leads to the other.
                apart = np.zeros_like(there)
                skip = self._bind_skip(engine, stretch.layers, inputs, inputs | {"hidden_out": apart})
                launch = _then_copy(skip, there, apart)
            else:
                launch = engine.bind(inputs, inputs | {"hidden_out": there})
            found.append(BoundStretch(count, stretch.skips, launch))
        return tuple(found)

    def _bind_skip(
        self,
        skip: Engine,
        layers: range,
        inputs: dict[str, npt.NDArray[Any]],
        outputs: dict[str, npt.NDArray[Any]],
    ) -> Launch:
        """With the write of what the engine leaves to be written."""
        names = [[short_name(name) for name in new_names(layer)] for layer in layers]
        if names[0][0] not in skip.outputs:
            return skip.bind(inputs, outputs)
        model, cache, sequence = self._model, self._cache, self.sequence
        new = np.zeros((len(layers), 2, self.batch, sequence, model.num_kv_heads * model.head_dim), np.float32)
        outputs = outputs | {name: new[at, which] for at, pair in enumerate(names) for which, name in enumerate(pair)}
        launch = skip.bind(inputs, outputs)
        rows = new.reshape(*new.shape[:4], model.num_kv_heads, model.head_dim).transpose(2, 3, 0, 1, 4, 5)
        writes = [(cache.rows(layers, index), rows[index]) for index in range(self.batch)]

        def launch_and_write() -> None:
            launch()
            for (into, found), start in zip(writes, cache.lengths, strict=False):
                into[start : start + sequence] = found

        return launch_and_write

    def _shared(self, layers: range, hidden: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        shared = {**self._inputs, "hidden": hidden, "actions": self.history[max(layers.stop - 1, 0)]}
        for layer in layers:
            arrays = (self._cache.keys[layer][: self.batch], self._cache.values[layer][: self.batch])
            for name, array in zip((*past_names(layer), *present_names(layer)), arrays * 2, strict=True):
                shared[name] = shared[short_name(name)] = array
        return shared

    def _outputs(self, segment: Segment) -> dict[str, npt.NDArray[Any]]:
        outputs: dict[str, npt.NDArray[Any]] = {"logits": self.logits}
        for layer in segment.layers:
            if layer in self._points:
                outputs |= self._decision(self._points[layer][0])
        return outputs

    def _decision(self, layer: int) -> dict[str, npt.NDArray[np.float32]]:
        """Where a policy answers for `layer`, with the damage, or for it and those after it, with their scores."""
        return {"damage": self.damage[layer].reshape(self.batch, -1), "score": self._answers[layer]}

    def place(self) -> None:
        """Say where the new tokens go: the rows after the cached ones."""
        lengths, sequence = self._cache.lengths[: self.batch], self.sequence
        for row, start in enumerate(lengths):
            if sequence == 1:
                self._position_ids[row, 0] = start
            else:
                self._position_ids[row] = np.arange(start, start + sequence)
            self._write_indices[row] = start
            self._seqlens_k[row] = start + sequence - 1
        self._total[0] = max(lengths) + sequence
        if self._mask is not None:
            self._mask[:, 0] = np.arange(self._mask.shape[-1]) <= self._position_ids[..., None]


def _in_turn(launches: Sequence[Launch]) -> Launch | None:
    if len(launches) < 2:
        return launches[0] if launches else None

    def all_of_them() -> None:
        for launch in launches:
            launch()

    return all_of_them


def _then_copy(launch: Launch, into: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> Launch:
    def launch_and_copy() -> None:
        launch()
        into[...] = found

    return launch_and_copy
