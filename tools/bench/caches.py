"""What this machine's caches do to a set of skipped layers that changes from token to token.

    python tools/bench/caches.py BUNDLE --target cpu

How fast one thread reads memory again that is so large, and what one gated layer, launched alone, takes by how many
tokens ago it last ran: under sets drawn anew for every token, against one set for all of them. Where a layer takes
longer the longer ago it ran, the cache that the first table shows does not hold all that such tokens read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import click
import numpy as np
from common import print_json, spread
from rich.console import Console
from rich.table import Table

from dash_export.runtime import DashRuntime
from dash_export.runtime.backends.base import Launch

SIZES = (1, 4, 16, 32, 48, 64, 80, 96, 128, 192, 256, 384)
"""Megabytes."""
READ = 800
"""Megabytes read of each size, at least three times over."""
WARM_UP = 20
OLDEST = 6

Times = dict[tuple[str, int], list[float]]
"""(what is done with a layer, tokens since that was last done) -> microseconds."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--skipped", default=8, show_default=True, help="Gated layers that every token skips.")
@click.option("--tokens", default=400, show_default=True, help="Timed for each kind of set, twice in turn.")
def main(bundle: Path, target: str, context: int, skipped: int, tokens: int) -> None:
    """Read rates first, before the engines lie in the caches."""
    rates = {size: read_rate(size) for size in SIZES}
    table = Table("MB", "GB/s", title="Reading it again")
    for size, rate in rates.items():
        table.add_row(str(size), f"{rate:.1f}")
    console = Console()
    console.print(table)

    runtime = DashRuntime.load(bundle, target, dispatch="plain")
    gated = runtime.bundle.manifest.policy.gated
    cache: Any = runtime.engines.cache(context)
    cache.reserve(context + 1)
    step: Any = runtime.engines.step(cache, 1)
    cache.length = context
    step.place()
    launches = dict(zip([segment.first for segment in runtime.build.segments], step.launches(), strict=True))
    random = Random(0)
    kinds: dict[str, Callable[[], Collection[int]]] = {
        "one set": lambda: spread(gated, skipped),
        "a set per token": lambda: random.sample(gated, skipped),
    }
    found: dict[str, Times] = {kind: defaultdict(list) for kind in kinds}
    totals: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind in (*kinds, *kinds):
        totals[kind] += decode(launches, gated, kinds[kind], tokens, found[kind])

    table = Table("us", *kinds, title=f"{bundle.name}, {target}: {skipped} of {len(gated)} gated layers skipped")
    for age in range(1, OLDEST + 1):
        ago = "1 token" if age == 1 else f"{age} {'or more ' if age == OLDEST else ''}tokens"
        cells = [_median(times.get(("run", age), [])) for times in found.values()]
        table.add_row(f"a layer that last ran {ago} ago", *cells)
    skips = ([us for (what, _), own in times.items() if what == "skip" for us in own] for times in found.values())
    table.add_row("a skip", *map(_median, skips))
    table.add_row("a token", *map(_median, totals.values()))
    console.print(table)
    result = {
        kind: {f"{what} {age}": round(median(own), 2) for (what, age), own in sorted(times.items())}
        for kind, times in found.items()
    }
    totals_us = {kind: round(median(own), 1) for kind, own in totals.items()}
    print_json("caches", {"gb_per_s": rates, "token_us": totals_us, "us": result, "skipped": skipped})


def _median(times: list[float]) -> str:
    return f"{median(times):.0f}" if times else ""


def read_rate(megabytes: int) -> float:
    """GB/s, the median of passes over so much memory."""
    array = np.ones(megabytes * 1_000_000 // 8)
    seconds = []
    for _ in range(3 + max(3, READ // megabytes)):
        began = time.perf_counter()
        array.max()
        seconds.append(time.perf_counter() - began)
    return round(1e-9 * array.nbytes / median(seconds[3:]), 1)


def decode(
    launches: dict[int, tuple[Launch, Launch | None]],
    gated: Collection[int],
    draw: Callable[[], Collection[int]],
    tokens: int,
    times: Times,
) -> list[float]:
    """Adds to `times` and returns what the tokens took, microseconds."""
    last: dict[tuple[str, int], int] = {}
    totals = []
    for token in range(WARM_UP + tokens):
        skipped = draw()
        stamps = [time.perf_counter()]
        for layer, (run, skip) in launches.items():
            chosen = skip if layer in skipped else run
            assert chosen is not None
            chosen()
            stamps.append(time.perf_counter())
        for layer, (begin, end) in zip(launches, pairwise(stamps), strict=True):
            what = "skip" if layer in skipped else "run"
            age = token - last.get((what, layer), token)
            last[what, layer] = token
            if token >= WARM_UP and layer in gated and age > 0:
                times[what, min(age, OLDEST)].append(1e6 * (end - begin))
        if token >= WARM_UP:
            totals.append(1e6 * (stamps[-1] - stamps[0]))
    return totals


if __name__ == "__main__":
    main()
