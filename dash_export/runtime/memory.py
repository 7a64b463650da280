"""The memory of a step, and engines bound to it.

Every buffer has one address for its life, hidden states alternate between two buffers, and each KV cache array is bound
as past and present alike, so a write is in place; what a bypass gives for the cache instead of writing it is written
after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dash_export.names import new_names, past_names, present_names, short_name
from dash_export.runtime.backends.base import Engine, Launch
from dash_export.runtime.cache import KVCache

if TYPE_CHECKING:
    from dash_export.runtime.engine_set import EngineSet, SegmentEngines

ALWAYS_RUN = -1


@dataclass(frozen=True)
class BoundSegment:
    """One segment's launches. `unit`: its place among the units, or ALWAYS_RUN. `mixed`, where rows may differ, runs or
    skips each as `skipped` [batch, sequence, 1] says.
    """

    unit: int
    run: Launch
    bypass: Launch | None = None
    mixed: Launch | None = None


class StepMemory:
    """The arrays of steps of `sequence` tokens of each of the cache's first `batch` sequences: `input_ids` [batch,
    sequence], `logits` [batch, rows, vocab], `damage` [batch, sequence, units], `hidden` states [batch, sequence,
    hidden], `skipped` [batch, sequence, 1].
    """

    def __init__(self, engines: EngineSet, cache: KVCache, sequence: int, batch: int, all_logits: bool) -> None:
        model = engines.model
        shape = (batch, sequence)
        self.sequence, self.batch = sequence, batch
        self._cache = cache
        self._model = model
        self._read = engines.read
        self.input_ids = np.zeros(shape, np.int64)
        self.logits = np.zeros((batch, sequence if all_logits else 1, model.vocab_size), np.float32)
        self.damage = np.zeros((*shape, len(engines.units)), np.float32)
        self.skipped = np.zeros((*shape, 1), np.bool_)
        self.hidden = [np.zeros((*shape, model.hidden_size), np.float32) for _ in range(2)]
        self._position_ids = np.zeros(shape, np.int64)
        self._write_indices = np.zeros(batch, np.int64)
        self._seqlens_k = np.zeros(batch, np.int32)
        self._total = np.zeros(1, np.int32)
        self._mask = np.zeros((batch, 1, sequence, cache.capacity), np.bool_) if engines.needs_mask else None
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "position_ids": self._position_ids,
            "write_indices": self._write_indices,
            "seqlens_k": self._seqlens_k,
            "total_length": self._total,
            "first_logit": np.array([0 if all_logits else sequence - 1], np.int64),
            "skipped": self.skipped,
            "logits": self.logits,
            "damage": self.damage,
        }
        if self._mask is not None:
            self._arrays["attention_mask"] = self._mask
        for layer in range(model.num_layers):
            pair = (cache.keys[layer][:batch], cache.values[layer][:batch])
            for name, array in zip((*past_names(layer), *present_names(layer)), pair * 2, strict=True):
                self._arrays[name] = self._arrays[short_name(name)] = array

    def bind(self, segments: Sequence[SegmentEngines], mixed: Sequence[Engine]) -> list[BoundSegment]:
        """`mixed`: one engine per unit where rows may differ, else none."""
        bound = []
        for index, item in enumerate(segments):
            here, there = self.hidden[index % 2], self.hidden[(index + 1) % 2]
            run = self._bind_chain(item.run, here, there)
            if item.bypass is None:
                bound.append(BoundSegment(ALWAYS_RUN, run))
                continue
            unit = sum(other.unit != ALWAYS_RUN for other in bound)
            bypass = self._bind_bypass(item.bypass, item.segment.layers, here, there)
            bound.append(BoundSegment(unit, run, bypass, self._bind(mixed[unit], here, there) if mixed else None))
        return bound

    def _bind(self, engine: Engine, here: npt.NDArray[np.float32], there: npt.NDArray[np.float32]) -> Launch:
        return engine.bind(self._arrays | {"hidden": here}, self._arrays | {"hidden_out": there})

    def _bind_chain(
        self, engines: Sequence[tuple[str, Engine]], here: npt.NDArray[np.float32], there: npt.NDArray[np.float32]
    ) -> Launch:
        """Engines in a row (portable graphs are several), the policy beside the state that it reads."""
        launches = []
        state = here
        for name, engine in engines:
            if name == "policy":
                launches.append(self._bind(engine, state, there))
                continue
            following = there if (name, engine) == engines[-1] else np.zeros_like(here)
            launches.append(self._bind(engine, state, following))
            state = following
        return _in_turn(launches)

    def _bind_bypass(
        self, engine: Engine, layers: range, here: npt.NDArray[np.float32], there: npt.NDArray[np.float32]
    ) -> Launch:
        """With the write of what the engine leaves to be written."""
        names = [[short_name(name) for name in new_names(layer)] for layer in layers]
        if names[0][0] not in engine.outputs:
            return self._bind(engine, here, there)
        model, cache, sequence = self._model, self._cache, self.sequence
        new = np.zeros((len(layers), 2, self.batch, sequence, model.num_kv_heads * model.head_dim), np.float32)
        outputs = {name: new[at, which] for at, pair in enumerate(names) for which, name in enumerate(pair)}
        launch = engine.bind(self._arrays | {"hidden": here}, outputs | {"hidden_out": there})
        rows = new.reshape(*new.shape[:4], model.num_kv_heads, model.head_dim).transpose(2, 3, 0, 1, 4, 5)
        writes = [(cache.rows(layers, index), rows[index]) for index in range(self.batch)]

        def launch_and_write() -> None:
            launch()
            for (into, found), start in zip(writes, cache.lengths, strict=False):
                into[start : start + sequence] = found

        return launch_and_write

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


def _in_turn(launches: Sequence[Launch]) -> Launch:
    if len(launches) == 1:
        return launches[0]

    def all_of_them() -> None:
        for launch in launches:
            launch()

    return all_of_them
