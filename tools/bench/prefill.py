"""Prefill: an engine per layer against the same layers as one graph, and what a long prompt costs.

python tools/bench/prefill.py BUNDLE
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import click
import numpy as np
import numpy.typing as npt
from common import in_fresh_processes, interleaved, load_engines, paired_ratio, print_json, whole_build
from rich.console import Console
from rich.table import Table

from dash_export.bundle import Build, Bundle
from dash_export.profiling.machine import peak_memory
from dash_export.runtime import DashRuntime
from dash_export.runtime.dispatch import EngineSet
from dash_export.runtime.text import Text

TEXT = Path(__file__).parents[2] / "tests" / "data" / "heldout.txt"
PROMPT = 512


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Interleaved prompts per process.")
@click.option("--processes", default=6, show_default=True, help="Fresh ones that load both.")
def main(bundle: Path, target: str, rounds: int, processes: int) -> None:
    """512 tokens at once, interleaved; then prompts up to the model's context, in the recipe's chunks."""
    opened = Bundle.open(bundle)
    ratios, times = [], []
    with whole_build(opened, target) as whole:
        for layers, graph in in_fresh_processes(timed_once, bundle, target, whole, rounds, processes=processes):
            ratios.append(paired_ratio(layers, graph))
            times.append(median(layers))
            print(f"process {len(ratios)} of {processes}: {ratios[-1]:.3f}")
    rate, ratio = PROMPT / median(times), mean(ratios)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f} in {processes} processes"
    table = Table("tokens", "seconds", "tokens/s", "KV cache MB", "peak memory MB", title=f"{bundle.name}, {target}")
    runtime = DashRuntime.load(bundle, target, dispatch="plain", verify=False)
    ids = _tokens(runtime.text, runtime.engines.model.max_positions)
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
    Console().print(table)
    print(f"{PROMPT} tokens: {rate:.0f} tokens/s; an engine per layer takes {ratio:.3f} of one graph's time ({spread})")
    print_json("prefill", {"target": target, "rate": round(rate, 1), "of_whole": round(ratio, 4), "prompts": long})


def timed_once(
    bundle: Path, target: str, whole: tuple[Path, Build], rounds: int, number: int
) -> tuple[list[float], list[float]]:
    """Seconds per prompt of an engine per layer and of one graph. Who is loaded first changes with `number`."""
    opened = Bundle.open(bundle)
    builds = [(opened, opened.load_build(target)), (Bundle(whole[0], opened.manifest), whole[1])]
    order = (0, 1) if number % 2 == 0 else (1, 0)
    engines = {index: load_engines(*builds[index]) for index in order}
    ids = _tokens(Text(bundle), PROMPT)
    layers, graph = interleaved([_prompt(engines[index], ids) for index in (0, 1)], rounds, block=1, settle=1)
    return layers, graph


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
