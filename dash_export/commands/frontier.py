"""`dash-export frontier`: what policy kinds and other builds pay for the time they save, as a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export import __version__
from dash_export.cli import OUTPUT, printable
from dash_export.commands.common import plain_table, print_table, result_console
from dash_export.commands.comparison import Comparison, comparison_options, counted, window_options, with_bounds
from dash_export.commands.progress import progress_bar
from dash_export.commands.reports import check_pictures, save_pictures, sole_writer
from dash_export.evaluate import ROUNDS, TOKENS
from dash_export.names import REPORT

if TYPE_CHECKING:
    from dash_export.evaluate.frontier import Plan, Point


@click.command("frontier")
@comparison_options(budgets=(0.95, 0.9, 0.85, 0.8))
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on; by default the calibration text.")
@window_options
@click.option("--predicted", is_flag=True, help="Decode times from the build's cost table, not from the clock.")
@counted("--rounds", ROUNDS, "Processes that decode under each setting, in turns.")
@counted("--tokens", TOKENS, "Timed tokens of a process.", least=8)
@click.option(
    "-o", "--output", default="frontier", show_default=True, metavar="NAME", type=click.Path(path_type=Path),
    help="Writes NAME.png, NAME.svg and NAME.json.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, /, comparison: Comparison, text: Path | None, predicted: bool, rounds: int, output: Path,
    **measure: Any,
) -> None:  # fmt: skip
    """Draw what a built BUNDLE gives up under each policy kind for the time it saves, and what other builds do.

    Every kind is measured at budgets of 0.95 to 0.8 unless told otherwise: divergence and perplexity over a text,
    window by window against dense; decode time on the clock, each in processes of its own. The exchange rate is the
    per cent of perplexity paid per per cent of decode time saved. Let nothing else run meanwhile.
    """
    from dash_export.evaluate.frontier import Plan, frontier
    from dash_export.evaluate.pictures import frontier_figure  # fails at once where matplotlib is missing
    from dash_export.resources import resource_folder
    from dash_export.text_files import read_text

    path = text or resource_folder("calibration") / "prose.txt"
    plan = Plan(read_text(path), printable(path.name), rounds=0 if predicted else rounds, **measure)
    with sole_writer("frontier", output):
        check_pictures(output, report=True)
        ctx.meta[OUTPUT] = str(output)
        with progress_bar("frontier") as progress:
            progress("loading", 0, 0)
            loaded = comparison.load()
            points = frontier(loaded.candidates(), plan, progress)
        runtime = loaded.runtime
        title = f"{runtime.bundle.manifest.model.name}, {runtime.build.target}, {runtime.build.device}"
        builds = {name: _build(build) for name, build in [("", runtime), *loaded.others]}
        # What took minutes to measure is lost neither where nothing can be written nor where nobody reads.
        try:
            _print(title, points)
            loaded.print_refused()
        finally:
            report = _report(plan, points, builds, loaded.refused)
            written = save_pictures(
                output,
                frontier_figure(points, title, _caption(plan)),
                json.dumps(report, indent=1, ensure_ascii=False),
            )
        click.echo(f"Written to {', '.join(map(str, written))}")


def _caption(plan: Plan) -> str:
    from dash_export.evaluate.intervals import FEWEST

    clock = "predicted from the build's cost table"
    if plan.rounds:
        clock = f"{plan.rounds} processes of {plan.tokens} decoded tokens each"
    few = f" (of times from {FEWEST} processes on)" if 0 < plan.rounds < FEWEST else ""
    return (
        f"quality: {plan.name}, up to {plan.limit} windows of {plan.window} tokens, the first {plan.prefix} "
        f"dense; time: {clock}; bars: 95 % bootstrap intervals{few}"
    )


def _build(runtime: Any) -> dict[str, object]:
    manifest = runtime.bundle.manifest
    return {
        "bundle": runtime.bundle.root.name,
        "model": manifest.model.name,
        "target": runtime.build.target,
        "device": runtime.build.device,
        "policy": asdict(manifest.policy),
    }


def _report(plan: Plan, points: Sequence[Point], builds: dict[str, Any], refused: Sequence[Any]) -> dict[str, object]:
    from dash_export.evaluate.candidates import record
    from dash_export.evaluate.frontier import of_token

    rows = [
        record(point)
        | {
            "time": point.time,
            "exchange_rate": None if point.exchange_rate is None else asdict(point.exchange_rate),
            "kl_of_token_there": share,
        }
        for point, share in zip(points, of_token(points), strict=True)
    ]
    return {
        "made_by": REPORT,
        "builds": builds,
        "course": {name: value for name, value in asdict(plan).items() if name != "text"},
        "points": rows,
        "refused": [record(item) for item in refused],
        "version": __version__,
    }


def _print(title: str, points: Sequence[Point]) -> None:
    from dash_export.evaluate.candidates import amount
    from dash_export.evaluate.frontier import of_token
    from dash_export.evaluate.intervals import Interval

    numbers = ("skipped", "time", "predicted", "KL (nats)", "perplexity", "rate", "token's KL")
    table = plain_table(title, "kind", "asked for", *numbers, right=numbers)
    dense = points[0].quality.layers
    for point, share in zip(points, of_token(points), strict=True):
        quality, timing, rate = point.quality, point.timing, point.exchange_rate
        ratio = quality.perplexity_ratio
        more = Interval(*(100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high)))
        table.add_row(
            point.name,
            amount(quality.setting),
            f"{dense - quality.layers:.2f}",
            "" if timing is None else with_bounds(Interval(timing.ratio, timing.low, timing.high), 3),
            f"{quality.time:.3f}",
            with_bounds(quality.kl, 3),
            f"{quality.perplexity.value:.2f}" if point is points[0] else f"{with_bounds(more, 1)} %",
            "" if rate is None else with_bounds(rate, 2),
            "" if share is None else f"{share:.2f}x",
        )
    print_table(result_console(160), table)
    click.echo(
        "time: of dense; predicted: of the build's own dense, from its cost table. perplexity: of dense, then what is "
        "more than that. rate: per cent of perplexity paid per per cent of time saved. token's KL: at equal time, "
        "of this one's. In brackets: 95 % intervals."
    )
