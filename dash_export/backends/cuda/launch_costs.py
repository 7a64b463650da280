"""Costs of a token on a card apart from its engines: launches, waits, copies, graphs with decisions.

The probe's token has UNITS units, and a copy of a few bytes stands for each engine. The token is launched one by one
with a wait for the policy (`overlapped`), as a graph that decides (`device`), and as a graph without decisions (dense).
"""

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
REPEATS = 200
_COPIED = 256 << 20


def probe(device: Cuda) -> dict[str, Any]:
    """Measure microseconds (medians, by the host's clock to the end of the work) and bytes per second; of a graph that
    cannot be recorded, return the reason. Takes a second or two.
    """
    found: dict[str, Any] = {"units": UNITS, "token_us": {}}
    small = [device.memory(256) for _ in range(2)]
    work = partial(device.copy, to=small[0], source=small[1])

    def launches(count: int) -> None:
        for _ in range(count):
            work(MAIN)

    found["launch_us"] = _timed(lambda: launches(100), lambda: device.synchronize(MAIN), ended=False) / 100
    found["wait_us"] = _timed(lambda: work(MAIN), lambda: device.synchronize(MAIN))
    found["bytes_per_second"] = _bandwidth(device)

    def overlapped() -> None:
        device.record(MAIN, "ready")
        launches(AHEAD)
        device.wait(BESIDE, "ready")
        work(BESIDE)
        device.record(BESIDE, "decided")
        device.wait_for_event("decided")
        launches(UNITS)

    found["token_us"]["overlapped"] = _timed(overlapped, lambda: device.synchronize(MAIN))
    damage, limits = Mirror(device, (UNITS,), np.float32), Mirror(device, (UNITS,), np.float64)
    skipped = Mirror(device, (UNITS,), np.bool_)

    def decided(graph: Any) -> None:
        device.copy(MAIN, limits.memory, limits.host)
        launches(AHEAD)
        graph.decide(MAIN, damage.memory, limits.memory, skipped.memory)
        for unit in range(UNITS):
            graph.branch(MAIN, unit, work, work)
        device.copy(MAIN, skipped.host, skipped.memory)

    records: dict[str, tuple[int, Callable[[Any], None], float]] = {
        "dense": (0, lambda _: launches(AHEAD + UNITS), 0.0),
        "device": (UNITS, decided, 0.0),
        "device, all skipped": (UNITS, decided, np.inf),
    }
    for name, (units, record, limit) in records.items():
        limits.host[:] = limit
        try:
            graph = device.graph(MAIN, units, record)
            found["token_us"][name] = _timed(partial(graph.launch, MAIN), lambda: device.synchronize(MAIN))
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
