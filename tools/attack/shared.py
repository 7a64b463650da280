"""Parts that the attacks share: how much memory a process takes, and how an attack ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NoReturn

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(Path(__file__).parent)]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def resident(process: int | str = "self") -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(sizes: Sequence[float], flat: float, faults: list[str]) -> dict[str, list[float]]:
    """Memory (MB) after the warm-up and at the end; growth by more than the share `flat` is one of the `faults`."""
    warm = sizes[len(sizes) // 5 :]
    third = max(1, len(warm) // 3)
    first, last = median(warm[:third]), median(warm[-third:])
    if last > (1 + flat) * first:
        faults.append(f"memory grew by {last / first - 1:.1%}, more than {flat:.0%}")
    return {"megabytes": [round(first, 1), round(last, 1)]}


def finish(attack: str, faults: Sequence[str], **figures: object) -> NoReturn:
    """Print the first faults and one JSON line. Exits with 1 on faults."""
    print(*faults[:10], sep="\n")
    print(json.dumps({"attack": attack, **figures, "faults": len(faults)}))
    raise SystemExit(bool(faults))
