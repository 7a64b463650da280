"""What this machine's memory gives to all its cores: numpy over buffers that no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from dash_export.runtime.cpus import available_memory, physical_cores

PASSES = 12
_LEAST = 256 << 20
_CACHES = 4
"""A buffer is this many times the last cache, so that little of it is still there when a pass begins anew."""
_USUAL_CACHE = 32 << 20


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second: `read` (sum of one buffer) and `copy` (read and written bytes together), the best of several
    passes each, with the medians; `bytes` is the size of a buffer.
    """

    read: float
    read_median: float
    copy: float
    copy_median: float
    bytes: int
    cores: int

    @property
    def stream(self) -> float:
        """What the machine can do: the better of the two."""
        return max(self.read, self.copy)


def last_cache() -> int | None:
    """Bytes of the largest cache of processor 0, None where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=None)


def measure_bandwidth(least: int = _LEAST) -> Bandwidth:
    """Under a second. numpy lets go of the interpreter lock, so one thread per core."""
    cores = physical_cores()
    wanted = max(least, _CACHES * (last_cache() or _USUAL_CACHE if least == _LEAST else 0))
    count = max(1 << 10, min(wanted, available_memory() // 4) // 8 // cores)
    sources = [np.ones(count) for _ in range(cores)]
    targets = [np.zeros(count) for _ in range(cores)]
    total = 8 * count * cores
    with ThreadPoolExecutor(cores) as pool:

        def times(work: Callable[[int], object]) -> list[float]:
            seconds = []
            for _ in range(PASSES):
                began = perf_counter()
                list(pool.map(work, range(cores)))
                seconds.append(perf_counter() - began)
            return seconds

        reads = times(lambda core: sources[core].sum())
        copies = times(lambda core: np.copyto(targets[core], sources[core]))
    return Bandwidth(
        total / min(reads),
        total / float(np.median(reads)),
        2 * total / min(copies),
        2 * total / float(np.median(copies)),
        total,
        cores,
    )
