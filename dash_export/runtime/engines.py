"""What a session asks of its engines, on the host (`engine_set`) and on a device (`device`) alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dash_export.build_record import Build, Segment, policy_engines
from dash_export.manifest import ModelFacts
from dash_export.runtime.rules import Rule

EngineT = TypeVar("EngineT")


@dataclass(frozen=True)
class SegmentEngines(Generic[EngineT]):
    """The engines of one segment. `skip` for a gated one. `policies`, where the dispatch has them as engines: those
    asked before this segment, which overwrites what they read, by the layers that each decides about.
    """

    segment: Segment
    run: EngineT
    skip: EngineT | None
    policies: Mapping[tuple[int, ...], EngineT]


def policies_by_segment(
    build: Build, points: Mapping[int, tuple[int, ...]], load: Callable[[str], EngineT]
) -> list[dict[tuple[int, ...], EngineT]]:
    """Per segment the policy engines asked before it: those that read the input of a layer of the segment before."""
    found: list[dict[tuple[int, ...], EngineT]] = [{} for _ in build.segments]
    for read, layers in points.items():
        reader = next(index for index, segment in enumerate(build.segments) if read in segment.layers)
        found[reader + 1] |= {group: load(name) for name, group in policy_engines([layers], build.engines).items()}
    return found


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
    logits [1, rows, vocab] and damage [layers, sequence] float32, actions [sequence, layers] int8.
    """

    sequence: int
    logits: npt.NDArray[np.float32]
    actions: npt.NDArray[np.int8]

    @property
    def damage(self) -> npt.NDArray[np.float32]: ...

    def decode(self, token: int, rule: Rule) -> int: ...

    def prefill(self, tokens: npt.NDArray[np.int64], ask: bool = False) -> None: ...

    def teacher_force(self, tokens: npt.NDArray[np.int64], rule: Rule, dense: npt.NDArray[np.bool_]) -> None: ...


class Engines(Protocol):
    """All engines of a build, shared between sessions. `score_rows`: at most so many tokens of one pass get logits."""

    model: ModelFacts
    build: Build
    score_rows: int

    @property
    def prefills_apart(self) -> bool:
        """Whether `prefill_step` has engines of its own, which are not for the first positions."""
        ...

    def cache(self, step: int) -> Any: ...

    def rows_at_once(self, capacity: int) -> int:
        """How many tokens one pass should hold over a cache of `capacity` rows."""
        ...

    def step(self, cache: Any, sequence: int, teacher_forced: bool = False) -> Step: ...

    def prefill_step(self, cache: Any, sequence: int) -> Step:
        """`step` for the tokens of a prompt, about which no policy is asked."""
        ...
