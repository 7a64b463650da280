"""Engines in host memory, the segments of a build that they make up, and what of them is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from dash_export.backends.base import Launch
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import POLICY, Build, Segment
from dash_export.core.units import Unit


class HostEngine(Protocol):
    """An engine in host memory, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Mapping[str, npt.NDArray[Any]]) -> Launch:
        """Fix the addresses of all inputs and outputs. An output may share its input's memory (KV cache)."""
        ...


class HostBackend(Protocol):
    """A backend whose engines run in host memory, one after the other."""

    def load(self, path: Path) -> HostEngine:
        """Load an engine file. Raises BackendError where the backend refuses it."""
        ...


@runtime_checkable
class JoiningBackend(HostBackend, Protocol):
    """A backend that makes one engine of several files."""

    def join(self, paths: Sequence[Path]) -> HostEngine:
        """Load files that run one after the other, each on what the one before gives."""
        ...


@dataclass(frozen=True)
class SegmentEngines:
    """Engines of one segment. `run`: (name, engine), in the order they run. `bypass`: the engine that skips a unit."""

    segment: Segment
    run: Sequence[tuple[str, HostEngine]]
    bypass: HostEngine | None = None


def load_segments(bundle: Bundle, build: Build, backend: HostBackend) -> list[SegmentEngines]:
    """Load the engines of all segments. Where a decision is about a token and the policy's engine is not part of
    another one, it runs in its segment, before the layer whose input it reads.
    """
    policy, found = bundle.manifest.policy, []

    def load(name: str) -> HostEngine:
        return backend.load(bundle.path(build.engines[name].file))

    for segment in build.segments:
        names = segment.engines(build.engines)
        asked = policy.has_network and policy.read in segment.layers and POLICY in build.engines
        if asked and bundle.manifest.model.decides == "token":
            names.insert(names.index(f"layer_{policy.read:02d}"), POLICY)
        bypass = load(Unit(segment.first, segment.last).bypass) if segment.gated else None
        if isinstance(backend, JoiningBackend):
            run = [(segment.name, backend.join([bundle.path(build.engines[name].file) for name in names]))]
        else:
            run = [(name, load(name)) for name in names]
        found.append(SegmentEngines(segment, run, bypass))
    return found


def in_a_row(launches: Sequence[Launch]) -> Launch:
    """Return one launch of several, one after the other."""
    if len(launches) == 1:
        return launches[0]

    def launch_all() -> None:
        for launch in launches:
            launch()

    return launch_all


Timed = tuple[int, list[tuple[str, Launch, Launch | None]], Any]
"""Launches to time: cached tokens, (name, run, bypass) of every segment, and a decoder's (step, cache)."""


def timed_token(engines: Any, context: int) -> Timed:
    """Bind a token at `context` cached ones, or as many as the engines take, to be timed launch by launch."""
    context = min(context, engines.model.max_positions - 1)
    cache = engines.cache(context)
    cache.reserve(context + 1)
    step = engines.step(cache, 1)
    cache.length = context
    step.place()
    bound = zip(engines.build.segments, step.launches(), strict=True)
    return context, [(segment.name, run, bypass) for segment, (run, bypass) in bound], (step, cache)
