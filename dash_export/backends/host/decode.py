"""The decode loop on the host: load engines, bind them to memory and launch them conditionally, for one token or many.

Every buffer keeps one address for its life. Hidden states alternate between two buffers. Each KV cache array is bound
as past and present alike, so writes are in place. A row is one token of one sequence: a step has many tokens of one
sequence, or one token of each of many. The device's loop is `cuda/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import Launch, backend_errors, no_layer_times
from dash_export.backends.host.cache import KVCache
from dash_export.backends.host.segments import HostBackend, HostEngine, in_a_row, load_segments, timed_token
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import FINAL_STATE, new_names, past_names, present_names, short_name
from dash_export.bundle.records import DAMAGED, DRAFTER, MIXED, Build
from dash_export.core.facts import rope_tables
from dash_export.core.rule import DENSE, Rule, State, skips_for
from dash_export.core.sampling import Draw
from dash_export.core.units import Skips
from dash_export.errors import BundleError

Floats = npt.NDArray[np.float32]
MAX_SEQUENCES = 1024
SCORES = 32 << 20
"""Most bytes of attention scores in one pass: a larger buffer is mapped and cleared anew by glibc for every layer."""


class EngineSet:
    """All engines of a decoder, shared between sessions. `mixes`: whether the rows of a step may skip differently."""

    dispatch = "sync"
    shows_states = True
    """Whether a rule sees the state that enters the first unit, as policies of the user's need it."""
    grows = True
    """Whether a cache grows when more memory is needed."""
    timed, layer_times = timed_token, no_layer_times

    def __init__(self, bundle: Bundle, build: Build, backend: HostBackend) -> None:
        """Load all engines but the mixed ones. Raises BundleError where that of the policy is missing."""
        self._bundle, self._backend, self.build = bundle, backend, build
        self._seal = bundle.verify(build.files, hashes=False)
        self.model, policy = bundle.manifest.decoder, bundle.manifest.policy
        self.units = policy.units
        self.segments = load_segments(bundle, build, backend)
        self.mixes = all(MIXED + unit.name in build.engines for unit in self.units)
        self.sequences = MAX_SEQUENCES if self.mixes else 1
        """Most sequences that may decode together."""
        engines = [engine for item in self.segments for _, engine in item.run]
        if policy.has_network and not any("damage" in engine.outputs for engine in engines):
            # Without the policy's engine damage would stay zero, and a unit of zero damage is always skipped.
            raise BundleError(f"{bundle.root}: the build for {build.target!r} has no engine of the policy. {DAMAGED}")
        self.needs_mask = any("attention_mask" in engine.inputs for engine in engines)
        self._rotates = any(name.startswith("rope.") for engine in engines for name in engine.inputs)
        self._rope: dict[str, Floats] = {}
        self.takes_embeddings = not self.segments[0].segment.layers
        self.gives_state = any(FINAL_STATE in engine.outputs for engine in engines)
        self.drafter = backend.load(bundle.path(build.engines[DRAFTER].file)) if DRAFTER in build.engines else None

    @cached_property
    def mixed(self) -> Sequence[HostEngine]:
        """Mixed engines, one per unit, for steps whose rows skip differently. They hold the units' weights once more,
        so they are loaded when first needed. Raises BundleError where a file of the build was replaced since the other
        engines were loaded.
        """
        self._bundle.check_same(self._seal)
        files = [self.build.engines[MIXED + unit.name].file for unit in self.units]
        mixed = [self._backend.load(self._bundle.path(file)) for file in files]
        self._bundle.check_same(self._seal)
        return mixed

    def rows_at_once(self, capacity: int) -> int:
        """Return how many tokens one pass over a cache of `capacity` rows may hold: their scores fit SCORES bytes."""
        return max(1, SCORES // (4 * self.model.num_heads * max(1, capacity)))

    def rope(self, rows: int) -> dict[str, Floats]:
        """Return the engines' RoPE inputs for `rows` positions; all sessions share their memory."""
        tables = self._rope  # another thread may replace them meanwhile, by shorter ones
        if self._rotates and rows > min(map(len, tables.values()), default=-1):
            tables = self._rope = rope_tables(self.model, rows)
        return {name: table[:rows] for name, table in tables.items()}

    def cache(self, step: int, sequences: int = 1) -> KVCache:
        """Return a cache for one session, or for a batch of `sequences`; it grows by `step` rows."""
        return KVCache(self.model, step, sequences)

    def step(
        self, cache: KVCache, sequence: int, teacher_forced: bool = False, batch: int = 1, mixes: bool = True
    ) -> BoundStep:
        """Bind these engines to the memory of one session, or of the first `batch` sequences of a batch. Without
        `mixes` all rows of a step run or skip the same units.
        """
        return BoundStep(self, cache, sequence, teacher_forced, batch, mixes)


@dataclass(frozen=True)
class BoundSegment:
    """Launches of one segment. `unit`: its place among the units, if it is one. `mixed` decides row by row."""

    unit: int | None
    run: Launch
    bypass: Launch | None = None
    mixed: Launch | None = None


class BoundStep:
    """Engines bound to memory for steps of `sequence` tokens of each of the cache's first `batch` sequences.

    This object owns these arrays, which hold the last step's results: `logits` [batch, rows, vocab] float32, `damage`
    [units, batch * sequence] float32, `skipped` [units, batch * sequence] bool, and `final_state` [batch, rows, hidden]
    float32, normed. To time launches, replace `segments` by wrapped ones.
    """

    def __init__(
        self,
        engines: EngineSet,
        cache: KVCache,
        sequence: int,
        teacher_forced: bool = False,
        batch: int = 1,
        mixes: bool = True,
    ) -> None:
        """Bind the engines. `teacher_forced` steps give the logits of all their tokens, others those of the last."""
        self.sequence, self.batch, self._cache = sequence, batch, cache
        shape, units = (batch, sequence), len(engines.units)
        damage = np.zeros((*shape, units), np.float32)
        self.input_ids = np.zeros(shape, np.int64)
        self.logits = np.zeros((batch, sequence if teacher_forced else 1, engines.model.vocab_size), np.float32)
        self.final_state = np.zeros((*self.logits.shape[:2], engines.model.hidden_size), np.float32)
        self.damage: Floats = damage.reshape(batch * sequence, units).T
        self.skipped: Skips = np.zeros(self.damage.shape, np.bool_)
        self._position_ids = np.zeros(shape, np.int64)
        self._write_indices = np.zeros(batch, np.int64)
        self._seqlens_k = np.zeros(batch, np.int32)
        self._total = np.zeros(1, np.int32)
        self._row_skips = np.zeros((*shape, 1), np.bool_)
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "position_ids": self._position_ids,
            "write_indices": self._write_indices,
            "seqlens_k": self._seqlens_k,
            "total_length": self._total,
            "first_logit": np.array([0 if teacher_forced else sequence - 1], np.int64),
            "skipped": self._row_skips,
            "logits": self.logits,
            FINAL_STATE: self.final_state,
            "damage": damage,
            **engines.rope(cache.capacity),
        }
        self._mask = np.zeros((batch, 1, sequence, cache.capacity), np.bool_) if engines.needs_mask else None
        if self._mask is not None:
            self._arrays["attention_mask"] = self._mask
        for layer in range(engines.model.num_layers):
            pair = (cache.keys[layer][:batch], cache.values[layer][:batch])
            for name, array in zip((*past_names(layer), *present_names(layer)), pair * 2, strict=True):
                self._arrays[name] = self._arrays[short_name(name)] = array
        mixed = engines.mixed if mixes and (teacher_forced or batch > 1) else ()
        self.segments: Sequence[BoundSegment] = [*self._bound(engines, mixed)]
        gated = (place for place, item in enumerate(self.segments) if item.unit is not None)
        self._first = next(gated, len(self.segments))

    # --- one step

    def decode(self, token: int, rule: Rule, draw: Draw | None = None) -> None:  # noqa: ARG002
        """Decode one token under `rule`. `draw` means something to devices only."""
        self.input_ids[0, 0] = token
        self._advance(partial(skips_for, rule))

    def prefill(self, tokens: npt.NDArray[np.int64]) -> None:
        """Prefill tokens [sequence] through every layer."""
        self.input_ids[0] = tokens
        self._advance(partial(skips_for, DENSE))

    def prefill_embeddings(self, embeddings: Floats) -> None:
        """Prefill embeddings [sequence, hidden], instead of tokens, through every layer."""
        self.input_ids[0] = 0
        self._embedded[0] = embeddings
        self._advance(partial(skips_for, DENSE), first=1)

    def embed(self, tokens: npt.NDArray[np.int64]) -> Floats:
        """Return the embeddings [sequence, hidden] of tokens [sequence]."""
        self.input_ids[0] = tokens
        self.segments[0].run()
        return np.array(self._embedded[0])

    def teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None:
        """Run known tokens [sequence] in one pass as decode would run them under `rule`, every layer where `dense`."""
        self.input_ids[0] = tokens
        self._advance(lambda state: skips_for(rule, state) & ~dense)

    def decode_batch(self, tokens: Sequence[int], rules: Sequence[Rule], draws: Sequence[Draw | None] = ()) -> None:  # noqa: ARG002
        """Decode one token of every sequence, each under a rule of its own."""
        self.input_ids[:, 0] = tokens
        self._advance(
            lambda state: np.hstack([skips_for(rule, state, slice(row, row + 1)) for row, rule in enumerate(rules)])
        )

    @backend_errors
    def _advance(self, decide: Callable[[State], Skips], first: int = 0) -> None:
        """Run a step for all rows: decide when damage is known, then run or skip each unit or, where rows differ,
        launch its mixed engine. Segments before `first` have run already.
        """
        self.place()
        for segment in self.segments[first : self._first]:
            launch = segment.run
            launch()
        self.skipped[:] = decide(self._state)
        some: Any = self.skipped.any(axis=1)
        every: Any = self.skipped.all(axis=1)
        for segment in self.segments[self._first :]:
            unit, launch = segment.unit, segment.run
            if unit is not None and every[unit]:
                launch = segment.bypass  # type: ignore[assignment]  # a unit has one
            elif unit is not None and some[unit]:
                self._row_skips.reshape(-1)[:] = self.skipped[unit]
                launch = segment.mixed  # type: ignore[assignment]  # and steps of several rows have these
            launch()
        for row in range(self.batch):
            self._cache.lengths[row] += self.sequence

    def place(self) -> None:
        """Tell the engines where the new tokens go: the rows after the cached ones."""
        lengths, sequence = self._cache.lengths[: self.batch], self.sequence
        for row, start in enumerate(lengths):
            self._position_ids[row] = start if sequence == 1 else np.arange(start, start + sequence)
            self._write_indices[row] = start
            self._seqlens_k[row] = start + sequence - 1
        self._total[0] = max(lengths) + sequence
        if self._mask is not None:
            self._mask[:, 0] = np.arange(self._mask.shape[-1]) <= self._position_ids[..., None]

    def launches(self) -> list[tuple[Launch, Launch | None]]:
        """Return (run, bypass) of every segment, to be timed one by one after `place`."""
        return [(item.run, item.bypass) for item in self.segments]

    # --- binding

    def _bound(self, engines: EngineSet, mixed: Sequence[HostEngine]) -> Iterator[BoundSegment]:
        """Bind every segment. `mixed`: one engine per unit where rows may differ, else none."""
        hidden = [np.zeros((*self.input_ids.shape, engines.model.hidden_size), np.float32) for _ in range(2)]
        unit, first = 0, next((at for at, item in enumerate(engines.segments) if item.bypass is not None), 0)
        entering = hidden[first % 2].reshape(-1, engines.model.hidden_size)
        self._embedded = hidden[1]
        """The output of the first segment."""
        shown: list[Any] = [entering, self.damage, self._position_ids.reshape(-1), self.input_ids.reshape(-1)]
        shown = [array.view() for array in shown]
        for view in shown:  # to policies of the user's: the next engines take what lies there
            view.flags.writeable = False
        self._state = State(*shown)
        for index, item in enumerate(engines.segments):
            before, after = hidden[index % 2], hidden[(index + 1) % 2]
            run = self._bind_run(item.run, before, after)
            if item.bypass is None:
                yield BoundSegment(None, run)
                continue
            bypass = self._bind_bypass(item.bypass, item.segment.layers, before, after)
            yield BoundSegment(unit, run, bypass, self._bind(mixed[unit], before, after) if mixed else None)
            unit += 1

    def _bind(
        self, engine: HostEngine, before: Floats, after: Floats, outputs: Mapping[str, Floats] | None = None
    ) -> Launch:
        return engine.bind({**self._arrays, "hidden": before}, {**self._arrays, **(outputs or {}), "hidden_out": after})

    def _bind_run(self, engines: Sequence[tuple[str, HostEngine]], before: Floats, after: Floats) -> Launch:
        """Bind engines that run in a row (portable graphs are several); the policy reads the next engine's input."""
        launches, state = [], before
        for name, engine in engines:
            following = after if name == "policy" or (name, engine) == engines[-1] else np.zeros_like(before)
            launches.append(self._bind(engine, state, following))
            state = state if name == "policy" else following
        return in_a_row(launches)

    def _bind_bypass(self, engine: HostEngine, layers: range, before: Floats, after: Floats) -> Launch:
        """Bind a unit's bypass. Its launch also writes the unit's K and V where the engine leaves that to the host."""
        names = [[short_name(name) for name in new_names(layer)] for layer in layers]
        if names[0][0] not in engine.outputs:
            return self._bind(engine, before, after)
        cache, sequence = self._cache, self.sequence
        kv_heads, head_dim = cache.keys.shape[2], cache.keys.shape[4]
        new = np.zeros((len(layers), 2, self.batch, sequence, kv_heads * head_dim), np.float32)
        outputs = {name: new[at, which] for at, pair in enumerate(names) for which, name in enumerate(pair)}
        launch = self._bind(engine, before, after, outputs)
        rows = new.reshape(*new.shape[:4], kv_heads, head_dim).transpose(2, 3, 0, 1, 4, 5)
        writes = [(cache.rows(layers, index), rows[index]) for index in range(self.batch)]

        def launch_and_write() -> None:
            launch()
            for (into, found), start in zip(writes, cache.lengths, strict=False):
                into[start : start + sequence] = found

        return launch_and_write
