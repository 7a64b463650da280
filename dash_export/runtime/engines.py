"""What a session asks of its engines, on the host (`engine_set`) and on a device (`device`) alike."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_export.decision import Skips, Unit
from dash_export.manifest import Build, ModelFacts
from dash_export.runtime.rules import Rule


class Cache(Protocol):
    """The keys and values of one session; `length` of `capacity` rows are filled."""

    length: int
    capacity: int

    def reserve(self, rows: int) -> bool:
        """Make room for `rows` tokens. True when memory moved and steps must be made anew."""
        ...

    @property
    def nbytes(self) -> int: ...

    def copy(self) -> Cache:
        """Another cache with the same contents."""
        ...


class Step(Protocol):
    """Engines bound to one session's memory for `sequence` tokens at a time. After each call these hold its results:
    logits [1, rows, vocab] and damage [units, sequence] float32, skipped [units, sequence] bool.
    """

    sequence: int
    logits: npt.NDArray[np.float32]
    damage: npt.NDArray[np.float32]
    skipped: Skips

    def decode(self, token: int, rule: Rule) -> None:
        """One token under `rule`."""
        ...

    def prefill(self, tokens: npt.NDArray[np.int64]) -> None:
        """`sequence` tokens, every layer."""
        ...


class Engines(Protocol):
    """All engines of a build, shared between sessions. `score_rows`: at most so many tokens of one pass get logits.
    `mixes`: whether rows of one step may differ in what they skip (teacher-forced passes, batches); their steps are
    `BoundStep`s.
    """

    model: ModelFacts
    units: tuple[Unit, ...]
    build: Build
    score_rows: int
    mixes: bool

    def cache(self, step: int) -> Any: ...

    def rows_at_once(self, capacity: int) -> int:
        """How many tokens one pass should hold over a cache of `capacity` rows."""
        ...

    def step(self, cache: Any, sequence: int, teacher_forced: bool = False) -> Step: ...
