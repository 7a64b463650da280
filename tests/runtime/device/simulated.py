"""A device without hardware: streams that run later, in the most unfortunate order their events allow.

Everything enqueued is kept until the host waits for it; then streams are drained in an order of the test's choosing,
and no further than needed. What reads too early, or writes what is still to be read, gives wrong numbers here as it
would on a GPU. Engines are real: the lowered graphs in ONNX Runtime on the CPU. `log` has every call as the host made
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from dash_export.bundle import Build
from dash_export.runtime.backends.onnxruntime import start_thread_pool
from dash_export.runtime.device.base import Bytes

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
    """One entry of a stream: done when `ready` says so."""

    act: Callable[[], None]
    ready: Callable[[], bool] = lambda: True


class SimulatedStream:
    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.device, self.name = device, name
        self.queue: deque[Work] = deque()

    def _add(self, what: str, of: str, work: Work) -> None:
        self.device.log.append((self.name, what, of))
        self.queue.append(work)

    def run(self, context: SimulatedContext) -> None:
        self._add("run", context.name, Work(context.run))
        self.device.ran.append((self.name, context))

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
        self._add("record", event.name, Work(lambda: setattr(mark, "passed", True)))

    def wait(self, event: SimulatedEvent) -> None:
        mark = event.mark or Mark(passed=True)  # as CUDA has it: nothing recorded, nothing to wait for
        self._add("wait", event.name, Work(lambda: None, lambda: mark.passed))

    def synchronize(self) -> None:
        self.device.log.append(("host", "synchronize", self.name))
        mark = Mark()
        self.queue.append(Work(lambda: setattr(mark, "passed", True)))
        self.device.drain(mark)


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
    """`first`: the stream that runs ahead of the others whenever it can; or a seed for chance to choose."""

    first: str | int = "main"
    name: str = "simulated"
    log: list[Call] = field(default_factory=list)
    ran: list[tuple[str, SimulatedContext]] = field(default_factory=list)

    def __post_init__(self) -> None:
        start_thread_pool(0)
        self.streams: dict[str, SimulatedStream] = {}
        self._engines: dict[tuple[Path, str], SimulatedEngine] = {}
        self._rng = np.random.default_rng(self.first if isinstance(self.first, int) else 0)

    def accept(self, build: Build, rebuild: str) -> None:
        pass

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
            ready = [stream for stream in self.streams.values() if stream.queue and stream.queue[0].ready()]
            assert ready, "every stream waits for another: an event was never recorded"
            ahead = [stream for stream in ready if stream.name == self.first]
            chosen = ahead[0] if ahead else ready[int(self._rng.integers(len(ready)))]
            chosen.queue.popleft().act()


def _put(to: SimulatedMemory, source: npt.NDArray[Any]) -> None:
    to.data[: source.nbytes] = source.reshape(-1).view(np.uint8)
