"""Prefill: engines per unit against the same layers as one graph, the engine for prompts where the build has one,
and what a long prompt costs.

python tools/bench/prefill.py BUNDLE [--target cpu-prefill-int8]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from common import Times, console, held_out, in_fresh_processes, load_both, print_json, report, timed, whole_build
from rich.table import Table

from dash_export.bundle import Bundle
from dash_export.decision import DENSE_POSITIONS
from dash_export.divergence import DenseRows, nll
from dash_export.evaluate.timing import peak_memory
from dash_export.manifest import Build
from dash_export.runtime import DashRuntime
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.text import Text

PROMPT = 512
CONTEXT, FOLLOWING = 224, 32
PROMPTS = "the engine for prompts"


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--rounds", default=6, show_default=True, help="Interleaved prompts per process.")
@click.option("--processes", default=8, show_default=True, help="Fresh ones that load every variant.")
def main(bundle: Path, target: str, rounds: int, processes: int) -> None:
    """Prompts up to the model's context, in the recipe's chunks; 512 tokens at once, interleaved; and what follows a
    prompt, where the build has an engine for prompts.
    """
    opened = Bundle.open(bundle)
    long = _long_prompts(bundle, target)  # first: what lowers the whole model below takes memory too
    with whole_build(opened, target) as whole:
        times = in_fresh_processes(timed_once, bundle, target, whole, rounds, processes=processes)
    rows = report(f"{bundle.name}, {target}, {PROMPT} tokens", "prompt", times)
    result: dict[str, object] = {"target": target, "prompts": long, **rows}
    if PROMPTS in times:
        result["after"] = _after_a_prompt(bundle, target)
    print_json("prefill", result)


def _long_prompts(bundle: Path, target: str) -> list[dict[str, float]]:
    runtime = DashRuntime.load(bundle, target, verify=False)
    ids = held_out(runtime.text.encode, runtime.engines.model.max_positions)
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
    console.print(table)
    return rows


def _after_a_prompt(bundle: Path, target: str) -> dict[str, float]:
    """What the engine for prompts costs: KL (nats per token) and perplexity of FOLLOWING tokens after CONTEXT ones,
    dense, against the same tokens after a prompt that went through the layers' engines.
    """
    runtime = DashRuntime.load(bundle, target, verify=False)
    assert isinstance(runtime.engines, EngineSet)
    passages = held_out(runtime.text.encode, 17 * (CONTEXT + FOLLOWING)).reshape(17, -1)

    def following(passage: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits [FOLLOWING, vocab]."""
        session = runtime.session()
        logits = [session.prefill(passage[:CONTEXT])]
        return np.stack(logits + [session.decode_one(int(token))[0] for token in passage[CONTEXT:-1]])

    fast = [following(passage) for passage in passages]
    runtime.engines._for_prompts = None
    kl, rise = [], []
    for passage, other in zip(passages, fast, strict=True):
        exact = following(passage)
        kl.append(DenseRows(exact).kl(other).mean())
        rise.append((nll(other, passage[CONTEXT:]) - nll(exact, passage[CONTEXT:])).mean())
    found = {"kl": float(np.mean(kl)), "perplexity": float(np.expm1(np.mean(rise))), "tokens": 17 * FOLLOWING}
    print("{tokens} tokens after prompts: KL {kl:.4f} nats, perplexity {perplexity:+.2%}".format(**found))
    return found


def timed_once(bundle: Path, target: str, whole: tuple[Path, Build], rounds: int, number: int) -> Times:
    """Seconds per prompt of every variant."""
    layers, graph = load_both(bundle, target, whole, number)
    ids = held_out(Text(bundle).encode, PROMPT)
    runs = {"one graph": _prompt(graph, ids), "engines per unit": _prompt(layers, ids)}
    if layers.prefills_apart:
        runs[PROMPTS] = _prompt(layers, ids, apart=True)
    return timed(runs, rounds, block=1, settle=1)


def _prompt(engines: EngineSet, ids: npt.NDArray[np.int64], apart: bool = False) -> Callable[[], object]:
    """One prompt; `apart`: all but its first positions through the engine for prompts, as sessions do it."""
    first = DENSE_POSITIONS if apart else 0
    cache = engines.cache(PROMPT)
    cache.reserve(PROMPT)
    steps = [engines.prefill_step(cache, PROMPT - first)] if apart else [engines.step(cache, PROMPT)]
    if first:
        steps.insert(0, engines.step(cache, first))

    def run() -> None:
        cache.length = 0
        for step, tokens in zip(steps, np.split(ids, [first])[-len(steps) :], strict=True):
            step.prefill(tokens)

    return run


if __name__ == "__main__":
    main()
