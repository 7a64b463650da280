"""Which machine this is and how it was set while something was timed."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from dash_export import __version__
from dash_export.profiling.bandwidth import last_cache
from dash_export.runtime.cpus import cpu_name, physical_cores

BUSY = 0.5
"""From this load per core before we begin on, other work disturbs the timings."""


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
    return Machine(
        cpu_name(),
        physical_cores(),
        clocks(),
        governor(),
        last_cache(),
        round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        f"{platform.system()} {platform.machine()}",
        platform.python_version(),
        onnxruntime.__version__,
        __version__,
    )


def clocks() -> tuple[float, ...]:
    """MHz of each processor now, as the kernel tells it."""
    found = []
    for path in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")):
        try:
            found.append(int(path.read_text(encoding="ascii")) / 1000)
        except (OSError, ValueError):
            continue
    if found:
        return tuple(found)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return tuple(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))
    except (OSError, ValueError):
        return ()


def governor() -> str | None:
    try:
        path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
