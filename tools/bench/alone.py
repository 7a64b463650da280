"""Decode time with one mode to a process, as an application has it: nothing else's weights are in the caches.

    python tools/bench/alone.py BUNDLE --mode cpu:dense --mode cpu:token:4 --mode cpu:static:4

`frontier` times modes in turns in one process, which cancels what a shared machine does, but on a processor whose last
cache holds a model each finds it full of another's engines. Here every run is a fresh process, in another order every
round, so that the machine's drift is in the numbers: the mean ratio of the rounds stands with its standard error.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from statistics import mean, median, stdev

import click
import numpy as np
from common import in_fresh_processes, print_json
from precision import HELD_OUT
from rich.console import Console
from rich.table import Table

from dash_export import DashRuntime
from dash_export.decision import Action, Setting
from dash_export.evaluation.text import windows
from dash_export.text_files import read_text

BLOCK = 8
WARM_UP = 32
"""Tokens: a policy that skips comes late to some of its engines."""


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--mode", "modes", multiple=True, metavar="TARGET:KIND[:SKIPPED]",
    default=("cpu:dense", "cpu:token:4", "cpu:token:8", "cpu:static:4", "cpu:static:8"), show_default=True,
    help="What is timed; the others are divided by the first.",
)  # fmt: skip
@click.option("--context", default=200, show_default=True, help="Tokens of prompt.")
@click.option("--tokens", default=320, show_default=True, help="Known tokens decoded after it.")
@click.option("--rounds", type=click.IntRange(min=2), default=10, show_default=True, help="Processes per mode.")
def main(bundle: Path, modes: tuple[str, ...], context: int, tokens: int, rounds: int) -> None:
    """Every mode in fresh processes, in turns."""
    found: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    for number in range(rounds):
        for mode in Random(number).sample(modes, len(modes)):
            found[mode] += in_fresh_processes(timed_once, bundle, mode, context, tokens, number, processes=1)
        shown = ", ".join(f"{mode} {1e3 * own[-1][0]:.2f} ms" for mode, own in found.items())
        print(f"round {number + 1} of {rounds}: {shown}")
    table = Table("mode", "layers/token", "ms/token", f"of {modes[0]}", title=f"{bundle.name}, a process each")
    result: dict[str, object] = {"context": context, "tokens": tokens, "rounds": rounds}
    for mode, own in found.items():
        seconds, layers = median(one for one, _ in own), mean(count for _, count in own)
        ratios = [one / base for (one, _), (base, _) in zip(own, found[modes[0]], strict=True)]
        ratio, error = mean(ratios), stdev(ratios) / rounds**0.5
        table.add_row(mode, f"{layers:.2f}", f"{1e3 * seconds:.3f}", f"{ratio:.3f} ± {error:.3f}")
        figures = {"layers": layers, "ms": 1e3 * seconds, "ratio": ratio, "standard_error": error}
        result[mode] = {name: round(value, 4) for name, value in figures.items()}
    Console().print(table)
    print_json("alone", result)


def timed_once(bundle: Path, mode: str, context: int, tokens: int, round_: int, _number: int) -> tuple[float, float]:
    """(seconds per token, the median of blocks past the warm-up; layers run per token): of a window by the round."""
    target, kind, *skipped = mode.split(":")
    setting = Setting(kind, skipped=float(skipped[0])) if skipped else Setting(kind)
    runtime = DashRuntime.load(bundle, target, dispatch=None if setting.asks_network else "plain", verify=False)
    parts = windows(runtime, read_text(HELD_OUT), HELD_OUT.name, 8, context + WARM_UP + tokens)
    part = parts[round_ % len(parts)]
    session = runtime.session_with(setting)
    session.prefill(part[:context])
    seconds, taken = [], []
    for token in part[context:].tolist():
        began = time.perf_counter()
        taken.append(session.decode_one(token)[1])
        seconds.append(time.perf_counter() - began)
    blocks = np.array(seconds[WARM_UP:])[: tokens // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
    return float(np.median(blocks)), float((np.array(taken[WARM_UP:]) == Action.RUN).sum(axis=1).mean())


if __name__ == "__main__":
    main()
