"""Streams and events without a card.

What is enqueued waits for what its stream and events say and for nothing else; it is done when the host waits, in the
most unfortunate order: that of a stream which runs ahead of the others whenever it can, or chance's. What reads too
early, or writes what is still to be read, gives wrong numbers here as it would on a GPU; a rule that is broken raises
`BrokenRuleError` at once. Types and enumerations are the installed bindings' own.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import RLock
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import cuda.bindings.runtime as rt
import numpy as np

from tests.standin.memory import OK, BrokenRuleError, Bytes, Memory, rule

Call = tuple[int | str, str, Any]
"""(stream or "host", what, of what)."""


@dataclass(eq=False)
class Node:
    """One piece of work, to be done after `before`."""

    stream: int
    act: Callable[[], object]
    before: list[Node]
    done: bool = False
    ended: float = 0.0


@dataclass(eq=False)
class Graph:
    """What is recorded. `ends`: of every stream in the recording, what its next node follows. `broken`: no more."""

    handle: int
    log: list[Call]
    broken: bool = False
    origin: int = 0
    nodes: list[Node] = field(default_factory=list)
    ends: dict[int, list[Node]] = field(default_factory=dict)


@dataclass
class Event:
    """The nodes it stands for, and what they belong to. `recorded`: when, if it tells the time."""

    nodes: list[Node]
    graph: Graph
    recorded: float | None = None


class Streams(Memory):
    """`failing`: names of calls (without _v2) that fail, with what. `version`: the driver's. `devices`: the product's
    devices on this card, which know the names of streams and events.
    """

    def __init__(self, first: str | int = "main") -> None:
        super().__init__()
        self.run_in_order_of(first)
        self.version, self.failing, self.devices = rt.CUDART_VERSION, dict[str, Any](), list[Any]()
        self.integrated, self.lock, self._acts = False, RLock(), False
        self.live = Graph(0, [])
        """What is enqueued and not recorded."""
        self.calls = Counter[str]()
        self.at_exit: list[tuple[Any, ...]] = []
        """What the product would do when the process ends, and with what."""
        self.beside = list[Callable[[], Any]]()
        self.recorded: list[Graph] = []
        self.ran: list[tuple[int, Any]] = []
        """(stream, context) of every launch of an engine."""
        self.priorities: dict[int, int] = {}
        self._handles = count(1)
        self._recording: dict[int, Graph] = {}
        self._events: dict[int, Event] = {}
        self._graphs: dict[int, Graph] = {}
        self._nodes: dict[int, Node] = {}
        self._owners: dict[int, Graph] = {}
        self._conditions: dict[int, bool] = {}
        self._functions: dict[int, Any] = {}

    def thread(self, target: Callable[..., Any], args: Any, daemon: bool) -> Any:
        """What the product would do in a thread of its own."""
        return SimpleNamespace(start=lambda: self.beside.append(partial(target, *args)), is_alive=lambda: daemon)

    def run_in_order_of(self, first: str | int) -> None:
        """The stream of that name runs ahead of the others whenever it can, or chance chooses by that seed."""
        self.first, self._rng = first, np.random.default_rng(first if isinstance(first, int) else 0)

    @property
    def log(self) -> list[Call]:
        """What the host did, since `forget`."""
        return self.named(self.live.log)

    def named(self, log: list[Call]) -> list[Call]:
        names = self.names()
        return [(names.get(stream, stream), what, names.get(of, of)) for stream, what, of in log]

    def names(self) -> dict[Any, str]:
        known = [pair for device in self.devices for pair in (*device._streams.items(), *device._events.items())]
        return {int(handle): name for name, handle in known}

    def forget(self) -> None:
        self.live.log.clear()
        self.calls.clear()

    # --- copies

    def drain(self) -> None:
        if not self._acts:  # else Python frees something while a node acts
            self.run(self.live.nodes)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[Any]:  # noqa: N802
        self.enqueue(stream, "memset", "", lambda: self.view(address, nbytes).fill(value))
        return (OK,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: Any, stream: int) -> tuple[Any]:  # noqa: N802
        assert kind == rt.cudaMemcpyKind.cudaMemcpyDefault
        up, down = (self._start(address) in self._pinned for address in (source, to))
        what = "upload" if up else "download" if down else "copy"
        self.enqueue(stream, what, "", self._copy(to, 0, source, 0, nbytes, 1, stream))
        return (OK,)

    def cudaMemcpy2DAsync(  # noqa: N802
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, kind: Any, stream: int
    ) -> tuple[Any]:
        assert kind == rt.cudaMemcpyKind.cudaMemcpyDefault
        rule(min(to_pitch, pitch) >= width, "cudaErrorInvalidPitchValue")
        self.enqueue(stream, "copy_rows", "", self._copy(to, to_pitch, source, pitch, width, height, stream))
        return (OK,)

    def _copy(
        self, to: int, to_pitch: int, source: int, pitch: int, width: int, height: int, stream: int
    ) -> Callable[[], None]:
        def resolved(address: int) -> Callable[[int], Bytes]:
            try:
                self.view(address, 0)
            except BrokenRuleError:  # pageable memory
                rule(stream not in self._recording, "a recorded copy of memory that is not pinned")
                return lambda row: np.ctypeslib.as_array((ctypes.c_uint8 * width).from_address(address + row * width))
            return lambda row: self.view(address + row * (to_pitch if address == to else pitch), width)

        into, out_of = resolved(to), resolved(source)

        def act() -> None:  # read when the stream gets there, as DMA does
            for row in range(height):
                into(row)[:] = out_of(row)

        return act

    # --- order

    def enqueue(self, stream: int, what: str, of: Any, *acts: Callable[[], object]) -> None:
        """Work for a stream, one after another; what other streams do may come between."""
        with self.lock:
            at = self._at(stream)
            at.log.append((int(stream), what, of))
            for act in acts:
                at.nodes.append(Node(int(stream), act, at.ends[int(stream)]))
                at.ends[int(stream)] = at.nodes[-1:]

    def _at(self, stream: int) -> Graph:
        """What the stream's work goes to."""
        return self._recording.get(int(stream), self.live)

    def run(self, until: Iterable[Node], among: list[Node] | None = None) -> None:
        """Do what is pending until those nodes are done, and no more than the chosen order needs."""
        pending, names, until = self.live.nodes if among is None else among, self.names(), list(until)
        while not all(node.done for node in until):
            ready = [node for node in pending if all(before.done for before in node.before)]
            ahead = [node for node in ready if names.get(node.stream) == self.first]
            node = ahead[0] if ahead else ready[int(self._rng.integers(len(ready)))] if ready else until[-1]
            if node.done:  # Python freed something just now, and waited for all that was pending
                continue
            pending.remove(node)
            node.done, acts, self._acts = True, self._acts, True
            try:
                node.act()
                node.ended = perf_counter()
            except BaseException:  # as after an illegal access: the rest is lost
                for lost in pending:
                    lost.done = True
                pending.clear()
                raise
            finally:
                self._acts = acts

    def cudaDeviceGetStreamPriorityRange(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, 0, -5

    def cudaStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags == rt.cudaStreamNonBlocking
        handle = next(self._handles)
        self.priorities[handle] = priority
        self.live.ends[handle] = []
        return OK, rt.cudaStream_t(handle)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        assert flags in (rt.cudaEventDisableTiming, rt.cudaEventDefault)
        handle = next(self._handles)
        self._events[handle] = Event([], self.live, perf_counter() if flags == rt.cudaEventDefault else None)
        return OK, rt.cudaEvent_t(handle)

    def cudaEventRecord(self, event: Any, stream: int) -> tuple[Any]:  # noqa: N802
        at = self._at(stream)
        at.log.append((stream, "record", int(event)))
        recorded = None if self._events[int(event)].recorded is None else perf_counter()
        self._events[int(event)] = Event(list(at.ends[stream]), at, recorded)
        return (OK,)

    def cudaEventElapsedTime(self, *events: Any) -> tuple[Any, ...]:  # noqa: N802
        times = []
        for each in (self._events[int(event)] for event in events):
            rule(each.recorded is not None, "cudaErrorInvalidResourceHandle: an event without timing")
            rule(each.graph is self.live, "cudaErrorInvalidValue: the event is part of a recording")
            rule(all(node.done for node in each.nodes), "cudaErrorNotReady: it has not happened yet")
            times.append(max([each.recorded, *(node.ended for node in each.nodes)]))
        return OK, 1e3 * (times[1] - times[0])

    def cudaStreamWaitEvent(self, stream: int, event: Any, flags: int) -> tuple[Any]:  # noqa: N802
        assert flags == 0
        waited = self._events[int(event)]
        if waited.graph is not self.live and stream not in self._recording:  # the stream joins the recording
            rule(waited.graph in self._recording.values(), "cudaErrorCapturedEvent: the recording has ended")
            self._recording[stream], waited.graph.ends[stream] = waited.graph, []
        at = self._at(stream)
        rule(at is waited.graph, "cudaErrorStreamCaptureIsolation: the event was recorded elsewhere")
        at.log.append((stream, "wait", int(event)))
        at.ends[stream] = [*at.ends[stream], *waited.nodes]
        return (OK,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Any]:  # noqa: N802
        waited = self._events[int(event)]
        rule(waited.graph is self.live, "cudaErrorCapturedEvent: the host waits for what is only recorded")
        self.live.log.append(("host", "wait", int(event)))
        self.run(waited.nodes)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:  # noqa: N802
        rule(stream not in self._recording, "cudaErrorStreamCaptureUnsupported: the host waits within a recording")
        self.live.log.append(("host", "synchronize", stream))
        self.run(self.live.ends[stream])
        return (OK,)

    def recording(self, stream: int | None = None) -> bool:
        """That stream, or any."""
        return bool(self._recording) if stream is None else stream in self._recording

    def break_recordings(self) -> None:
        for graph in self._recording.values():
            graph.broken = True
