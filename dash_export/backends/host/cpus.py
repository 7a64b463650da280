"""Facts of the processor: cores and memory that this process may use, load. A container's limits are those of its
control groups (Linux, version 2).
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def allowed_processors() -> set[int]:
    """Return the processors that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Return how many threads decode best: one per physical core, or what a container may use of them, for more would
    be stopped for a part of the time.
    """
    quotas = [int(told[0]) // int(told[1]) for _, told in _limits("cpu.max")]
    return max(1, min([physical_cores(), *quotas]))


def physical_cores() -> int:
    """Return the number of physical cores among the allowed processors (hyper-threads share the multipliers that decode
    needs).
    """
    allowed, cores = allowed_processors(), set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            return len(allowed)
    return max(1, len(cores))


def _limits(name: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield (control group, words of its file `name`) of this process's group and those around it with a limit."""
    own = _GROUPS / (_proc("self/cgroup", "0") or "").lstrip(":/")
    for group in (own, *own.parents):
        words = _words(group / name) if group.is_relative_to(_GROUPS) else []
        if words and words[0] != "max":
            yield group, words


def _words(file: Path) -> list[str]:
    """Return the words of a file of a control group; none where it cannot be read."""
    try:
        return file.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []


def _proc(name: str, *keys: str) -> str | None:
    """Return the value of the first line in a file of `/proc` whose key is in `keys`; None without one or off Linux."""
    try:
        lines = (Path("/proc") / name).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() in keys), None)


def cpu_name() -> str:
    """Return the processor's name as the kernel reports it."""
    return _proc("cpuinfo", "model name", "Model", "Hardware") or "unknown CPU"


def has_bfloat16() -> bool:
    """Return whether the processor multiplies in bfloat16. Else torch takes two to four times as long in it."""
    flags = (_proc("cpuinfo", "flags", "Features") or "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & {*flags})


def available_memory() -> int:
    """Return the bytes that machine and container can still give without swapping (off Linux assume one GiB)."""
    found = _proc("meminfo", "MemAvailable")
    free = [int(found.split()[0]) * 1024 if found else 1 << 30]
    for group, (most,) in _limits("memory.max"):
        told = _words(group / "memory.stat")  # what is kept of files can be given back
        files = sum(int(told[told.index(name) + 1]) for name in ("inactive_file", "active_file") if name in told)
        used = sum(map(int, _words(group / "memory.current")))
        free.append(max(0, int(most) - max(0, used - files)))
    return min(free)


def peak_memory() -> int:
    """Return the most bytes that this process had resident, 0 where there is no Linux. (The figure of getrusage begins
    with the parent's memory at the fork.)
    """
    found = _proc("self/status", "VmHWM")
    return int(found.split()[0]) * 1024 if found else 0


class LoadMeter:
    """Load that other processes put on the machine, from the making of this object on (on Linux)."""

    def __init__(self) -> None:
        self._begin = self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """Return seconds on the clock, of processors that work for others, and of processors that the host withheld."""
        try:
            ticks = [int(number) for number in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]]
        except (OSError, ValueError):
            return time.monotonic(), 0.0, 0.0
        user, nice, system, _idle, _waits, hard, soft, stolen = (tick / os.sysconf("SC_CLK_TCK") for tick in ticks)
        own = time.process_time()
        return time.monotonic(), user + nice + system + hard + soft - own, stolen

    def load(self) -> tuple[float, float]:
        """Return processors that other processes kept busy, and processors that the host withheld, on average."""
        clock, others, stolen = (end - begin for end, begin in zip(self._seconds(), self._begin, strict=True))
        return max(0.0, round(others / max(clock, 1e-6), 3)), max(0.0, round(stolen / max(clock, 1e-6), 3))
