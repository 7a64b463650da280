"""What the dispatcher asks of a device: memory, streams, events, and engines bound to memory once.

Everything a stream is given happens in its order, some time later; between streams only events order anything, and the
host knows of the end of something only by waiting for an event or a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dash_export.manifest import Build

Bytes = npt.NDArray[np.uint8]
ALIGNMENT = 256
"""Bytes. What TensorRT wants of scratch memory, and more than enough for every tensor."""


class Memory(Protocol):
    """Bytes on the device, zeroed when they are made, freed with the object."""

    nbytes: int

    def part(self, offset: int, nbytes: int) -> Memory:
        """A view; it keeps the whole alive."""
        ...


class Event(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """The host waits until the stream has passed the place where this was last recorded."""
        ...


class Context(Protocol):
    """One engine with its shapes and addresses fixed. Contexts of one `scratch` must never run at the same time."""

    name: str
    scratch: str


class Stream(Protocol):
    """Work in order. Host memory given here must be pinned and stay as it is until the stream has passed."""

    name: str

    def run(self, context: Context) -> None: ...

    def upload(self, to: Memory, source: npt.NDArray[Any]) -> None: ...

    def download(self, to: npt.NDArray[Any], source: Memory) -> None: ...

    def copy(self, to: Memory, source: Memory) -> None: ...

    def copy_rows(self, to: Memory, pitch: int, source: Memory, source_pitch: int, width: int, rows: int) -> None:
        """`rows` rows of `width` bytes, `pitch` and `source_pitch` bytes apart."""
        ...

    def record(self, event: Event) -> None: ...

    def wait(self, event: Event) -> None:
        """What follows in this stream waits for the event; the host does not."""
        ...

    def synchronize(self) -> None:
        """The host waits for everything enqueued so far."""
        ...


@dataclass(frozen=True)
class Decisions:
    """Where the decisions of a step find their numbers and leave their answers, on the device, one per unit: skipped
    where damage < limit, as `DecisionRule.skips`.
    """

    damage: Memory
    """float32"""
    limit: Memory
    """float64"""
    skipped: Memory
    """bool"""
    handles: Memory
    """[units, 2] uint64, the recording's own."""
    host_handles: npt.NDArray[np.uint64]
    """What the step uploads to `handles` before each decision."""


class Recording(Protocol):
    """A step while it is recorded: what the host may not decide any more. Streams given work while it lasts are
    recorded, and have to wait for one another as ever; the host waits for nothing.
    """

    def decide(self, stream: Stream, decisions: Decisions) -> Sequence[Any]:
        """Take all decisions in `stream`. Returns what `branch` wants, per unit."""
        ...

    def branch(
        self, stream: Stream, decided: Any, run: Callable[[Stream], None], skip: Callable[[Stream], None]
    ) -> None:
        """Do the one or the other before what follows in `stream`. Each is recorded now, on the stream that it is given
        and on no other.
        """
        ...

    def write_rows(self, stream: Stream, to: Memory, pitch: int, rows: Memory, width: int, position: Memory) -> None:
        """Row `position` (int64, on the device) of each of `to`'s tables of rows, `pitch` bytes apart, becomes the next
        `width` bytes of `rows`.
        """
        ...


class Graph(Protocol):
    """A recorded step."""

    def launch(self, stream: Stream) -> None: ...


class DeviceEngine(Protocol):
    """A compiled engine, shared between sessions; loaded when it is first asked for anything."""

    def inputs(self) -> Sequence[str]: ...

    def outputs(self) -> Sequence[str]: ...

    def dtype(self, name: str) -> np.dtype[Any]:
        """Two-byte floats the host cannot name (bfloat16) are uint16."""
        ...

    def context(self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, Memory]) -> Context:
        """Bind every input and output; an output may share its input's memory (KV cache)."""
        ...


class Device(Protocol):
    """One device of one process."""

    name: str
    moves: int
    """How often memory that contexts work in has moved: what was recorded before is void."""

    def graph_obstacle(self) -> str | None:
        """Why steps with decisions in them cannot be recorded here, if they cannot."""
        ...

    def record(self, stream: Stream, step: Callable[[Recording], None]) -> Graph:
        """Record what `step` enqueues, beginning and ending in `stream`. Raises BackendError."""
        ...

    def accept(self, build: Build, rebuild: str) -> None:
        """Raises BackendError with the command `rebuild` where the build's engines were not compiled for this device
        and this version.
        """
        ...

    def stream(self, name: str) -> Stream:
        """The stream of that name, made at first."""
        ...

    def event(self, name: str) -> Event: ...

    def memory(self, nbytes: int) -> Memory:
        """Raises BackendError that says what was asked and what is free."""
        ...

    def pinned(self, nbytes: int) -> Bytes:
        """Page-locked host memory, zeroed."""
        ...

    def engine(self, path: Path, stream: str) -> DeviceEngine:
        """An engine that will run on the stream of that name, with that stream's scratch memory."""
        ...
