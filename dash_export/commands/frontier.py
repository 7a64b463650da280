"""`dash-export frontier`: what policy kinds and other builds pay for the time they save, as a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export import __version__
from dash_export.bundle.layout import REPORT
from dash_export.cli import printable
from dash_export.commands.options import (
    Load,
    comparison_options,
    count_option,
    print_refused,
    window_options,
    with_bounds,
)
from dash_export.commands.progress import progress_bar
from dash_export.commands.reports import picture_files, save_pictures, save_report, sole_writer
from dash_export.commands.tables import print_images, print_table
from dash_export.measure import ROUNDS, TOKENS

if TYPE_CHECKING:
    from dash_export.measure.candidates import Candidate
    from dash_export.measure.exchange import Point


@click.command("frontier")
@comparison_options(budgets=(0.95, 0.9, 0.85, 0.8))
@click.option(
    "--text", type=click.Path(path_type=Path),
    help="Text to measure on, or chat prompts (.jsonl) that the dense mode answers; by default the model's held-out "
    "answers that came with the policy, or else the calibration text.",
)  # fmt: skip
@click.option(
    "--images", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
    help="Of an image encoder: pictures to measure on, --limit of them; a folder for each class gives agreement.",
)  # fmt: skip
@window_options
@count_option(
    "--rounds", ROUNDS, "Processes that decode under each setting, in turns; 0: the cost table's times.", least=0
)
@count_option("--tokens", TOKENS, "Tokens of a process, without those that settle; three of four are timed.", least=8)
@click.option(
    "-o", "--output", default="frontier", show_default=True, metavar="NAME", type=click.Path(path_type=Path),
    help="Writes NAME.png, NAME.svg and NAME.json.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    /,
    load: Load,
    text: Path | None,
    images: Path | None,
    output: Path,
    rounds: int,
    tokens: int,
    **cut: int,
) -> None:
    """Draw what a built BUNDLE gives up under each policy kind for the time it saves, and what other builds do.

    Every kind is measured at budgets of 0.95 to 0.8 unless told otherwise: divergence and perplexity over a text,
    window by window against dense; decode time on the clock, each in processes of its own, in turns with dense. The
    exchange rate is the per cent of perplexity paid per per cent of decode time saved. Let nothing else run meanwhile.
    """
    from dash_export.measure.exchange import frontier, token_kl_share
    from dash_export.measure.pictures import frontier_figure  # fails at once where matplotlib is missing
    from dash_export.measure.texts import judged_text

    if images is not None:
        _of_images(ctx, load, images, output, cut["limit"])
        return
    files = picture_files(output)
    with sole_writer(ctx, *files):
        with progress_bar("frontier") as progress:
            progress("loading", 0, 0)
            candidates, refused = load()
            judged = judged_text(candidates[0].runtime, text, **cut, progress=progress)
            points = frontier(candidates, judged, rounds, tokens, progress)
        runtime = candidates[0].runtime
        shares = token_kl_share(points)
        title = f"{runtime.bundle.manifest.model.name}, {runtime.build.target}, {runtime.build.device}"
        # Measuring took minutes: save the report even if printing fails, and print before saving can fail.
        try:
            _print(title, points, shares)
            print_refused(refused)
        finally:
            of_text = {"name": printable(judged.name), "items": len(judged.items)}
            course = of_text | cut | {"rounds": rounds, "tokens": tokens}
            report = _report(course, points, shares, candidates) | {"refused": refused}
            # Save the JSON first: unlike the pictures, it cannot be made again.
            written = [save_report(files[-1], json.dumps(report, indent=1, ensure_ascii=False) + "\n")]
            written += save_pictures(files, frontier_figure(points, title, _caption(course)))
        click.echo(f"Written to {', '.join(map(str, written))}")


def _of_images(ctx: click.Context, load: Load, images: Path, output: Path, limit: int) -> None:
    """Measure an image encoder: time on the clock against the cosine of pooled vectors."""
    from dash_export.measure.image_quality import image_quality, image_report
    from dash_export.measure.pictures import image_figure

    files = picture_files(output)
    with sole_writer(ctx, *files):
        with progress_bar("frontier") as progress:
            candidates, refused = load()
            runtime = candidates[0].runtime
            settings = [candidate.setting for candidate in candidates[1:]]
            rows = image_quality(runtime, images, settings, limit, progress)
        title = f"{runtime.bundle.manifest.model.name}, {runtime.build.target}, {runtime.build.device}"
        print_images(title, rows, ("time", "layers", "cosine", "worst", "guarded", "same_class", "agreement",
                                   "accuracy", "neighbours"))  # fmt: skip
        print_refused(refused)
        report = {"made_by": REPORT, **image_report(runtime, images, limit, rows)}
        report |= {"refused": refused, "version": __version__}
        written = [save_report(files[-1], json.dumps(report, indent=1) + "\n")]
        written += save_pictures(files, image_figure(rows, title))
    click.echo(f"Written to {', '.join(map(str, written))}")


def _caption(course: dict[str, Any]) -> str:
    from dash_export.measure.intervals import FEWEST

    rounds, cut = course["rounds"], "{items} windows of {window} tokens, the first {prefix} dense"
    if course["name"].endswith(".jsonl"):
        cut = "{items} answers of the dense mode, up to {window} tokens of each"
    clock = "{rounds} processes of {tokens} decoded tokens each" if rounds else "predicted from the build's cost table"
    few = f" (of times from {FEWEST} processes on)" if 0 < rounds < FEWEST else ""
    said = f"quality: {{name}}, {cut}; time: {clock}; bars: 95 % bootstrap intervals{few}"
    return said.format(**course)


def _report(
    course: dict[str, Any], points: Sequence[Point], shares: Sequence[float | None], candidates: Sequence[Candidate]
) -> dict[str, object]:
    runtimes = {candidate.build: candidate.runtime for candidate in candidates}
    return {
        "made_by": REPORT,
        "builds": {
            name: {
                "bundle": runtime.bundle.name,
                "model": runtime.bundle.manifest.model.name,
                "target": runtime.build.target,
                "device": runtime.build.device,
                "policy": asdict(runtime.bundle.manifest.policy),
            }
            for name, runtime in runtimes.items()
        },
        "course": course,
        "points": [
            {
                "quality": point.quality.record(),
                "timing": point.timing and asdict(point.timing),
                "time": point.time,
                "exchange_rate": point.exchange_rate and asdict(point.exchange_rate),
                "kl_of_token_there": share,
            }
            for point, share in zip(points, shares, strict=True)
        ],
        "version": __version__,
    }


def _print(title: str, points: Sequence[Point], shares: Sequence[float | None]) -> None:
    from dash_export.measure.candidates import amount
    from dash_export.measure.intervals import Interval

    def rows() -> Iterator[tuple[str, ...]]:
        for point, share in zip(points, shares, strict=True):
            quality, timing, rate = point.quality, point.timing, point.exchange_rate
            ratio = quality.figures["perplexity_ratio"]
            more = Interval(*(100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high)))
            perplexity = quality.figures["perplexity"].value
            yield (
                point.name,
                amount(quality.setting),
                f"{points[0].quality.layers - quality.layers:.2f}",
                "" if timing is None else with_bounds(Interval(timing.ratio, timing.low, timing.high), 3),
                f"{quality.time:.3f}",
                with_bounds(point.kl, 3),
                f"{perplexity:.2f}" if point is points[0] else f"{with_bounds(more, 1)} %",
                "" if rate is None else with_bounds(rate, 2),
                "" if share is None else f"{share:.2f}x",
            )

    numbers = ("skipped", "time", "predicted", "KL (nats)", "perplexity", "rate", "token's KL")
    print_table(title, ("kind", "asked for"), numbers, rows(), width=160)
    click.echo(
        "time: of dense; predicted: of the build's own dense, from its cost table. perplexity: of dense, then what is "
        "more than that. rate: per cent of perplexity paid per per cent of time saved. token's KL: at equal time, "
        "of this one's. In brackets: 95 % intervals, of times from six rounds on."
    )
