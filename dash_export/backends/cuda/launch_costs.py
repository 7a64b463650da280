"""Costs of a token on a card apart from its engines: launches, waits, copies, graphs with decisions.

The probe's token has UNITS units, and KERNELS kernels that write two bytes stand for each engine. The token is launched
in pieces, each a graph, with a wait for the policy (`overlapped`), as a graph that decides, with the policy beside the
layers (`device`), and as a graph without decisions (dense).
"""

import ctypes
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from dash_export.backends.cuda.cuda import BESIDE, MAIN, Cuda, Mirror
from dash_export.errors import BackendError

UNITS, AHEAD = 8, 2
"""Number of units, and of segments before the first unit."""
KERNELS = 48
"""Of an engine: a few layers of a dozen each."""
REPEATS = 200
_COPIED = 256 << 20


def probe(device: Cuda) -> dict[str, Any]:
    """Measure microseconds (medians, by the host's clock to the end of the work) and bytes per second, for a few
    seconds; of a graph that cannot be recorded, return the reason. Raises BackendError where the kernels do not load.
    """
    found: dict[str, Any] = {"units": UNITS, "kernels": KERNELS, "token_us": {}}
    small, table = [device.memory(256) for _ in range(3)], Mirror(device, (1, 2), np.uint64)
    table.host[:] = small[0].address, small[1].address
    device.copy(MAIN, table.memory, table.host)
    numbers = [(1, ctypes.c_int), (1, ctypes.c_longlong), (1, ctypes.c_longlong)]
    damage, limits = Mirror(device, (UNITS,), np.float32), Mirror(device, (UNITS,), np.float64)
    skipped, end = Mirror(device, (UNITS,), np.bool_), partial(device.synchronize, MAIN)

    def launches(count: int, stream: str = MAIN) -> None:
        for _ in range(count):
            device.kernel("write_rows", stream, (1, 1, 1), 1, (table.memory, small[2]), numbers)

    work = partial(launches, KERNELS)

    def fork(piece: Callable[[str], None]) -> None:
        """Enqueue the segments before the first unit, and the policy beside the last of them."""
        for _ in range(AHEAD - 1):
            piece(MAIN)
        device.record(MAIN, "ready")
        device.wait(BESIDE, "ready")

    def overlapped() -> None:
        fork(pieces[MAIN])
        pieces[BESIDE](BESIDE)
        pieces[MAIN](MAIN)
        device.record(BESIDE, "decided")
        device.wait_for_event("decided")
        for _ in range(UNITS):
            pieces[MAIN](MAIN)

    def decided(graph: Any) -> None:
        device.copy(MAIN, limits.memory, limits.host)
        fork(work)
        work(BESIDE)
        work(MAIN)
        device.record(BESIDE, "decided")
        device.wait(MAIN, "decided")
        graph.decide(MAIN, damage.memory, limits.memory, skipped.memory)
        for unit in range(UNITS):
            graph.branch(MAIN, unit, work, work)
        device.copy(MAIN, skipped.host, skipped.memory)

    found["launch_us"] = _timed(lambda: launches(100), end, ended=False) / 100
    found["wait_us"] = _timed(lambda: launches(1), end)
    found["bytes_per_second"] = _bandwidth(device)
    pieces: dict[str, Callable[[str], None]] = dict.fromkeys((MAIN, BESIDE), work)
    try:
        pieces = {stream: device.graph(stream, 0, lambda _, on=stream: work(on)).launch for stream in pieces}  # type: ignore[misc]
    except BackendError as error:
        found["not_recorded"] = {"overlapped": str(error)}
    found["token_us"]["overlapped"] = _timed(overlapped, end)
    records: dict[str, tuple[int, Callable[[Any], None], float]] = {
        "dense": (0, lambda _: launches((AHEAD + UNITS) * KERNELS), 0.0),
        "device": (UNITS, decided, 0.0),
        "device, all skipped": (UNITS, decided, np.inf),
    }
    for name, (units, record, limit) in records.items():
        limits.host[:] = limit
        try:
            graph = device.graph(MAIN, units, record)
            found["token_us"][name] = _timed(partial(graph.launch, MAIN), end)
        except BackendError as error:
            found.setdefault("not_recorded", {})[name] = str(error)
            continue
        if units and not (skipped.host == bool(limit)).all():
            found.setdefault("wrong", []).append(f"{name}: decided {skipped.host.tolist()}")
    token = found["token_us"]
    found["dispatch"] = "device" if token.get("device", np.inf) < token["overlapped"] else "overlapped"
    return found


def _timed(work: Callable[[], object], end: Callable[[], object], ended: bool = True) -> float:
    """Return the median microseconds of `work`, with those of `end` where `ended`."""
    spent = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        given = time.perf_counter()
        end()
        spent.append((time.perf_counter() if ended else given) - begin)
    return 1e6 * median(spent[REPEATS // 10 :])


def _bandwidth(device: Cuda) -> float:
    """Return the bytes that a copy on the device reads and writes in a second."""
    places = [device.memory(_COPIED) for _ in range(2)]
    each = _timed(lambda: device.copy(MAIN, *places), lambda: device.synchronize(MAIN))
    return 2e6 * _COPIED / each
