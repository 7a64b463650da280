"""A device without hardware: streams that run later, in the most unfortunate order their events allow.

Everything enqueued is kept until the host waits for it; then streams are drained in an order of the test's choosing,
and no further than needed. What reads too early, or writes what is still to be read, gives wrong numbers here as it
would on a GPU. Engines are real: the lowered graphs in ONNX Runtime on the CPU. `log` has every call as the host made
it. A recorded step runs in such an order at every launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dash_export.manifest import Build
from dash_export.runtime.backends.onnxruntime import start_thread_pool
from dash_export.runtime.device.base import Bytes, Decisions

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
Call = tuple[str, str, str]
"""(stream or "host", what, of what)."""


class SimulatedMemory:
    def __init__(self, data: Bytes) -> None:
        self.data = data
        self.nbytes = data.nbytes

    def part(self, offset: int, nbytes: int) -> SimulatedMemory:
        assert 0 <= offset <= offset + nbytes <= self.nbytes
        return SimulatedMemory(self.data[offset : offset + nbytes])


@dataclass
class Mark:
    """One recording of an event."""

    passed: bool = False


class SimulatedEvent:
    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.device, self.name = device, name
        self.mark: Mark | None = None

    def wait(self) -> None:
        assert self.device.recording is None, "the host waits within a recording"
        self.device.log.append(("host", "wait", self.name))
        assert self.mark is not None, f"{self.name} was never recorded"
        self.device.drain(self.mark)


@dataclass
class SimulatedContext:
    name: str
    scratch: str
    session: ort.InferenceSession
    shapes: Mapping[str, tuple[int, ...]]
    memory: Mapping[str, SimulatedMemory]
    launched: bool = False

    def run(self) -> None:
        feeds = {}
        for item in self.session.get_inputs():
            array = self.memory[item.name].data.view(DTYPES[item.type])
            feeds[item.name] = array.reshape(self.shapes[item.name]).copy()
        names = [item.name for item in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
            self.memory[name].data[: data.nbytes] = data


@dataclass
class Work:
    """One entry of a stream, which may be done when `ready` says so. `again`: before a recorded one is done anew.
    `mark`: of the recording of an event.
    """

    act: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    again: Callable[[], None] = lambda: None
    mark: Mark | None = None


class SimulatedStream:
    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.device, self.name = device, name
        self.queue: deque[Work] = deque()

    def _add(self, what: str, of: str, work: Work) -> None:
        recording = self.device.recording
        if recording is not None:
            assert what == "wait" or recording.joined(self.name), f"{self.name} has no place in the recording yet"
            recording.add(self.name, what, of, work)
            return
        self.device.log.append((self.name, what, of))
        self.queue.append(work)

    def run(self, context: SimulatedContext) -> None:
        self._add("run", context.name, Work(context.run))
        self.device.ran.append((self.name, context))
        if self.device.recording is None:
            context.launched = True
        else:
            assert context.launched, f"{context.name} is recorded before its first launch"

    def upload(self, to: SimulatedMemory, source: npt.NDArray[Any]) -> None:
        # Read when the stream gets there, as DMA does.
        self._add("upload", "", Work(lambda: _put(to, source)))

    def download(self, to: npt.NDArray[Any], source: SimulatedMemory) -> None:
        def act() -> None:
            to.reshape(-1).view(np.uint8)[:] = source.data[: to.nbytes]

        self._add("download", "", Work(act))

    def copy(self, to: SimulatedMemory, source: SimulatedMemory) -> None:
        self._add("copy", "", Work(lambda: _put(to, source.data)))

    def copy_rows(
        self, to: SimulatedMemory, pitch: int, source: SimulatedMemory, source_pitch: int, width: int, rows: int
    ) -> None:
        def act() -> None:
            for row in range(rows):
                start, end = row * pitch, row * source_pitch
                to.data[start : start + width] = source.data[end : end + width]

        self._add("copy_rows", "", Work(act))

    def record(self, event: SimulatedEvent) -> None:
        mark = event.mark = Mark()
        if self.device.recording is not None:
            self.device.recording.marks.append(mark)
        passed, again = (partial(setattr, mark, "passed", value) for value in (True, False))
        self._add("record", event.name, Work(passed, again=again, mark=mark))

    def wait(self, event: SimulatedEvent) -> None:
        mark = event.mark or Mark(passed=True)  # as CUDA has it: nothing recorded, nothing to wait for
        recording = self.device.recording
        if recording is not None:
            # cudaErrorStreamCaptureIsolation
            assert any(mark is made for made in recording.marks), f"{event.name} was recorded elsewhere"
            recording.waited.append(mark)
        self._add("wait", event.name, Work(lambda: None, lambda: mark.passed))

    def synchronize(self) -> None:
        assert self.device.recording is None, "the host waits within a recording"
        self.device.log.append(("host", "synchronize", self.name))
        mark = Mark()
        self.queue.append(Work(lambda: setattr(mark, "passed", True)))
        self.device.drain(mark)


class SimulatedRecording:
    """What was recorded, per stream; `log` has it in the host's order, a branch's sides under their own names. It
    refuses what CUDA refuses: streams join by waiting for an event of this recording, and are waited for at the end.
    """

    def __init__(self, device: SimulatedDevice, origin: str, side: str = "") -> None:
        self._device, self._origin, self._side = device, origin, side
        self.works: dict[str, list[Work]] = {}
        self.log: list[Call] = []
        self.marks: list[Mark] = []
        self.waited: list[Mark] = []

    def joined(self, stream: str) -> bool:
        return stream == self._origin or stream in self.works

    def finish(self) -> None:
        for stream, works in self.works.items():
            if stream != self._origin:  # cudaErrorStreamCaptureUnjoined
                assert any(works[-1].mark is mark for mark in self.waited), f"nobody waits for the end of {stream}"

    def add(self, stream: str, what: str, of: str, work: Work) -> None:
        self.works.setdefault(stream, []).append(work)
        self.log.append((self._side or stream, what, of))

    def decide(self, stream: SimulatedStream, decisions: Decisions) -> list[Callable[[], bool]]:
        handles = 1 + np.arange(2 * len(decisions.host_handles), dtype=np.uint64)
        decisions.host_handles[:] = handles.reshape(-1, 2)
        skipped = _view(decisions.skipped, np.bool_)

        def act() -> None:
            np.testing.assert_array_equal(_view(decisions.handles, np.uint64), handles, "not uploaded")
            skipped[:] = _view(decisions.damage, np.float32).astype(np.float64) < _view(decisions.limit, np.float64)

        stream._add("decide", "", Work(act))
        return [partial(skipped.__getitem__, unit) for unit in range(len(skipped))]

    def branch(
        self,
        stream: SimulatedStream,
        decided: Callable[[], bool],
        run: Callable[[SimulatedStream], None],
        skip: Callable[[SimulatedStream], None],
    ) -> None:
        sides = []
        for name, fill in (("run side", run), ("skip side", skip)):
            side = self._device.recording = SimulatedRecording(self._device, "body", name)
            fill(SimulatedStream(self._device, "body"))
            self._device.recording = self
            self.log += side.log
            assert set(side.works) == {"body"}, "a side of a branch uses streams of its own"
            sides.append(side)

        stream._add("branch", "", Work(lambda: sides[int(decided())].launch()))

    def write_rows(
        self,
        stream: SimulatedStream,
        to: SimulatedMemory,
        pitch: int,
        rows: SimulatedMemory,
        width: int,
        position: SimulatedMemory,
    ) -> None:
        def act() -> None:
            for table in range(rows.nbytes // width):
                start = table * pitch + int(_view(position, np.int64)[0]) * width
                to.data[start : start + width] = rows.data[table * width : (table + 1) * width]

        stream._add("write_rows", "", Work(act))

    def launch(self) -> None:
        for works in self.works.values():
            for work in works:
                work.again()
        queues = {name: deque(works) for name, works in self.works.items()}
        while any(queues.values()):
            self._device.step(queues).act()


@dataclass
class SimulatedGraph:
    device: SimulatedDevice
    recording: SimulatedRecording

    def launch(self, stream: SimulatedStream) -> None:
        stream._add("launch", "graph", Work(self.recording.launch))


class SimulatedEngine:
    def __init__(self, path: Path, stream: str) -> None:
        self.path, self.stream = path, stream
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._types = {item.name: item.type for item in (*self.session.get_inputs(), *self.session.get_outputs())}

    def inputs(self) -> Sequence[str]:
        return [item.name for item in self.session.get_inputs()]

    def outputs(self) -> Sequence[str]:
        return [item.name for item in self.session.get_outputs()]

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(DTYPES[self._types[name]])

    def context(
        self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, SimulatedMemory]
    ) -> SimulatedContext:
        assert profile in (0, 1)
        return SimulatedContext(self.path.stem, self.stream, self.session, shapes, memory)


@dataclass
class SimulatedDevice:
    """`first`: the stream that runs ahead of the others whenever it can; or a seed for chance to choose. `obstacle`:
    why it records nothing.
    """

    first: str | int = "main"
    name: str = "simulated"
    obstacle: str | None = None
    moves: int = 0
    recording: SimulatedRecording | None = None
    recorded: list[SimulatedRecording] = field(default_factory=list)
    log: list[Call] = field(default_factory=list)
    ran: list[tuple[str, SimulatedContext]] = field(default_factory=list)

    def __post_init__(self) -> None:
        start_thread_pool(0)
        self.streams: dict[str, SimulatedStream] = {}
        self._engines: dict[tuple[Path, str], SimulatedEngine] = {}
        self._rng = np.random.default_rng(self.first if isinstance(self.first, int) else 0)

    def accept(self, build: Build, rebuild: str) -> None:
        pass

    def graph_obstacle(self) -> str | None:
        return self.obstacle

    def record(
        self,
        stream: SimulatedStream,
        step: Callable[[SimulatedRecording], None],
    ) -> SimulatedGraph:
        self.recording = recording = SimulatedRecording(self, stream.name)
        try:
            step(recording)
            recording.finish()
        finally:
            self.recording = None
        self.recorded.append(recording)
        return SimulatedGraph(self, recording)

    def stream(self, name: str) -> SimulatedStream:
        return self.streams.setdefault(name, SimulatedStream(self, name))

    def event(self, name: str) -> SimulatedEvent:
        return SimulatedEvent(self, name)

    def memory(self, nbytes: int) -> SimulatedMemory:
        return SimulatedMemory(np.zeros(nbytes, np.uint8))

    def pinned(self, nbytes: int) -> Bytes:
        return np.zeros(nbytes, np.uint8)

    def engine(self, path: Path, stream: str) -> SimulatedEngine:
        key = (path, stream)
        if key not in self._engines:
            self._engines[key] = SimulatedEngine(path, stream)
        return self._engines[key]

    def drain(self, until: Mark) -> None:
        """Run streams until `until` has passed, and no further than the chosen order needs."""
        while not until.passed:
            self.step({name: stream.queue for name, stream in self.streams.items()}).act()

    def step(self, queues: Mapping[str, deque[Work]]) -> Work:
        """The next work to be done, taken from its queue."""
        ready = [name for name, queue in queues.items() if queue and queue[0].ready()]
        assert ready, "every stream waits for another: an event was never recorded"
        chosen = self.first if self.first in ready else ready[int(self._rng.integers(len(ready)))]
        return queues[str(chosen)].popleft()


def _view(memory: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = memory.data.view(dtype)
    return found


def _put(to: SimulatedMemory, source: npt.NDArray[Any]) -> None:
    to.data[: source.nbytes] = source.reshape(-1).view(np.uint8)
