"""Prefill: engines per unit against the same layers as one graph, and what a long prompt costs.

python tools/bench/prefill.py BUNDLE [--target cpu]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from common import Times, held_out, in_fresh_processes, load_both, print_json, report, timed, whole_build

from dash_export.backends.host.cpus import peak_memory
from dash_export.backends.host.decode import EngineSet
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build
from dash_export.commands.tables import print_table
from dash_export.runtime import DashRuntime
from dash_export.text.tokenizer import Text

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
    with whole_build(opened, target) as whole:
        times = in_fresh_processes(timed_once, bundle, target, whole, rounds, processes=processes)
    rows = report(f"{bundle.name}, {target}, {PROMPT} tokens", "prompt", times)
    print_json("prefill", {"target": target, "prompts": long, **rows})


def _long_prompts(bundle: Path, target: str) -> list[dict[str, float]]:
    runtime = DashRuntime.load(bundle, target, verify=False)
    ids = held_out(runtime.text.encode, runtime.engines.model.max_positions)
    rows = []
    for length in (PROMPT, 1024, 2048, 4096, len(ids) - 1):
        session = runtime.session()
        began = time.perf_counter()
        session.prefill(ids[:length])
        seconds = time.perf_counter() - began
        row = {"tokens": length, "seconds": round(seconds, 3), "rate": round(length / seconds, 1)}
        rows.append(row | {"cache_mb": round(session.cache.nbytes / 1e6, 1), "peak_mb": round(peak_memory() / 1e6, 1)})
    heads = ("tokens", "seconds", "tokens/s", "KV cache MB", "peak memory MB")
    print_table(f"{bundle.name}, {target}", (), heads, (row.values() for row in rows))
    return rows


def timed_once(bundle: Path, target: str, whole: tuple[Path, Build], rounds: int, number: int) -> Times:
    layers, graph = load_both(bundle, target, whole, number)
    ids = held_out(Text(bundle).encode, PROMPT)
    return timed({GRAPH: _prompt(graph, ids), LAYERS: _prompt(layers, ids)}, rounds, block=1, settle=1)


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
