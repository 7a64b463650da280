"""Dispatch tax: per-layer engines with the policy evaluated at every gated layer, forced dense by trade-off 0, against
one whole-model graph.

    python tools/bench/dispatch.py BUNDLE --target cpu

Where a process's weights happen to lie in memory is worth several per cent, the first ones loaded being the slowest. So
every variant is loaded several times, in rotated order, and the mean of the ratios is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import click
from common import interleaved, paired_ratio, print_json, whole_model
from rich.console import Console
from rich.table import Table

from dash_export.bundle import Bundle
from dash_export.decision import decision_rule
from dash_export.runtime.backends.onnxruntime import create as backend
from dash_export.runtime.dispatch import EngineSet
from dash_export.runtime.huge_pages import on_huge_pages
from dash_export.runtime.rules import DENSE, Rule


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--rounds", default=20, show_default=True, help="Interleaved blocks of eight tokens per copy.")
@click.option("--copies", default=4, show_default=True, help="How often each variant is loaded.")
def main(bundle: Path, target: str, context: int, rounds: int, copies: int) -> None:
    """Time one decoded token each way, interleaved in one process."""
    opened = Bundle.open(bundle)
    build = opened.load_build(target)
    model, policy = opened.manifest.model, opened.manifest.policy
    forced_dense = decision_rule(model.num_layers, policy.gated, build.cost.cost, 0.0)

    def engines(dispatch: str) -> Callable[[], EngineSet]:
        def load() -> EngineSet:
            with on_huge_pages():
                return EngineSet(opened, build, backend(0), dispatch)

        return load

    variants: dict[str, tuple[Callable[[], EngineSet], Rule]] = {
        "one whole graph": (lambda: whole_model(opened, target, backend(0)), DENSE),
        "per-layer engines, no policy": (engines("plain"), DENSE),
    }
    if policy.has_network:
        variants["per-layer engines, fused policy, trade-off 0"] = (engines("fused"), forced_dense)
        variants["per-layer engines, sync policy, trade-off 0"] = (engines("sync"), forced_dense)
    samples: dict[str, list[list[float]]] = {name: [] for name in variants}
    counts: dict[str, int] = {}
    order = list(variants)
    for copy in range(copies):
        steps = []
        for name in order:
            loaded, rule = variants[name][0](), variants[name][1]
            counts[name] = len(loaded.segments)
            steps.append(_token(loaded, rule, context))
        for name, times in zip(order, interleaved(steps, rounds), strict=True):
            samples[name].append(times)
        order = order[1:] + order[:1]
        print(
            f"copy {copy + 1} of {copies}: "
            + ", ".join(f"{name} {1e3 * median(samples[name][-1]):.3f} ms" for name in variants)
        )
    table = Table(
        "variant",
        "engines",
        "ms/token",
        "ratio to whole graph",
        title=f"{bundle.name}, {target}, {context} cached tokens, {len(policy.gated)} gated layers",
    )
    result: dict[str, object] = {"target": target, "context": context, "gated": len(policy.gated), "copies": copies}
    whole = samples["one whole graph"]
    for name, copied in samples.items():
        milliseconds = 1e3 * median(x for sample in copied for x in sample)
        ratio = mean(paired_ratio(sample, base) for sample, base in zip(copied, whole, strict=True))
        table.add_row(name, str(counts[name]), f"{milliseconds:.3f}", f"{ratio:.3f}")
        result[name] = {"ms": round(milliseconds, 4), "ratio": round(ratio, 4)}
    Console().print(table)
    print_json("dispatch", result)


def _token(engines: EngineSet, rule: Rule, context: int) -> Callable[[], object]:
    """Decode one token at a fixed context, again and again."""
    cache = engines.cache(context)
    cache.reserve(context + 1)
    step = engines.step(cache, 1)

    def token() -> None:
        cache.length = context
        step.decode(1, rule)

    return token


if __name__ == "__main__":
    main()
