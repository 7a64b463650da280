"""One engine of a build behind the inputs and outputs of its portable graph."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.build_record import POLICY, Build, Segment
from dash_export.bundle import Bundle
from dash_export.errors import BackendError, BundleError, RequestError
from dash_export.graph_runs import Arrays, step_inputs
from dash_export.manifest import ModelFacts
from dash_export.names import new_names, past_names, present_names, short_name
from dash_export.runtime.backends.base import Engine, Launch

_LENGTHS = ("seqlens_k", "total_length")
"""What engines take in place of a mask: it follows from the positions."""


@dataclass(frozen=True)
class EngineFacts:
    """Which engine, of which layers (none where it only reads what enters the first), and what its portable graph is
    called.
    """

    name: str
    portable: str
    segment: Segment


def find_engine(bundle: Bundle, build: Build, name: str) -> EngineFacts:
    """An engine by its name in the build: a segment, a bypass or the policy.

    Raises BundleError that lists the names, or says which segment a layer was merged into.
    """
    policy, known = bundle.manifest.policy, {}
    for segment in build.segments:
        known[segment.name] = EngineFacts(name, segment.name, segment)
    for unit in policy.units:
        segment = Segment(unit.first, unit.last, False, False, True)
        known[unit.bypass] = EngineFacts(name, unit.bypass, segment)
    nothing = Segment(policy.read, policy.read - 1, False, False, False)
    known[POLICY] = EngineFacts(name, POLICY, nothing)
    if name in known and name in build.engines:
        return known[name]
    merged = [item.name for item in build.segments if name in (f"layer_{layer:02d}" for layer in item.layers)]
    hint = f"{name} is part of the segment {merged[0]}. " if merged else ""
    raise BundleError(
        f"{bundle.root}: the build for {build.target!r} has no engine {name!r} that has a portable graph. {hint}"
        f"Engines: {', '.join(sorted(known.keys() & build.engines.keys()))}."
    )


class PortableEngine:
    """Runs one engine on the inputs of its portable graph. Memory is bound once per shape, as the runtime binds it."""

    def __init__(self, engine: Engine, facts: EngineFacts, model: ModelFacts, units: int) -> None:
        """`units`: how many the policy has."""
        self._engine = engine
        self._name = facts.name
        self._model = model
        self._units = units
        layers = facts.segment.layers
        portable = [name for layer in layers for name in (*past_names(layer), *present_names(layer))]
        self._portable = {short_name(name): name for name in portable} | {name: name for name in portable}
        # What the host writes into a cache: the engine's output, the cache before and after.
        rows = [
            (short_name(new), *cache)
            for layer in layers
            for new, *cache in zip(new_names(layer), past_names(layer), present_names(layer), strict=True)
        ]
        self._rows = [names for names in rows if names[0] in engine.outputs]
        self._key: object = None
        self._memory: Arrays = {}
        self._launch: Launch | None = None

    @property
    def inputs(self) -> dict[str, tuple[npt.DTypeLike, tuple[int | None, ...]]]:
        """Name -> type and shape of what `__call__` wants, in the portable form; None where a size is free.

        Raises BackendError when the engine is another one.
        """
        model = self._model
        known: dict[str, tuple[npt.DTypeLike, tuple[int | None, ...]]] = {
            "input_ids": (np.int64, (1, None)),
            "hidden": (np.float32, (1, None, model.hidden_size)),
            "position_ids": (np.int64, (1, None)),
            "write_indices": (np.int64, (1,)),
            "attention_mask": (np.bool_, (1, 1, None, None)),
            "first_logit": (np.int64, (1,)),
        }
        cache = (1, model.num_kv_heads, None, model.head_dim)
        known |= {name: (np.float32, cache) for name in self._portable.values() if name.startswith("past_")}
        names = [self._portable.get(name, name) for name in self._engine.inputs]
        names += [past for _, past, _ in self._rows]
        names = ["position_ids" if name in _LENGTHS else name for name in names]
        strange = sorted(set(names) - set(known))
        if strange:
            raise BackendError(f"{self._name} wants {strange[0]}, which its portable graph does not. Build it again.")
        return {name: known[name] for name in dict.fromkeys(names)}

    def __call__(self, feed: Mapping[str, npt.NDArray[Any]]) -> tuple[Arrays, float]:
        """Portable inputs -> portable outputs (this object's memory, valid until the next call) and the seconds the
        engine took, without copies. Raises RequestError for positions that are not consecutive or leave the cache.
        """
        placed = self._placed(feed)
        # The number of logits follows from a value, every other size from a shape.
        key = {name: placed[name].item() if name == "first_logit" else placed[name].shape for name in placed}
        if self._launch is None or key != self._key:
            self._launch = self._bind(placed)
            self._key = key
        for name, array in placed.items():
            self._memory[name][...] = array
        began = time.perf_counter()
        self._launch()
        self._write_rows()
        seconds = time.perf_counter() - began
        return self._outputs(), seconds

    def _placed(self, feed: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The feed and what follows from its positions."""
        if "position_ids" not in feed:
            return dict(feed)
        positions = feed["position_ids"][0]
        start, count = int(positions[0]), len(positions)
        capacity = min(
            (array.shape[2] for name, array in feed.items() if name.startswith("past_")), default=start + count
        )
        if not np.array_equal(positions, np.arange(start, start + count)) or not 0 <= start <= capacity - count:
            raise RequestError(
                f"position_ids must be consecutive and inside a cache of {capacity} rows; got {start} to "
                f"{int(positions[-1])}. Leave the inputs to the --dash runner, or give real ones with --load-inputs."
            )
        lengths = {name: array for name, array in step_inputs(start, count, 0).items() if name in _LENGTHS}
        return dict(feed) | lengths

    def _bind(self, placed: Mapping[str, npt.NDArray[Any]]) -> Launch:
        self._memory = {name: np.array(array) for name, array in placed.items()}
        count = placed["hidden" if "hidden" in placed else "input_ids"].shape[1]
        first = placed["first_logit"].item() if "first_logit" in placed else 0
        hidden, vocab = self._model.hidden_size, self._model.vocab_size
        shapes = {
            "hidden_out": (1, count, hidden),
            "logits": (1, count - first, vocab),
            "damage": (1, count, self._units),
        }
        shapes |= dict.fromkeys(
            [name for name, *_ in self._rows], (1, count, self._model.num_kv_heads * self._model.head_dim)
        )
        arrays: Arrays = {}
        for name in self._engine.outputs:
            portable = self._portable.get(name, name)
            # Past and present share their memory, as in a session: the write is in place.
            past = portable.replace("present.", "past_key_values.")
            arrays[name] = self._memory[past] if past in self._memory else np.zeros(shapes[name], np.float32)
            self._memory[portable] = arrays[name]
        inputs = {name: self._memory[self._portable.get(name, name)] for name in self._engine.inputs}
        return self._engine.bind(inputs, arrays)

    def _write_rows(self) -> None:
        for name, past, present in self._rows:
            rows, cache = self._memory[name], self._memory[past]
            start, count = int(self._memory["position_ids"][0, 0]), rows.shape[1]
            heads = rows.reshape(1, count, -1, self._model.head_dim)
            cache[:, :, start : start + count] = heads.swapaxes(1, 2)
            self._memory[present] = cache

    def _outputs(self) -> Arrays:
        written = {name: present for name, _, present in self._rows}
        names = [self._portable.get(name, name) for name in self._engine.outputs]
        return {written.get(name, name): self._memory[written.get(name, name)] for name in names}
