"""Dispatch tax: engines with the policy evaluated for every gated layer, forced dense by trade-off 0, against one
whole-model graph. What stretches of layers are worth, too: the engines without them launch every gated layer alone.

    python tools/bench/dispatch.py BUNDLE --target cpu

Where weights happen to lie in memory is worth a per cent or two. So several fresh processes load every variant once, in
an order of their own, and the mean of the ratios is given with its standard error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean, median, stdev

import click
from common import (
    in_fresh_processes,
    interleaved,
    load_engines,
    one_token,
    paired_ratio,
    print_json,
    whole_build,
)
from rich.console import Console
from rich.table import Table

from dash_export.build_record import Build
from dash_export.bundle import Bundle
from dash_export.decision import decision_rule
from dash_export.runtime.engine_set import EngineSet
from dash_export.runtime.rules import DENSE, Rule


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--rounds", default=20, show_default=True, help="Interleaved blocks of eight tokens per process.")
@click.option(
    "--processes",
    type=click.IntRange(min=2),
    default=16,
    show_default=True,
    help="Fresh ones that load and time every variant.",
)
def main(bundle: Path, target: str, context: int, rounds: int, processes: int) -> None:
    """Time one decoded token each way, interleaved."""
    opened = Bundle.open(bundle)
    policy = opened.manifest.policy
    samples: dict[str, list[list[float]]] = {}
    counts: dict[str, int] = {}
    with whole_build(opened, target) as whole:
        found = in_fresh_processes(timed_once, bundle, target, whole, context, rounds, processes=processes)
        for number, (timed, counts) in enumerate(found):  # noqa: B007
            for name, times in timed.items():
                samples.setdefault(name, []).append(times)
            shown = ", ".join(f"{name} {1e3 * median(times[-1]):.3f} ms" for name, times in samples.items())
            print(f"process {number + 1} of {processes}: {shown}")
    table = Table(
        "variant",
        "launches",
        "ms/token",
        "ratio to whole graph",
        title=f"{bundle.name}, {target}, {context} cached tokens, {len(policy.gated)} gated layers",
    )
    result: dict[str, object] = {
        "target": target,
        "context": context,
        "gated": len(policy.gated),
        "processes": processes,
    }
    base = samples["one whole graph"]
    for name, own in samples.items():
        milliseconds = 1e3 * median(x for sample in own for x in sample)
        ratios = [paired_ratio(sample, graph) for sample, graph in zip(own, base, strict=True)]
        ratio, error = mean(ratios), stdev(ratios) / len(ratios) ** 0.5
        table.add_row(name, str(counts[name]), f"{milliseconds:.3f}", f"{ratio:.3f} ± {error:.3f}")
        result[name] = {"ms": round(milliseconds, 4), "ratio": round(ratio, 4), "standard_error": round(error, 4)}
    Console().print(table)
    print_json("dispatch", result)


def timed_once(
    bundle: Path, target: str, whole: tuple[Path, Build], context: int, rounds: int, number: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """(seconds per token, medians of blocks; launches) of every variant, loaded and timed in an order of `number`'s."""
    opened = Bundle.open(bundle)
    build = opened.load_build(target)
    model, policy = opened.manifest.model, opened.manifest.policy
    forced_dense = decision_rule(model.num_layers, policy.gated, build.cost.cost, 0.0)  # no stretch is weighed at 0
    graph = (Bundle(whole[0], opened.manifest), whole[1])
    variants: dict[str, tuple[Bundle, Build, str, Rule]] = {
        "one whole graph": (*graph, "plain", DENSE),
        "engines, no policy": (opened, build, "plain", DENSE),
    }
    for dispatch in ("fused", "sync") if policy.has_network else ():
        variants[f"engines, {dispatch} policy, trade-off 0"] = (opened, build, dispatch, forced_dense)
    if build.stretches and policy.has_network:
        alone = replace(build, stretches=())
        variants["the same, fused, every layer alone"] = (opened, alone, "fused", forced_dense)
    random = Random(number)
    names = random.sample(list(variants), len(variants))
    loaded = {name: load_engines(*variants[name][:3]) for name in names}
    order = random.sample(names, len(names))
    steps = [one_token(loaded[name], context, variants[name][3]) for name in order]
    times = dict(zip(order, interleaved(steps, rounds), strict=True))
    return {name: times[name] for name in variants}, {name: dense_launches(loaded[name]) for name in names}


def dense_launches(engines: EngineSet) -> int:
    """Of a token that skips nothing, policies that are engines of their own included."""
    step = engines.step(engines.cache(1), 1)
    policies = sum(len(item.policies) for item in engines.segments)
    return len(step.dense_launches()) + policies


if __name__ == "__main__":
    main()
