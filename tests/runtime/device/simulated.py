"""A device without hardware: streams that run later, in the most unfortunate order their events allow.

Everything enqueued is kept until the host waits for it; then streams are drained in an order of the test's choosing,
and no further than needed. What reads too early, or writes what is still to be read, gives wrong numbers here as it
would on a GPU. Engines are real: the lowered graphs in ONNX Runtime on the CPU. `log` has every call as the host made
it. A recorded step runs in such an order at every launch.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dash_export.errors import BackendError
from dash_export.manifest import Build
from dash_export.runtime.device.base import MAIN, Place
from dash_export.runtime.ort_engine import shared_pool_options

DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
Call = tuple[str, str, str]
"""(stream or "host", what, of what)."""


class SimulatedMemory:
    def __init__(self, data: npt.NDArray[np.uint8]) -> None:
        self.data, self.nbytes = data, data.nbytes

    def part(self, offset: int) -> SimulatedMemory:
        assert 0 <= offset <= self.nbytes
        return SimulatedMemory(self.data[offset:])


def as_bytes(place: Any) -> npt.NDArray[np.uint8]:
    return place.data if isinstance(place, SimulatedMemory) else place.reshape(-1).view(np.uint8)


@dataclass
class Mark:
    """One recording of an event."""

    passed: bool = False


@dataclass
class Work:
    """One entry of a stream, which may be done when `ready` says so. `mark`: of the recording of an event."""

    act: Callable[[], object]
    ready: Callable[[], bool] = lambda: True
    mark: Mark | None = None


@dataclass
class SimulatedEngine:
    device: SimulatedDevice
    path: Path
    stream: str

    def __post_init__(self) -> None:
        self.session = ort.InferenceSession(str(self.path), shared_pool_options(), providers=["CPUExecutionProvider"])
        self.inputs = tuple(item.name for item in self.session.get_inputs())
        self.outputs = tuple(item.name for item in self.session.get_outputs())

    def bind(
        self, profile: int, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, SimulatedMemory]
    ) -> SimulatedLaunch:
        assert profile in (0, 1)
        return SimulatedLaunch(self, shapes, memory)


@dataclass(eq=False)
class SimulatedLaunch:
    engine: SimulatedEngine
    shapes: Mapping[str, tuple[int, ...]]
    memory: Mapping[str, SimulatedMemory]
    launched: bool = False

    @property
    def name(self) -> str:
        return self.engine.path.stem

    def __call__(self, stream: str) -> None:
        device = self.engine.device
        device.launch(stream, self)

    def run(self) -> None:
        session = self.engine.session
        feeds: dict[str, npt.NDArray[Any]] = {
            item.name: self.memory[item.name].data.view(DTYPES[item.type])[: np.prod(self.shapes[item.name])]
            for item in session.get_inputs()
        }
        feeds = {name: array.reshape(self.shapes[name]).copy() for name, array in feeds.items()}
        for name, array in zip(self.engine.outputs, session.run(self.engine.outputs, feeds), strict=True):
            self.memory[name].data[: array.nbytes] = as_bytes(np.ascontiguousarray(array))


class SimulatedGraph:
    """What was recorded, per stream; `log` has it in the host's order, a branch's sides under their own names. It
    refuses what CUDA refuses: streams join by waiting for an event of this recording, and are waited for at the end.
    """

    def __init__(self, device: SimulatedDevice, origin: str, side: str = "") -> None:
        self._device, self._origin, self._side = device, origin, side
        self._works: dict[str, list[Work]] = {}
        self._conditions: dict[int, bool] = {}
        self._marks: list[Mark] = []
        self._waited: list[Mark] = []
        self.log: list[Call] = []

    def add(self, stream: str, what: str, of: str, work: Work) -> None:
        mark = work.mark
        if what == "record" and mark is not None:
            self._marks.append(mark)
        elif what == "wait" and mark is not None:
            assert any(mark is made for made in self._marks), f"{of} was recorded elsewhere"  # ...CaptureIsolation
            self._waited.append(mark)
        else:
            assert stream == self._origin or stream in self._works, f"{stream} has no place in the recording yet"
        self._works.setdefault(stream, []).append(work)
        self.log.append((self._side or stream, what, of))

    def finish(self) -> None:
        for stream, works in self._works.items():
            if stream != self._origin:  # cudaErrorStreamCaptureUnjoined
                assert any(works[-1].mark is mark for mark in self._waited), f"nobody waits for the end of {stream}"

    def decide(self, stream: str, damage: SimulatedMemory, limits: SimulatedMemory, skipped: SimulatedMemory) -> None:
        conditions = self._conditions  # and not `self`: no circle, as CUDA has none

        def act() -> None:
            skips = damage.data.view(np.float32).astype(np.float64) < limits.data.view(np.float64)
            skipped.data.view(np.bool_)[:] = skips
            conditions.update(enumerate(skips.tolist()))

        self._device.enqueue(stream, "decide", "", Work(act))

    def branch(self, stream: str, unit: int, run: Callable[[str], None], skip: Callable[[str], None]) -> None:
        sides, conditions = [], self._conditions
        for name, fill in (("run side", run), ("skip side", skip)):
            side = self._device.recording = SimulatedGraph(self._device, "body", name)
            fill("body")
            self._device.recording = self
            self.log += side.log
            assert set(side._works) == {"body"}, "a side of a branch uses streams of its own"
            sides.append(side)
        self._device.enqueue(stream, "branch", "", Work(lambda: sides[conditions[unit]].replay()))

    def write_rows(
        self,
        stream: str,
        to: SimulatedMemory,
        pitch: int,
        rows: SimulatedMemory,
        width: int,
        position: SimulatedMemory,
    ) -> None:
        def act() -> None:
            put_rows(to.part(int(position.data.view(np.int64)[0]) * width), pitch, rows, width)

        self._device.enqueue(stream, "write_rows", "", Work(act))

    def launch(self, stream: str) -> None:
        self._device.enqueue(stream, "launch", "graph", Work(self.replay))

    def replay(self) -> None:
        self._conditions.clear()
        for mark in self._marks:
            mark.passed = False
        queues = {name: deque(works) for name, works in self._works.items()}
        while any(queues.values()):
            self._device.step(queues).act()


@dataclass
class SimulatedDevice:
    """`first`: the stream that runs ahead of the others whenever it can; or a seed for chance to choose. `obstacle`:
    why it records nothing.
    """

    first: str | int = MAIN
    obstacle: str | None = None
    name: str = "simulated"
    recording: SimulatedGraph | None = None
    recorded: list[SimulatedGraph] = field(default_factory=list)
    log: list[Call] = field(default_factory=list)
    ran: list[tuple[str, SimulatedLaunch]] = field(default_factory=list)
    events: dict[str, Mark] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._streams: defaultdict[str, deque[Work]] = defaultdict(deque)
        self._engines: dict[tuple[Path, str], SimulatedEngine] = {}
        self._rng = np.random.default_rng(self.first if isinstance(self.first, int) else 0)

    def accept(self, build: Build, rebuild: str) -> None:
        pass

    def engine(self, path: Path, stream: str) -> SimulatedEngine:
        key = (path, stream)
        if key not in self._engines:
            self._engines[key] = SimulatedEngine(self, path, stream)
        return self._engines[key]

    def memory(self, nbytes: int) -> SimulatedMemory:
        return SimulatedMemory(self.pinned(nbytes))

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        return np.zeros(nbytes, np.uint8)

    def graph(self, stream: str, units: int, step: Callable[[Any], None]) -> SimulatedGraph:
        del units
        if self.obstacle is not None:
            raise BackendError(self.obstacle)
        graph = self.recording = SimulatedGraph(self, stream)
        try:
            step(graph)
            graph.finish()
        finally:
            self.recording = None
        self.recorded.append(graph)
        return graph

    # --- work

    def enqueue(self, stream: str, what: str, of: str, work: Work) -> None:
        if self.recording is not None:
            self.recording.add(stream, what, of, work)
        else:
            self.log.append((stream, what, of))
            self._streams[stream].append(work)

    def launch(self, stream: str, launch: SimulatedLaunch) -> None:
        self.enqueue(stream, "run", launch.name, Work(launch.run))
        assert self.recording is None or launch.launched, f"{launch.name} is recorded before its first launch"
        launch.launched = True
        self.ran.append((stream, launch))

    def copy(self, stream: str, to: Place, source: Place) -> None:
        def act() -> None:  # read when the stream gets there, as DMA does
            as_bytes(to)[: source.nbytes] = as_bytes(source)

        what = "upload" if isinstance(source, np.ndarray) else "download" if isinstance(to, np.ndarray) else "copy"
        self.enqueue(stream, what, "", Work(act))

    def copy_rows(self, stream: str, to: SimulatedMemory, pitch: int, source: SimulatedMemory, width: int) -> None:
        self.enqueue(stream, "copy_rows", "", Work(partial(put_rows, to, pitch, source, width)))

    # --- order

    def record(self, stream: str, event: str) -> None:
        mark = self.events[event] = Mark()
        self.enqueue(stream, "record", event, Work(partial(setattr, mark, "passed", True), mark=mark))

    def wait(self, stream: str, event: str) -> None:
        mark = self.events.get(event, Mark(passed=True))  # as CUDA has it: nothing recorded, nothing to wait for
        self.enqueue(stream, "wait", event, Work(lambda: None, lambda: mark.passed, mark))

    def wait_for_event(self, event: str) -> None:
        assert event in self.events, f"{event} was never recorded"
        self._wait("wait", event, self.events[event])

    def synchronize(self, stream: str) -> None:
        mark = Mark()
        self._streams[stream].append(Work(partial(setattr, mark, "passed", True)))
        self._wait("synchronize", stream, mark)

    def _wait(self, what: str, of: str, until: Mark) -> None:
        """Run streams until `until` has passed, and no further than the chosen order needs."""
        assert self.recording is None, "the host waits within a recording"
        self.log.append(("host", what, of))
        while not until.passed:
            self.step(self._streams).act()

    def step(self, queues: Mapping[str, deque[Work]]) -> Work:
        """The next work to be done, taken from its queue."""
        ready = [name for name, queue in queues.items() if queue and queue[0].ready()]
        assert ready, "every stream waits for another: an event was never recorded"
        chosen = self.first if self.first in ready else ready[int(self._rng.integers(len(ready)))]
        return queues[str(chosen)].popleft()


def put_rows(to: SimulatedMemory, pitch: int, source: SimulatedMemory, width: int) -> None:
    for table in range(source.nbytes // width):
        to.data[table * pitch : table * pitch + width] = source.data[table * width : (table + 1) * width]
