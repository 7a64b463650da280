"""The loop of an encoder on the host: run what lies before the first unit, decide for each picture, then run or skip
each unit for all pictures that decided alike. Nothing is computed twice.
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
from dash_export.core.units import Damages, Skips

Floats = npt.NDArray[np.float32]
Arrays = dict[str, Floats]


@dataclass(frozen=True)
class Pass:
    """Results of n pictures: `pooled` [n, hidden], `states` [n, tokens, hidden], `logits` [n, labels] (None without a
    classifier), `damage` and `skipped` [units, n]. Damage is zero where nobody asked the policy.
    """

    pooled: Floats
    states: Floats
    logits: Floats | None
    damage: Damages
    skipped: Skips


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
        gated = [place for place, item in enumerate(self.segments) if item.bypass is not None]
        self._first = gated[0] if gated else len(self.segments)
        self._read = next(place for place, item in enumerate(self.segments) if item.segment.last + 1 >= policy.read) + 1
        bundle.check_same(seal)

    @backend_errors
    def encode(self, pixels: Floats, decide: Callable[[Damages], Skips], asks: bool) -> Pass:
        """Run pictures [n, 3, height, width] float32. `decide` gives the skips [units, n] for the damage [units, n];
        `asks`: whether it needs the damage.
        """
        count = len(pixels)
        damage = np.zeros((len(self.units), count), np.float32)
        state: Arrays = {"pixel_values": pixels}
        for place, item in enumerate(self.segments[: self._first], 1):
            state = self._run(item.run, state, count)
            if place == self._read and asks and self.policy is not None:
                damage[:] = self._launched(self.policy, state, count)["damage"].T
        skipped: Skips = np.zeros(damage.shape, np.bool_)
        skipped[:] = decide(damage)
        choices, groups = np.unique(skipped, axis=1, return_inverse=True)
        found: Arrays = {}
        for number, choice in enumerate(choices.T):
            rows = np.flatnonzero(groups.reshape(-1) == number)
            own = state if len(rows) == count else {name: array[rows] for name, array in state.items()}
            for name, array in self._rest(own, choice, len(rows)).items():
                if len(rows) == count:
                    found[name] = array
                else:
                    found.setdefault(name, np.empty((count, *array.shape[1:]), np.float32))[rows] = array
        return Pass(found[POOLED], found[STATES], found.get("logits"), damage, skipped)

    def _rest(self, state: Arrays, skipped: npt.NDArray[np.bool_], count: int) -> Arrays:
        unit = 0
        for item in self.segments[self._first :]:
            if item.bypass is not None:
                skips, unit = bool(skipped[unit]), unit + 1
                state = self._run([("", item.bypass)] if skips else item.run, state, count)
            else:
                state = self._run(item.run, state, count)
        return state

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
        outputs = {name: np.empty((count, *self._shape(name)), np.float32) for name in engine.outputs}
        inputs: dict[str, npt.NDArray[Any]] = {name: np.ascontiguousarray(array) for name, array in state.items()}
        launch = engine.bind(inputs, outputs)
        return launch, {"hidden" if name == "hidden_out" else name: array for name, array in outputs.items()}

    def _shape(self, name: str) -> tuple[int, ...]:
        model = self.model
        shapes = {"damage": (len(self.units),), POOLED: (model.hidden_size,), "logits": (model.labels,)}
        return shapes.get(name, (model.tokens, model.hidden_size))

    def timed(self, _context: int, batch: int = 1) -> Timed:
        """Return (0 cached tokens, (name, run, bypass) of every segment and of the policy, None), bound to memory of
        their own for `batch` pictures, to be timed one by one.
        """
        rng = np.random.default_rng(0)
        state: Arrays = {"pixel_values": rng.standard_normal((batch, 3, *self.model.image_size)).astype(np.float32)}
        found: list[tuple[str, Launch, Launch | None]] = []
        for place, item in enumerate(self.segments, 1):
            launches, bypass, entering = [], None, state
            for _, engine in item.run:
                launch, state = self._bound(engine, state, batch)
                launch()
                launches.append(launch)
            if item.bypass is not None:
                bypass, _ = self._bound(item.bypass, entering, batch)
            found.append((item.segment.name, in_a_row(launches), bypass))
            if place == self._read and self.policy is not None:
                found.append((POLICY, self._bound(self.policy, state, batch)[0], None))
        return 0, found, None
