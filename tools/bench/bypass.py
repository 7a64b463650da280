"""Measure what skipping costs: the bypasses, K and V and all, against what the skipped units would have taken.

    python tools/bench/bypass.py BUNDLE --skipped 5

Dense, the token policy, and the same with nothing done for a skipped unit (the bound), in turns in fresh processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from common import Times, held_out, in_fresh_processes, print_json, report, timed

from dash_export import DashRuntime
from dash_export.backends.host.decode import BoundStep
from dash_export.core.kinds import Setting
from dash_export.core.rule import DENSE, Rule, static_rule
from dash_export.core.units import unit_skips
from dash_export.measure.intervals import interval

TOKENS = 24
VARIANTS = ("dense", "its actions", "its actions, without bypasses")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--skipped", default=5.0, show_default=True, help="Layers skipped per token, on average.")
@click.option("--context", default=256, show_default=True, help="Cached tokens before the first one.")
@click.option("--rounds", default=12, show_default=True, help="Interleaved passes over the tokens, per process.")
@click.option("--processes", default=12, show_default=True, help="Fresh ones that load the engines.")
def main(bundle: Path, target: str, skipped: float, context: int, rounds: int, processes: int) -> None:
    """Time a window of held-out text each way."""
    times = in_fresh_processes(timed_once, bundle, target, skipped, context, rounds, processes=processes)
    rows = report(f"{bundle.name}, {target}, {skipped:g} layers skipped", f"{TOKENS} tokens", times)
    dense, skipping, bound = (np.array(times[name]) for name in VARIANTS)
    share = interval(skipping - bound, dense - bound)
    print(
        f"Bypasses take {share.value:.0%} ({share.low:.0%} to {share.high:.0%}) of what their units would have taken."
    )
    print_json("bypass", {"target": target, "skipped": skipped, "share": asdict(share), "rows": rows})


def timed_once(bundle: Path, target: str, skipped: float, context: int, rounds: int, _number: int) -> Times:
    runtime = DashRuntime.load(bundle, target, verify=False)
    ids = held_out(runtime.text.encode, context + TOKENS)
    session = runtime.session_with(Setting("token", skipped=skipped))
    session.prefill(ids[:context])
    actions = np.array([session.decode_one(int(token))[1] for token in ids[context:]])

    def passes(rules: list[Rule], bypasses: bool = True) -> Callable[[], object]:
        cache: Any = runtime.engines.cache(context)
        cache.reserve(context + TOKENS)
        runtime.engines.step(cache, context).prefill(ids[:context])
        step = runtime.engines.step(cache, 1)
        assert isinstance(step, BoundStep)
        if not bypasses:  # update, K and V and all
            step.segments = [replace(item, bypass=item.bypass and (lambda: None)) for item in step.segments]

        def run() -> None:
            cache.length = context
            for token, each in zip(ids[context:].tolist(), rules, strict=True):
                step.decode(token, each)

        return run

    mean = float(actions.sum(axis=1).mean())
    print(f"These tokens skip {mean:.2f} layers each (on the calibration text, {skipped:g}).")
    skips = unit_skips(actions, runtime.engines.units)
    forced: list[Rule] = [static_rule(np.flatnonzero(each).tolist()) for each in skips.T]
    runs = (passes([DENSE] * TOKENS), passes(forced), passes(forced, bypasses=False))
    return timed(dict(zip(VARIANTS, runs, strict=True)), rounds, block=2, settle=1)


if __name__ == "__main__":
    main()
