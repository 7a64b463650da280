"""From nothing to the first token: time and memory of a fresh process, and what two of them share.

python tools/bench/load.py BUNDLE
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import click
from common import print_json

from dash_export.commands.tables import print_table

PROCESS = """
import json, sys, time
began = time.perf_counter()
from dash_export import DashRuntime
imported = time.perf_counter()
runtime = DashRuntime.load(sys.argv[1], sys.argv[2], verify=sys.argv[3] == "verified")
loaded = time.perf_counter()
session = runtime.session(skipped=4)
next(session.stream(runtime.text.chat([{"role": "user", "content": "Why is the sky blue?"}]), 8))
first = time.perf_counter()
rollup = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
kib = {name: int(rollup[name].split()[0]) for name in ("Rss", "Pss", "Private_Dirty", "Private_Clean")}
print(json.dumps({"import": imported - began, "load": loaded - imported, "first": first - loaded, **kib}), flush=True)
sys.stdin.read()
"""


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(bundle: Path, target: str, rounds: int) -> None:
    """Seconds are of a warm disk cache; medians. The memory is that of one process alone, and of the second of two."""
    engines = sum(file.stat().st_size for file in (bundle / "engines" / target).iterdir()) / 1e6
    rows = {}
    for how in ("verified", "unverified"):
        rows[how] = _median([_measured(bundle, target, how) for _ in range(rounds)])
    rows["each of two at once"] = _measured(bundle, target, "unverified", 2)
    shown = []
    for name, row in rows.items():
        memory = (f"{row[key] / 1e3:.0f}" for key in ("Rss", "Pss"))
        shown.append((name, *(f"{row[key]:.2f}" for key in ("import", "load", "first")), *memory))
    heads = ("import s", "load s", "first token s", "RSS MB", "PSS MB")
    print_table(f"engines {engines:.0f} MB", ("process",), heads, shown)
    print_json("load", {"target": target, "engine_mb": round(engines, 1), "rows": rows})


def _measured(bundle: Path, target: str, how: str, count: int = 1) -> dict[str, float]:
    """Medians of what so many processes at once tell; each stays until all have told."""
    command = [sys.executable, "-c", PROCESS, str(bundle), target, how]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen[str](command, **pipes) for _ in range(count)]
    told = [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]
    for process in processes:
        process.communicate()
    return _median(told)


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(median(row[key] for row in rows), 4) for key in rows[0]}


if __name__ == "__main__":
    main()
