"""What skipping costs: policy, compensation and K/V writes, against what the skipped layers would have taken.

    python tools/bench/owed.py BUNDLE --skipped 5

Four variants decode the same tokens, interleaved in one process: dense; the token policy; its very actions forced on
engines without a policy; and those with nothing done for a skipped layer, whose tokens are worthless and whose time is
the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from common import interleaved, print_json
from rich.console import Console
from rich.table import Table

from dash_export import DashRuntime
from dash_export.decision import Setting
from dash_export.resources import resource_folder
from dash_export.runtime.dispatch import BoundStep
from dash_export.runtime.rules import DENSE, ForcedRule, Rule

TOKENS = 24


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--skipped", default=5.0, show_default=True, help="Layers skipped per token, on average.")
@click.option("--context", default=256, show_default=True, help="Cached tokens before the first one.")
@click.option("--rounds", default=30, show_default=True, help="Interleaved passes over the tokens.")
def main(bundle: Path, target: str, skipped: float, context: int, rounds: int) -> None:
    """Time a window of held-out text each way."""
    fused = DashRuntime.load(bundle, target)
    plain = DashRuntime.load(bundle, target, dispatch="plain", verify=False)
    text = (resource_folder("calibration") / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(fused.text.encode(text)[: context + TOKENS], np.int64)
    session = fused.session_with(Setting("token", skipped=skipped))
    session.prefill(ids[:context])
    actions = np.array([session.decode_one(int(token))[1] for token in ids[context:]])
    rule = session.rule

    def passes(runtime: DashRuntime, rules: list[Rule], nothing_owed: bool = False) -> Callable[[], object]:
        cache: Any = runtime.engines.cache(context)
        cache.reserve(context + TOKENS)
        runtime.engines.step(cache, context).prefill(ids[:context])
        step = runtime.engines.step(cache, 1)
        assert isinstance(step, BoundStep)
        if nothing_owed:
            step.segments = [
                replace(segment, skip=_nothing) if segment.skip is not None else segment for segment in step.segments
            ]

        def run() -> None:
            cache.length = context
            for token, each in zip(ids[context:].tolist(), rules, strict=True):
                step.decode(token, each)

        return run

    forced: list[Rule] = [ForcedRule(each[None]) for each in actions]
    variants = {
        "dense": passes(plain, [DENSE] * TOKENS),
        "token policy": passes(fused, [rule] * TOKENS),
        "its actions, no policy": passes(plain, forced),
        "its actions, nothing owed": passes(plain, forced, nothing_owed=True),
    }
    times = dict(zip(variants, interleaved(list(variants.values()), rounds, block=2, settle=1), strict=True))
    dense = times["dense"]
    saved = {
        name: median(1e6 * (base - mine) / TOKENS for base, mine in zip(dense, times[name], strict=True))
        for name in variants
    }
    bound = saved["its actions, nothing owed"]
    table = Table("variant", "ms/token", "saved us", "of the bound", title=f"{bundle.name}, {target}")
    for name in variants:
        milliseconds = 1e3 * median(times[name]) / TOKENS
        table.add_row(name, f"{milliseconds:.3f}", f"{saved[name]:.0f}", f"{saved[name] / bound:.0%}")
    Console().print(table)
    owed = bound - saved["its actions, no policy"]
    policy = saved["its actions, no policy"] - saved["token policy"]
    mean = float(actions.sum(axis=1).mean())
    each, asked = f"{owed / mean:.0f} us a layer", f"{policy:.0f} us a token"
    print(
        f"{mean:.2f} layers skipped per token. Of the time that they would have taken, compensation and K/V take "
        f"{owed / bound:.0%} ({each}) and the policy {policy / bound:.0%} ({asked})."
    )
    result = {"skipped": mean, "bound_us": bound, "owed_us": owed, "policy_us": policy}
    print_json("owed", {"target": target, **{key: round(value, 3) for key, value in result.items()}})


def _nothing() -> None:
    pass


if __name__ == "__main__":
    main()
