"""Prefill: an engine per layer against the same layers as one graph, and what a long prompt costs.

python tools/bench/prefill.py BUNDLE
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from common import interleaved, paired_ratio, print_json, whole_model
from rich.console import Console
from rich.table import Table

from dash_export.profiling.machine import peak_memory
from dash_export.runtime import DashRuntime
from dash_export.runtime.backends.onnxruntime import create as backend

TEXT = Path(__file__).parents[2] / "tests" / "data" / "heldout.txt"
PROMPT = 512


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--rounds", default=8, show_default=True)
@click.option("--copies", default=3, show_default=True, help="Times that every variant is loaded.")
def main(bundle: Path, target: str, rounds: int, copies: int) -> None:
    """Prompts up to the model's context, in the recipe's chunks; then 512 tokens at once, interleaved."""
    runtime = DashRuntime.load(bundle, target, dispatch="plain", verify=False)
    ids = np.resize(runtime.text.encode(TEXT.read_text(encoding="utf-8")), runtime.engines.model.max_positions)
    table = Table("tokens", "seconds", "tokens/s", "KV cache MB", "peak memory MB", title=f"{bundle.name}, {target}")
    long = []
    for length in (PROMPT, 1024, 2048, 4096, len(ids) - 1):
        session = runtime.session()
        began = time.perf_counter()
        session.prefill(ids[:length])
        seconds = time.perf_counter() - began
        row = {
            "tokens": length,
            "seconds": round(seconds, 3),
            "rate": round(length / seconds, 1),
            "cache_mb": round(session.cache_bytes / 1e6, 1),
            "peak_mb": round(peak_memory() / 1e6, 1),
        }
        long.append(row)
        table.add_row(*(str(value) for value in row.values()))
    ratios, times = [], []
    for copy in range(copies):
        own = runtime if copy == 0 else DashRuntime.load(bundle, target, dispatch="plain", verify=False)
        runs = [_prompt(own.engines, ids), _prompt(whole_model(own.bundle, target, backend(0)), ids)]
        layers, whole = interleaved(runs, rounds, block=1, settle=1)
        ratios.append(paired_ratio(layers, whole))
        times.append(median(layers))
    rate, ratio = PROMPT / median(times), median(ratios)
    Console().print(table)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f} over {copies} copies"
    print(f"{PROMPT} tokens: {rate:.0f} tokens/s; an engine per layer takes {ratio:.3f} of one graph's time ({spread})")
    print_json("prefill", {"target": target, "rate": round(rate, 1), "of_whole": round(ratio, 4), "prompts": long})


def _prompt(engines: Any, ids: np.ndarray) -> Callable[[], object]:
    cache = engines.cache(PROMPT)
    cache.reserve(PROMPT)
    step = engines.step(cache, PROMPT)

    def run() -> None:
        cache.length = 0
        step.prefill(ids[:PROMPT])

    return run


if __name__ == "__main__":
    main()
