"""Protocols of a device: memory, copies, streams and events by name, engines bound to memory, and recorded steps.

A stream does all that it is given in order, some time later. Only events order the work of different streams. The host
knows that work has ended only by waiting for an event or a stream. `cuda.Cuda` is the real implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_export.manifest import Build

MAIN, BESIDE = "main", "beside"
"""Names of streams: layers run on MAIN; in `overlapped` and `device` dispatch the policy runs on BESIDE."""

Launch = Callable[[str], None]
"""Enqueue a bound engine on the stream of that name. Launches of engines loaded for different streams may overlap."""


class Memory(Protocol):
    """Bytes on the device: zeroed when allocated, freed with the object."""

    nbytes: int

    def part(self, offset: int, nbytes: int | None = None) -> Any:
        """Return a view of `nbytes` from `offset` on, or to the end; the view keeps the whole memory alive."""


Place = Memory | npt.NDArray[Any]
"""One end of a copy: device memory, or a pinned host array, which must not change until the stream has passed it."""


class DeviceEngine(Protocol):
    """A compiled engine, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, Any]) -> Launch:
        """Fix the shape of every input and the address of every input and output. An output may share its input's
        memory (KV cache).
        """


class Graph(Protocol):
    """A step that is recorded once and launched again and again. `decide`, `branch` and `write_rows` are called by the
    step while it is recorded.

    All work that streams are given meanwhile is recorded. Streams must wait for one another as ever; the host must not
    wait for anything.
    """

    def decide(self, stream: str, damage: Any, limits: Any, skipped: Any) -> None:
        """Record all decisions, one per unit: skipped [units] (bool) is true where damage [sequences, units] (float32)
        < limits [sequences, units] (float64) for every sequence, as in `DecisionRule.skips`.
        """

    def branch(self, stream: str, unit: int, run: Callable[[str], None], skip: Callable[[str], None]) -> None:
        """Record a branch: one of `run` and `skip`, as decided about the unit, runs before what follows in `stream`.
        Each side is recorded now, on the stream that it is given and on no other.
        """

    def write_rows(self, stream: str, pairs: Sequence[tuple[Any, Any]], pitch: int, width: int, position: Any) -> None:
        """Record the write of new K and V rows into the cache, for pairs (cache, new rows). The cache has tables of
        rows, `pitch` bytes apart: equally many for each sequence, one sequence after another. Each table gets the next
        `width` bytes of the new rows, at the row that `position` [sequences] (int64, on the device) says.
        """

    def launch(self, stream: str) -> None: ...


class Device(Protocol):
    """One device of one process."""

    name: str

    def accept(self, build: Build, rebuild: str) -> None:
        """Raise BackendError with the command `rebuild` where the build's engines were not compiled for this device and
        this version.
        """

    def check_room(self, engines: Mapping[Path, int], cache: int) -> None:
        """Check for free memory before anything is loaded. `engines`: bytes of each engine file (loaded ones do not
        count); `cache`: bytes of one session's cache. Raises BackendError where so much is not free; only warns where
        host and device share their memory.
        """

    def engine(self, path: Path, stream: str) -> DeviceEngine:
        """Load an engine that will run on the stream of that name, with that stream's scratch memory."""

    def memory(self, nbytes: int) -> Any:
        """Return new Memory. Raises BackendError that says how much was asked for and how much is free."""

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return page-locked host memory, zeroed."""

    def copy(self, stream: str, to: Place, source: Place) -> None:
        """Enqueue a copy of all of `source` to `to`."""

    def copy_rows(
        self, stream: str, to: Any, pitch: int, source: Any, source_pitch: int, width: int, rows: int
    ) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes, `source_pitch` bytes apart in `source`, `pitch` in `to`."""

    def record(self, stream: str, event: str) -> None:
        """Enqueue the event: it happens when the stream has done its work so far."""

    def wait(self, stream: str, event: str) -> None:
        """Make later work of this stream wait for the event; the host does not wait."""

    def wait_for_event(self, event: str) -> None:
        """Block the host until the event's stream has passed the event."""

    def synchronize(self, stream: str) -> None:
        """Block the host until the stream has done all its work."""

    def graph(self, stream: str, units: int, step: Callable[[Any], None]) -> Graph:
        """Record what `step` enqueues; it begins and ends in `stream`. Raises BackendError where that is impossible."""
