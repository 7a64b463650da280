"""The driver of a device: memory, copies, streams and events by name, engines bound to memory, and recorded steps.

Everything a stream is given happens in its order, some time later; between streams only events order anything, and the
host knows of the end of something only by waiting for an event or a stream. `cuda.Cuda` is the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_export.manifest import Build

MAIN, BESIDE = "main", "beside"
"""Streams: layers run on one; in `overlapped` and `device` dispatch the policy runs on the other."""

Launch = Callable[[str], None]
"""Enqueues a bound engine on the stream of that name. Launches of engines loaded for different streams may overlap."""


class Memory(Protocol):
    """Bytes on the device, zeroed when they are made, freed with the object."""

    nbytes: int

    def part(self, offset: int, nbytes: int | None = None) -> Any:
        """A view of `nbytes` from there on, or to the end; it keeps the whole alive."""


Place = Memory | npt.NDArray[Any]
"""One end of a copy: device memory, or a pinned host array, which must stay as it is until the stream has passed."""


class DeviceEngine(Protocol):
    """A compiled engine, shared between sessions."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def bind(self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, Any]) -> Launch:
        """Fix the shape of every input and the address of every input and output. An output may share its input's
        memory (KV cache).
        """


class Graph(Protocol):
    """A step, recorded and launched again and again; `decide`, `branch` and `write_rows` are for what records it.

    Streams given work meanwhile are recorded, and have to wait for one another as ever; the host waits for nothing.
    """

    def decide(self, stream: str, damage: Any, limits: Any, skipped: Any) -> None:
        """Take all decisions, one per unit: skipped [units] (bool) where damage [sequences, units] (float32) < limits
        [sequences, units] (float64) for every sequence, as `DecisionRule.skips`.
        """

    def branch(self, stream: str, unit: int, run: Callable[[str], None], skip: Callable[[str], None]) -> None:
        """Do the one or the other before what follows in `stream`. Each is recorded now, on the stream that it is given
        and on no other.
        """

    def write_rows(self, stream: str, pairs: Sequence[tuple[Any, Any]], pitch: int, width: int, position: Any) -> None:
        """For each pair: a row of each of the first's tables of rows, `pitch` bytes apart, becomes the next `width`
        bytes of the second. Which row says `position` [sequences] (int64, on the device): each sequence has as many
        tables, one after another.
        """

    def launch(self, stream: str) -> None: ...


class Device(Protocol):
    """One device of one process."""

    name: str

    def accept(self, build: Build, rebuild: str) -> None:
        """Raises BackendError with the command `rebuild` where the build's engines were not compiled for this device
        and this version.
        """

    def check_room(self, engines: Mapping[Path, int], cache: int) -> None:
        """Before anything is loaded: engine files of so many bytes, but those that are here, and one session's cache.
        Raises BackendError where so much is not free; where the host's memory is the device's it warns.
        """

    def engine(self, path: Path, stream: str) -> DeviceEngine:
        """Load an engine that will run on the stream of that name, with that stream's scratch memory."""

    def memory(self, nbytes: int) -> Any:
        """New Memory. Raises BackendError that says what was asked and what is free."""

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Page-locked host memory, zeroed."""

    def copy(self, stream: str, to: Place, source: Place) -> None:
        """All of `source`."""

    def copy_rows(
        self, stream: str, to: Any, pitch: int, source: Any, source_pitch: int, width: int, rows: int
    ) -> None:
        """`width` bytes at places `source_pitch` bytes apart to places `pitch` bytes apart."""

    def record(self, stream: str, event: str) -> None:
        """The event is where the stream is now."""

    def wait(self, stream: str, event: str) -> None:
        """Let what follows in this stream wait for the event; the host does not."""

    def wait_for_event(self, event: str) -> None:
        """The host waits until the event's stream has passed it."""

    def synchronize(self, stream: str) -> None:
        """The host waits for everything the stream was given."""

    def graph(self, stream: str, units: int, step: Callable[[Any], None]) -> Graph:
        """Record what `step` enqueues, beginning and ending in `stream`. Raises BackendError where that cannot be."""
