"""What skipping costs: the bypasses, K and V and all, against what the skipped units would have taken.

    python tools/bench/owed.py BUNDLE --skipped 5

Three variants decode the same tokens, interleaved in one process: dense; the token policy; and the same with nothing
done for a skipped unit, whose tokens are worthless and whose time is the bound. Several fresh processes load the
engines, and the means over them are given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import numpy as np
from common import in_fresh_processes, interleaved, owe_nothing, print_json
from rich.console import Console
from rich.table import Table

from dash_export import DashRuntime
from dash_export.decision import Setting, unit_skips
from dash_export.resources import resource_folder
from dash_export.runtime.decode import BoundStep
from dash_export.runtime.rules import DENSE, FixedRule, Rule

TOKENS = 24
DENSE_NAME, SKIPPING, BOUND = "dense", "its actions", "its actions, nothing owed"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--skipped", default=5.0, show_default=True, help="Layers skipped per token, on average.")
@click.option("--context", default=256, show_default=True, help="Cached tokens before the first one.")
@click.option("--rounds", default=12, show_default=True, help="Interleaved passes over the tokens, per process.")
@click.option("--processes", default=12, show_default=True, help="Fresh ones that load the engines.")
def main(bundle: Path, target: str, skipped: float, context: int, rounds: int, processes: int) -> None:
    """Time a window of held-out text each way."""
    saved: dict[str, list[float]] = {}
    milliseconds: dict[str, list[float]] = {}
    count = 0.0
    found = in_fresh_processes(timed_once, bundle, target, skipped, context, rounds, processes=processes)
    for number, (times, count) in enumerate(found):  # noqa: B007
        for name, own in times.items():
            pairs = zip(times[DENSE_NAME], own, strict=True)
            saved.setdefault(name, []).append(median(1e6 * (base - mine) / TOKENS for base, mine in pairs))
            milliseconds.setdefault(name, []).append(1e3 * median(own) / TOKENS)
        shown = ", ".join(f"{name} {values[-1]:.0f} us" for name, values in saved.items())
        print(f"process {number + 1} of {processes}: {shown}")
    means = {name: mean(values) for name, values in saved.items()}
    bound = means[BOUND]
    table = Table("variant", "ms/token", "saved us", "of the bound", title=f"{bundle.name}, {target}")
    for name, value in means.items():
        table.add_row(name, f"{mean(milliseconds[name]):.3f}", f"{value:.0f}", f"{value / bound:.0%}")
    Console().print(table)
    owed = bound - means[SKIPPING]
    print(f"{count:.2f} layers skipped per token. Bypasses take {owed / bound:.0%} of what these would have taken.")
    result = {"skipped": count, "processes": processes, "bound_us": bound, "owed_us": owed}
    print_json("owed", {"target": target, **{key: round(value, 3) for key, value in result.items()}})


def timed_once(
    bundle: Path, target: str, skipped: float, context: int, rounds: int, _number: int
) -> tuple[dict[str, list[float]], float]:
    """(seconds per pass of every variant, layers skipped per token)."""
    runtime = DashRuntime.load(bundle, target, verify=False)
    text = (resource_folder("calibration") / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(runtime.text.encode(text)[: context + TOKENS], np.int64)
    session = runtime.session_with(Setting("token", skipped=skipped))
    session.prefill(ids[:context])
    actions = np.array([session.decode_one(int(token))[1] for token in ids[context:]])

    def passes(rules: list[Rule], nothing_owed: bool = False) -> Callable[[], object]:
        cache: Any = runtime.engines.cache(context)
        cache.reserve(context + TOKENS)
        runtime.engines.step(cache, context).prefill(ids[:context])
        step = runtime.engines.step(cache, 1)
        assert isinstance(step, BoundStep)
        if nothing_owed:
            owe_nothing(step)

        def run() -> None:
            cache.length = context
            for token, each in zip(ids[context:].tolist(), rules, strict=True):
                step.decode(token, each)

        return run

    skips = unit_skips(actions, runtime.engines.units)
    forced: list[Rule] = [FixedRule(np.flatnonzero(each).tolist()) for each in skips.T]
    variants = {
        DENSE_NAME: passes([DENSE] * TOKENS),
        SKIPPING: passes(forced),
        BOUND: passes(forced, nothing_owed=True),
    }
    times = dict(zip(variants, interleaved(list(variants.values()), rounds, block=2, settle=1), strict=True))
    return times, float(actions.sum(axis=1).mean())


if __name__ == "__main__":
    main()
