"""Dispatch tax: per-layer engines with the policy evaluated at every gated layer, forced dense by trade-off 0, against one whole-model graph.

    python tools/bench/dispatch.py BUNDLE --target cpu
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
from common import interleaved, paired_ratio, print_json, whole_model
from rich.console import Console
from rich.table import Table

from dash_export.decision import decision_rule
from dash_export.runtime import DashRuntime
from dash_export.runtime.backends import load_backend
from dash_export.runtime.cache import KVCache
from dash_export.runtime.dispatch import BoundStep, EngineSet
from dash_export.runtime.rules import DENSE, Rule


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--rounds", default=200, show_default=True, help="Timed tokens per variant.")
def main(bundle: Path, target: str, context: int, rounds: int) -> None:
    """Time one decoded token each way, interleaved in one process."""
    runtime = DashRuntime.load(bundle, target)
    backend = load_backend(runtime.recipe.backend, 0)
    model = runtime.engines.model
    policy = runtime.bundle.manifest.policy
    dense_token = decision_rule(model.num_layers, policy.gated, runtime.cost.cost, 0.0)
    sets: dict[str, tuple[EngineSet, Rule]] = {"one whole graph": (whole_model(runtime.bundle, target, backend), DENSE)}
    sets["per-layer engines, no policy"] = (EngineSet(runtime.bundle, runtime.build, backend, "plain"), DENSE)
    if policy.has_network:
        sets["per-layer engines, fused policy, trade-off 0"] = (runtime.engines, dense_token)
        sets["per-layer engines, sync policy, trade-off 0"] = (EngineSet(runtime.bundle, runtime.build, backend, "sync"), dense_token)
    steps = []
    for engines, rule in sets.values():
        cache = KVCache(model, context)
        cache.reserve(context + 1)
        step = BoundStep(engines, cache, 1)

        def token(step: BoundStep = step, cache: KVCache = cache, rule: Rule = rule) -> None:
            cache.length = context
            step.decode(1, rule)

        steps.append(token)
    times = interleaved(steps, rounds)
    table = Table("variant", "engines", "ms/token", "ratio to whole graph", title=f"{bundle.name}, {target}, {context} cached tokens, {len(policy.gated)} gated layers")
    result: dict[str, object] = {"target": target, "context": context, "gated": len(policy.gated)}
    for (name, (engines, _)), sample in zip(sets.items(), times, strict=True):
        ratio = paired_ratio(sample, times[0])
        table.add_row(name, str(len(engines.segments)), f"{1e3 * median(sample):.3f}", f"{ratio:.3f}")
        result[name] = {"ms": round(1e3 * median(sample), 4), "ratio": round(ratio, 4)}
    Console().print(table)
    print_json("dispatch", result)


if __name__ == "__main__":
    main()
