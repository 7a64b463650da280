"""Skipping pays: time per token with k gated layers skipped, against what the measured segment times predict.

python tools/bench/skipping.py BUNDLE --target cpu

With `--moving` the set moves by one gated layer with every token, as a token policy's does: every layer is then read
every few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from common import interleaved, paired_ratio, print_json, spread
from rich.console import Console
from rich.table import Table

from dash_export.runtime import DashRuntime
from dash_export.runtime.rules import FixedRule
from dash_export.stretches import TokenTime


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--most", default=12, show_default=True, help="Skip 0 to this many gated layers.")
@click.option("--moving", is_flag=True, help="Another set of the same size for every token.")
@click.option("--rounds", default=30, show_default=True, help="Interleaved blocks of eight tokens.")
def main(bundle: Path, target: str, context: int, most: int, moving: bool, rounds: int) -> None:
    """Time one decoded token under sets of growing size, interleaved; the layers are spread over the model."""
    runtime = DashRuntime.load(bundle, target, dispatch="plain")
    build, gated = runtime.build, runtime.bundle.manifest.policy.gated
    cache: Any = runtime.engines.cache(context)
    cache.reserve(context + 1)
    counts = range(min(most, len(gated)) + 1)
    sets = [spread(gated, count) for count in counts]

    def token(skipped: list[int]) -> Callable[[], object]:
        step = runtime.engines.step(cache, 1)  # of its own: a step remembers what it launches for the rules it saw last
        places = [gated.index(layer) for layer in skipped]
        shifts = range(len(gated) if moving else 1)
        rules = cycle([FixedRule(gated[(place + shift) % len(gated)] for place in places) for shift in shifts])

        def run() -> None:
            cache.length = context
            step.decode(1, next(rules))

        return run

    times = interleaved([token(skipped) for skipped in sets], rounds)
    milliseconds = [1e3 * median(sample) for sample in times]
    token_time = TokenTime(build)
    table = Table(
        "skipped",
        "ms/token",
        "of dense",
        "saved ms",
        "predicted ms",
        "realised",
        title=f"{bundle.name}, {target}, {context} cached tokens",
    )
    realised = []
    for count, skipped, sample, ms in zip(counts, sets, times, milliseconds, strict=True):
        ratio = paired_ratio(sample, times[0])
        saved = milliseconds[0] * (1 - ratio)
        predicted = 1e-3 * build.cost.dense_us * (1 - token_time.of(skipped))
        share = saved / predicted if skipped else float("nan")
        realised.append(share)
        table.add_row(
            str(count),
            f"{ms:.3f}",
            f"{ratio:.3f}",
            f"{saved:.3f}",
            f"{predicted:.3f}",
            f"{share:.0%}" if skipped else "",
        )
    slope, intercept = np.polyfit(list(counts), milliseconds, 1)
    residual = np.array(milliseconds) - (slope * np.array(counts) + intercept)
    r_squared = 1 - residual.var() / np.var(milliseconds)
    Console().print(table)
    print(f"linear fit: {intercept:.3f} ms {slope:+.4f} ms per skipped layer, R2 = {r_squared:.4f}")
    result = {
        "ms": [round(x, 4) for x in milliseconds],
        "r_squared": round(float(r_squared), 5),
        "slope_ms": round(float(slope), 5),
    }
    print_json(
        "skipping",
        {
            "target": target,
            "context": context,
            "moving": moving,
            **result,
            "realised": [round(x, 3) for x in realised[1:]],
        },
    )


if __name__ == "__main__":
    main()
