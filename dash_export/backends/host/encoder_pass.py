"""The loop of an encoder on the host: run layers up to the next exit, decide for each picture whether it leaves there,
and go on with the others. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import Launch, backend_errors
from dash_export.backends.host.segments import HostBackend, HostEngine, Timed, in_a_row, load_segments
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import POOLED, STATES
from dash_export.bundle.records import POLICY, Build
from dash_export.core.exits import BEFORE
from dash_export.core.units import Damages, Skips

Floats = npt.NDArray[np.float32]
Arrays = dict[str, npt.NDArray[Any]]
Leaves = Callable[[int, Damages], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Pass:
    """Results of n pictures or texts: `pooled` [n, hidden], `states` [n, tokens, hidden] (None where one left early),
    `logits` [n, labels] (None without a classifier), `damage` and `skipped` [units, n]. Damage is zero where nobody
    asked for it, and infinite where the guard holds a picture back.
    """

    pooled: Floats
    states: Floats | None
    logits: Floats | None
    damage: Damages
    skipped: Skips


def _put(
    found: Arrays, answer: Arrays, gone: npt.NDArray[np.bool_], pictures: npt.NDArray[np.intp], count: int
) -> None:
    """Put the answers of those rows that are `gone` in the places of their `pictures`, of `count`."""
    for name, array in answer.items():
        if len(pictures) == count:
            found[name] = array
        elif name != STATES:  # whole batches only have states
            found.setdefault(name, np.empty((count, *array.shape[1:]), np.float32))[pictures] = array[gone]


class EncoderEngines:
    """All engines of an encoder's build, shared between threads: a pass has its own memory."""

    dispatch = "sync"

    def __init__(self, bundle: Bundle, build: Build, backend: HostBackend) -> None:
        """Load all engines."""
        self.build, self.model, policy = build, bundle.manifest.encoder, bundle.manifest.policy
        seal = bundle.verify(build.files, hashes=False)
        self.units = policy.units
        self.segments = load_segments(bundle, build, backend)
        self.policy: HostEngine | None = None
        if policy.has_network:
            self.policy = backend.load(bundle.path(build.engines[POLICY].file))
        self._read = next(place for place, item in enumerate(self.segments) if item.segment.last + 1 >= policy.read) + 1
        bundle.check_same(seal)

    @backend_errors
    def encode(self, array: npt.NDArray[Any], leaves: Leaves, asks: bool) -> Pass:
        """Run pictures [n, 3, height, width] float32, or texts of one length, int64 [n, tokens]. `leaves(unit, damage)`
        says which of them leave at an exit, for its damage [n]; `asks`: whether it needs the damage.
        """
        count = len(array)
        damage, skipped = np.zeros((len(self.units), count), np.float32), np.zeros((len(self.units), count), np.bool_)
        rows, foreign = np.arange(count), np.zeros(count, np.float32)  # rows: the pictures that are still here
        before, state, found, unit = self._no_answers(count), Arrays({self.model.input_name: array}), Arrays(), 0
        for place, item in enumerate(self.segments, 1):
            if item.bypass is not None:
                damage[unit] = foreign
                if (asks and not foreign[rows].all()) or leaves(unit, damage[unit])[rows].any():
                    answer = self._launched(item.bypass, state | before, len(rows))
                    told = answer.pop("damage", None)
                    if asks and told is not None:
                        damage[unit, rows] += told[:, 0]
                    gone = leaves(unit, damage[unit])[rows] & (foreign[rows] == 0)
                    before = dict(zip(before, [answer[POOLED], *before.values()], strict=False))
                    if gone.any():
                        _put(found, answer, gone, rows[gone], count)
                        skipped[unit:, rows[gone]] = True
                        rows = rows[~gone]
                        state, before = (
                            {name: array[~gone] for name, array in each.items()} for each in (state, before)
                        )
                unit += 1
            if not len(rows):
                break
            state = self._run(item.run, state, len(rows))
            if place == self._read and asks and self.policy is not None:
                early = self._launched(self.policy, state, count)
                foreign = early["foreign"][:, 0]
                before = dict(zip(before, [early[POOLED], *before.values()], strict=False))
        if len(rows):
            _put(found, state, np.ones(len(rows), np.bool_), rows, count)
        return Pass(found[POOLED], None if skipped.any() else found[STATES], found.get("logits"), damage, skipped)

    def _no_answers(self, count: int) -> Arrays:
        """Return the answers of the exits before, the last one first, as an exit takes them: there are none yet."""
        return {f"before_{at}": np.zeros((count, self.model.hidden_size), np.float32) for at in range(1, BEFORE + 1)}

    def _run(self, engines: Sequence[tuple[str, HostEngine]], state: Arrays, count: int) -> Arrays:
        for _, engine in engines:
            state = self._launched(engine, state, count)
        return state

    def _launched(self, engine: HostEngine, state: Arrays, count: int) -> Arrays:
        """Run an engine and return its outputs; `hidden_out` is called as the next engine takes it."""
        launch, outputs = self._bound(engine, state, count)
        launch()
        return outputs

    def _bound(self, engine: HostEngine, state: Arrays, count: int) -> tuple[Launch, Arrays]:
        tokens = self.model.length(next(iter(state.values())))
        outputs = {name: np.empty((count, *self._shape(name, tokens)), np.float32) for name in engine.outputs}
        inputs: dict[str, npt.NDArray[Any]] = {name: np.ascontiguousarray(array) for name, array in state.items()}
        launch = engine.bind(inputs, outputs)
        return launch, {"hidden" if name == "hidden_out" else name: array for name, array in outputs.items()}

    def _shape(self, name: str, tokens: int) -> tuple[int, ...]:
        model = self.model
        shapes = {"damage": (1,), "foreign": (1,), POOLED: (model.hidden_size,), "logits": (model.labels,)}
        return shapes.get(name, (tokens, model.hidden_size))

    def timed(self, _context: int, batch: int = 1) -> Timed:
        """Return (0 cached tokens, (name, run, bypass) of every segment and of the policy, None), bound to memory of
        their own for `batch` pictures, to be timed one by one.
        """
        state: Arrays = {self.model.input_name: self.model.example(batch)}
        found: list[tuple[str, Launch, Launch | None]] = []
        for place, item in enumerate(self.segments, 1):
            launches, bypass, entering = [], None, state
            for _, engine in item.run:
                launch, state = self._bound(engine, state, batch)
                launch()
                launches.append(launch)
            if item.bypass is not None:
                bypass, _ = self._bound(item.bypass, entering | self._no_answers(batch), batch)
            found.append((item.segment.name, in_a_row(launches), bypass))
            if place == self._read and self.policy is not None:
                found.append((POLICY, self._bound(self.policy, state, batch)[0], None))
        return 0, found, None
