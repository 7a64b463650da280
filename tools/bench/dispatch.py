"""Dispatch tax: a unit, and what always runs between two, as an engine each, under the token policy forced dense by
trade-off 0, against one whole-model graph.

    python tools/bench/dispatch.py BUNDLE --target cpu
"""

from __future__ import annotations

from pathlib import Path

import click
from common import Times, in_fresh_processes, load_both, one_token, print_json, report, timed, whole_build

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.records import Build
from dash_export.core.rule import decision_rule


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--context", default=256, show_default=True, help="Cached tokens.")
@click.option("--rounds", default=20, show_default=True, help="Interleaved blocks of eight tokens per process.")
@click.option("--processes", default=16, show_default=True, help="Fresh ones that load and time both.")
def main(bundle: Path, target: str, context: int, rounds: int, processes: int) -> None:
    """Time one decoded token each way, interleaved."""
    opened = Bundle.open(bundle)
    with whole_build(opened, target) as whole:
        times = in_fresh_processes(timed_once, bundle, target, whole, context, rounds, processes=processes)
    units, launches = len(opened.manifest.policy.units), len(opened.load_build(target).segments)
    title = f"{bundle.name}, {target}, {context} cached tokens, {units} units, {launches} launches a token"
    rows = report(title, "token", times)
    facts = {"target": target, "context": context, "units": units, "launches": launches, "processes": processes}
    print_json("dispatch", facts | rows)


def timed_once(bundle: Path, target: str, whole: tuple[Path, Build], context: int, rounds: int, number: int) -> Times:
    engines, graph = load_both(bundle, target, whole, number)
    forced_dense = decision_rule(engines.units, engines.build.cost.cost, 0.0)
    variants = {
        "one whole graph": one_token(graph, context),
        "engines, nobody asked": one_token(engines, context),
        "engines, token policy at trade-off 0": one_token(engines, context, forced_dense),
    }
    return timed(variants, rounds)


if __name__ == "__main__":
    main()
