"""Prefill: engines per unit against the same layers as one graph, and what a long prompt costs.

python tools/bench/prefill.py BUNDLE [--target cpu]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import click
import numpy as np
import numpy.typing as npt
from common import in_fresh_processes, interleaved, load_both, paired_ratio, print_json, whole_build
from rich.console import Console
from rich.table import Table

from dash_export.build_record import Build
from dash_export.bundle import Bundle
from dash_export.evaluation.alone import peak_memory
from dash_export.runtime import DashRuntime
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.text import Text

TEXT = Path(__file__).parents[2] / "tests" / "data" / "heldout.txt"
PROMPT = 512
LAYERS, GRAPH = "engines per unit", "one graph"


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Interleaved prompts per process.")
@click.option("--processes", default=8, show_default=True, help="Fresh ones that load every variant.")
def main(bundle: Path, target: str, rounds: int, processes: int) -> None:
    """Prompts up to the model's context, in the recipe's chunks, and 512 tokens at once, interleaved."""
    opened = Bundle.open(bundle)
    long = _long_prompts(bundle, target)  # first: what lowers the whole model below takes memory too
    found: dict[str, list[list[float]]] = {}
    with whole_build(opened, target) as whole:
        for timed in in_fresh_processes(timed_once, bundle, target, whole, rounds, processes=processes):
            for name, times in timed.items():
                found.setdefault(name, []).append(times)
    result: dict[str, object] = {"target": target, "prompts": long}
    for name, own in found.items():
        ratios = [paired_ratio(times, graph) for times, graph in zip(own, found[GRAPH], strict=True)]
        rate = PROMPT / median(median(times) for times in own)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"{PROMPT} tokens, {name}: {rate:.0f} tokens/s, {mean(ratios):.3f} of one graph's time ({spread})")
        result[name] = {"rate": round(rate, 1), "of_whole": round(mean(ratios), 4)}
    print_json("prefill", result)


def _long_prompts(bundle: Path, target: str) -> list[dict[str, float]]:
    runtime = DashRuntime.load(bundle, target, verify=False)
    ids = _tokens(runtime.text, runtime.engines.model.max_positions)
    table = Table("tokens", "seconds", "tokens/s", "KV cache MB", "peak memory MB", title=f"{bundle.name}, {target}")
    rows = []
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
        rows.append(row)
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
    return rows


def timed_once(
    bundle: Path, target: str, whole: tuple[Path, Build], rounds: int, number: int
) -> dict[str, list[float]]:
    """Seconds per prompt of every variant. Who is loaded first changes with `number`."""
    layers, graph = load_both(bundle, target, whole, number)
    ids = _tokens(Text(bundle), PROMPT)
    runs = {LAYERS: _prompt(layers, ids), GRAPH: _prompt(graph, ids)}
    return dict(zip(runs, interleaved(list(runs.values()), rounds, block=1, settle=1), strict=True))


def _tokens(text: Text, count: int) -> npt.NDArray[np.int64]:
    """That many of some text."""
    return np.resize(np.asarray(text.encode(TEXT.read_text(encoding="utf-8")), np.int64), count)


def _prompt(engines: EngineSet, ids: npt.NDArray[np.int64]) -> Callable[[], object]:
    cache = engines.cache(PROMPT)
    cache.reserve(PROMPT)
    step = engines.step(cache, PROMPT)

    def run() -> None:
        cache.length = 0
        step.prefill(ids)

    return run


if __name__ == "__main__":
    main()
