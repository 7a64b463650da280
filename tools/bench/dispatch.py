"""Dispatch tax: a unit, and what always runs between two, as an engine each, under the token policy forced dense by
trade-off 0, against one whole-model graph.

    python tools/bench/dispatch.py BUNDLE --target cpu

Where weights happen to lie in memory is worth a per cent or two. So several fresh processes load both once, the one or
the other first, and the mean of the ratios is given with its standard error.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean, median, stdev

import click
from common import in_fresh_processes, interleaved, load_both, one_token, paired_ratio, print_json, whole_build
from rich.console import Console
from rich.table import Table

from dash_export.bundle import Bundle
from dash_export.decision import decision_rule
from dash_export.manifest import Build

WHOLE, ENGINES, ASKED = "one whole graph", "engines, nobody asked", "engines, token policy at trade-off 0"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--rounds", default=20, show_default=True, help="Interleaved blocks of eight tokens per process.")
@click.option(
    "--processes", type=click.IntRange(min=2), default=16, show_default=True, help="Fresh ones that load and time both."
)
def main(bundle: Path, target: str, context: int, rounds: int, processes: int) -> None:
    """Time one decoded token each way, interleaved."""
    opened = Bundle.open(bundle)
    samples: dict[str, list[list[float]]] = {}
    launches = 0
    with whole_build(opened, target) as whole:
        found = in_fresh_processes(timed_once, bundle, target, whole, context, rounds, processes=processes)
        for number, (timed, launches) in enumerate(found):  # noqa: B007
            for name, times in timed.items():
                samples.setdefault(name, []).append(times)
            shown = ", ".join(f"{name} {1e3 * median(times[-1]):.3f} ms" for name, times in samples.items())
            print(f"process {number + 1} of {processes}: {shown}")
    units = len(opened.manifest.policy.units)
    title = f"{bundle.name}, {target}, {context} cached tokens, {units} units, {launches} launches a token"
    table = Table("variant", "ms/token", "ratio to whole graph", title=title)
    result: dict[str, object] = {"target": target, "context": context, "units": units, "launches": launches}
    for name, own in samples.items():
        milliseconds = 1e3 * median(x for sample in own for x in sample)
        ratios = [paired_ratio(sample, graph) for sample, graph in zip(own, samples[WHOLE], strict=True)]
        ratio, error = mean(ratios), stdev(ratios) / len(ratios) ** 0.5
        table.add_row(name, f"{milliseconds:.3f}", f"{ratio:.3f} ± {error:.3f}")
        result[name] = {"ms": round(milliseconds, 4), "ratio": round(ratio, 4), "standard_error": round(error, 4)}
    Console().print(table)
    print_json("dispatch", result | {"processes": processes})


def timed_once(
    bundle: Path, target: str, whole: tuple[Path, Build], context: int, rounds: int, number: int
) -> tuple[dict[str, list[float]], int]:
    """(seconds per token, medians of blocks, of every variant; launches of a token)."""
    engines, graph = load_both(bundle, target, whole, number)
    forced_dense = decision_rule(engines.units, engines.build.cost.cost, 0.0)
    steps = {
        WHOLE: one_token(graph, context),
        ENGINES: one_token(engines, context),
        ASKED: one_token(engines, context, forced_dense),
    }
    times = interleaved(list(steps.values()), rounds)
    return dict(zip(steps, times, strict=True)), len(engines.segments)


if __name__ == "__main__":
    main()
