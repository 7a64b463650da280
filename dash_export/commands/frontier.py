"""`dash-export frontier`: divergence and perplexity against decode time, for all policy kinds, as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.bundle import Bundle
from dash_export.cli import OUTPUT
from dash_export.commands.common import choose_target, plain_table, print_table, result_console
from dash_export.commands.comparing import bundle_names, comparison_options, dial_of, print_refused, settings_for
from dash_export.commands.progress import progress_bar
from dash_export.names import REPORT

if TYPE_CHECKING:
    from dash_export.evaluation.comparison import Comparison
    from dash_export.evaluation.frontier import Course, Point, Racer
    from dash_export.evaluation.settings import Refusal

SKIPPED = (2.0, 4.0, 6.0, 8.0)


@click.command("frontier")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@comparison_options
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on; by default the calibration text.")
@click.option("--limit", type=click.IntRange(min=1), default=32, show_default=True, help="Windows of it.")
@click.option("--window", type=click.IntRange(min=4), default=256, show_default=True, help="Tokens of a window.")
@click.option("--prefix", type=click.IntRange(min=2), default=64, show_default=True, help="How many of them are dense.")
@click.option("--predicted", is_flag=True, help="Decode times from the build's cost table, not from the clock.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Timed blocks per setting, interleaved."
)
@click.option("--tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Decoded tokens of a block.")
@click.option(
    "-o", "--output", default="frontier", show_default=True, metavar="NAME", type=click.Path(path_type=Path),
    help="Writes NAME.png, NAME.svg and NAME.json.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, /, bundles: tuple[Path, ...], target: str | None, kinds: tuple[str, ...] | None, seed: int,
    text: Path | None, limit: int, window: int, prefix: int, predicted: bool, rounds: int, tokens: int, output: Path,
    **dials: Any,
) -> None:  # fmt: skip
    """Draw what each policy kind gives up for the time it saves.

    Every kind is measured at 2, 4, 6 and 8 skipped layers unless told otherwise: divergence and perplexity over a
    text, decode time on the clock, in turns with dense. Further BUNDLEs of the same model, like the static policy with
    its own tuned compensation, become further curves. Let nothing else run meanwhile.
    """
    from dash_export.commands.pictures import check_pictures, save_pictures
    from dash_export.evaluation.comparison import compare
    from dash_export.evaluation.frontier import Course, Racer, check_same_model
    from dash_export.evaluation.pictures import frontier_figure  # fails at once where matplotlib is missing
    from dash_export.resources import resource_folder
    from dash_export.text_files import read_text

    dial = dial_of(dials, ("skipped", SKIPPED))
    path = text or resource_folder("calibration") / "prose.txt"
    course = Course(read_text(path), str(path), limit, window, prefix, 0 if predicted else rounds, tokens)
    check_pictures(output, report=True)
    ctx.meta[OUTPUT] = str(output)
    points: list[Point] = []
    refused: list[Refusal] = []
    with progress_bar("frontier") as progress:
        progress("loading", 0, 0)
        opened = [Bundle.open(bundle) for bundle in bundles]
        racers = [
            Racer(name, bundle, choose_target(bundle, target), kinds)
            for name, bundle in zip(bundle_names(opened), opened, strict=True)
        ]
        check_same_model(racers)
        texts = [racer.texts(course) for racer in racers]
        plans = [settings_for(racer.deciding, kinds, dial, seed) for racer in racers]
        for racer, own_texts, (settings, missing) in zip(racers, texts, plans, strict=True):
            points += racer.points(settings, course, own_texts, progress)
            refused += missing
    facts = racers[0].plain
    title = f"{facts.bundle.manifest.model.name}, {facts.build.target}, {facts.build.device}"
    own, others = compare(points)
    report = _report(racers, course, points, refused)
    report["token_against"] = {"bundle": own[0].bundle if own else None, "curves": [asdict(each) for each in others]}
    picture = frontier_figure(points, title, _caption(course, path.name))
    # What took minutes to measure is lost neither where nothing can be written nor where nobody reads.
    try:
        _print(title, points, len(racers) > 1)
        _print_comparison(own, others, points[0].quality.layers, len(racers) > 1)
        print_refused(refused)
    finally:
        written = save_pictures(output, picture, json.dumps(report, indent=1, ensure_ascii=False))
    click.echo(f"Written to {', '.join(map(str, written))}")


def _caption(course: Course, text: str) -> str:
    from dash_export.evaluation.timing import FEWEST_GROUPS

    clock = (
        f"time: {course.rounds} interleaved blocks of {course.tokens} decoded tokens"
        if course.rounds
        else "time: predicted from the build's cost table, without the policy network's own"
    )
    few = f" (of times from {FEWEST_GROUPS} blocks on)" if 0 < course.rounds < FEWEST_GROUPS else ""
    return (
        f"quality: {text}, up to {course.limit} windows of {course.window} tokens, the first {course.prefix} dense; "
        f"{clock}; bars: 95 % bootstrap intervals{few}"
    )


def _report(
    racers: Sequence[Racer], course: Course, points: Sequence[Point], refused: Sequence[Refusal]
) -> dict[str, object]:
    from dash_export import __version__
    from dash_export.evaluation.settings import record

    bundles = {
        racer.name: {
            "model": racer.plain.bundle.manifest.model.name,
            "target": racer.plain.build.target,
            "device": racer.plain.build.device,
            "policy": asdict(racer.plain.bundle.manifest.policy),
        }
        for racer in racers
    }
    return {
        "made_by": REPORT,
        "bundles": bundles,
        "course": {name: value for name, value in asdict(course).items() if name != "text"},
        "points": [record(point) | {"time": point.time} for point in points],
        "refused": [record(item) for item in refused],
        "version": __version__,
    }


def _print(title: str, points: Sequence[Point], several: bool) -> None:
    from dash_export.commands.eval_tables import with_bounds
    from dash_export.evaluation.settings import asked

    numbers = ("layers", "time", "predicted", "KL (nats)", "perplexity", "of dense")
    first = ("bundle", "kind", "asked for") if several else ("kind", "asked for")
    table = plain_table(title, *first, *numbers, right=numbers)
    for point in points:
        quality, setting = point.quality, point.quality.setting
        names = (point.bundle, setting.kind, asked(setting)) if several else (setting.kind, asked(setting))
        table.add_row(
            *names,
            f"{quality.layers:.2f}",
            "" if point.timing is None else f"{point.timing.ratio:.3f}",
            f"{quality.time:.3f}",
            with_bounds(quality.kl, 3),
            f"{quality.perplexity.value:.2f}",
            f"{quality.perplexity_ratio.value:.3f}",
        )
    print_table(result_console(), table)


def _print_comparison(own: Sequence[Point], others: Sequence[Comparison], dense: float, several: bool) -> None:
    """The token policy's KL, of every other curve's. `dense`: the layers of a token that skips nothing."""
    if not others:
        return
    heads = [f"{dense - point.quality.layers:.1f} skipped" for point in own]
    base = f"token ({own[0].bundle})" if several else "token"
    table = plain_table(
        f"KL of {base}, of that of ... at as many layers; at as much of dense time",
        *(("bundle",) if several else ()), "kind", *heads, right=heads,
    )  # fmt: skip
    for other in others:
        pairs = zip(other.layers, other.time, strict=True)
        names = (other.bundle, other.kind) if several else (other.kind,)
        table.add_row(*names, *("; ".join("-" if each is None else f"{each:.2f}" for each in pair) for pair in pairs))
    print_table(result_console(), table)
