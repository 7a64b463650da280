"""Which machine this is, how it was set while something was timed, and what its memory gives."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime

from dash_export import __version__
from dash_export.runtime.cpus import available_memory, cpu_name, physical_cores

BUSY = 0.5
"""From this load per core before we begin on, other work disturbs the timings."""
PASSES = 12
BUFFER = 256 << 20
"""Bytes that bandwidth is measured over, or four last caches: little of it is still there when a pass begins anew."""
_CPU = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Machine:
    """`clock_mhz` of each processor (empty where the system does not tell), `governor` of the power manager (None
    likewise), `last_cache` in bytes, `load` the processes that ran or waited over the last minute.
    """

    cpu: str
    cores: int
    clock_mhz: tuple[float, ...]
    governor: str | None
    last_cache: int | None
    load: float | None
    system: str
    python: str
    onnxruntime: str
    dash_export: str

    @property
    def busy(self) -> bool:
        """Whether other work ran just before."""
        return self.load is not None and self.load > BUSY * self.cores


def this_machine() -> Machine:
    """The machine as it is now."""
    return Machine(
        cpu_name(),
        physical_cores(),
        clocks(),
        _read(_CPU / "cpu0/cpufreq/scaling_governor") or None,
        last_cache(),
        round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        f"{platform.system()} {platform.machine()}",
        platform.python_version(),
        onnxruntime.__version__,
        __version__,
    )


def clocks() -> tuple[float, ...]:
    """MHz of each processor now, as the kernel tells it."""
    found = [_read(path) for path in sorted(_CPU.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))]
    if found:
        return tuple(int(text) / 1000 for text in found if text.isdigit())
    lines = [line.partition(":") for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("cpu MHz")]
    return tuple(float(value) for _, _, value in lines)


def last_cache() -> int | None:
    """Bytes of the largest cache of processor 0, None where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [_read(path) for path in _CPU.glob("cpu0/cache/index*/size")]
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[:-1].isdigit() and text[-1] in units]
    return max(sizes, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second of all cores: `read` (sum of one buffer) and `copy` (read and written bytes together), the best
    of several passes each; `bytes` is the size of a buffer.
    """

    read: float
    copy: float
    bytes: int
    cores: int

    @property
    def stream(self) -> float:
        """What the machine can do: the better of the two."""
        return max(self.read, self.copy)


def measure_bandwidth(size: int | None = None) -> Bandwidth:
    """numpy over buffers of `size` bytes that no cache holds. It lets go of the interpreter lock: one thread per core.
    Under a second.
    """
    cores = physical_cores()
    wanted = size or max(BUFFER, 4 * (last_cache() or 0))
    count = max(1 << 10, min(wanted, available_memory() // 4) // 8 // cores)
    sources = [np.ones(count) for _ in range(cores)]
    targets = [np.zeros(count) for _ in range(cores)]
    total = 8 * count * cores
    with ThreadPoolExecutor(cores) as pool:

        def best(work: Callable[[int], object]) -> float:
            seconds = []
            for _ in range(PASSES):
                began = perf_counter()
                list(pool.map(work, range(cores)))
                seconds.append(perf_counter() - began)
            return min(seconds)

        read = best(lambda core: sources[core].sum())
        copy = best(lambda core: np.copyto(targets[core], sources[core]))
    return Bandwidth(total / read, 2 * total / copy, total, cores)
