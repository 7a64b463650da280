"""`dash-export calibrate`: which units are essential, and what static sets cost in quality."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from dash_export.artifacts import Progress
from dash_export.bundle import Bundle
from dash_export.cli import OUTPUT
from dash_export.commands.common import choose_target, is_bundle, plain_table, print_table, result_console
from dash_export.commands.export import PolicyOptions, export_with_policy
from dash_export.commands.progress import progress_bar
from dash_export.decision import Unit, spans
from dash_export.errors import RequestError

if TYPE_CHECKING:
    from dash_export.evaluation.results import TextResult
    from dash_export.runtime import DashRuntime

MODEL_TARGET = "cpu"
"""What a bare model is measured with, in fp32, so nothing but skipping disturbs it."""
WINDOW = 128


@click.command("calibrate")
@click.argument("source", metavar="BUNDLE|MODEL")
@click.option("--text", type=click.Path(path_type=Path), help="Text to measure on; by default 17 kB of English prose.")
@click.option(
    "--tokens", type=click.IntRange(min=128), default=1024, show_default=True, help="How much of it, in windows of 128."
)
@click.option(
    "--sets", type=click.IntRange(min=0), default=6, show_default=True, help="Largest static set to search; 0: none."
)
@click.option("--target", help=f"Build to measure: of a bundle cpu or the only one, of a model {MODEL_TARGET} (fp32).")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="Write the result here too.",
)
@click.pass_context
def command(
    ctx: click.Context, source: str, text: Path | None, tokens: int, sets: int, target: str | None, output: Path | None
) -> None:
    """Measure what skipping each unit, and growing sets of units, does to a model.

    A built BUNDLE is measured through its own engines. A MODEL is exported to a temporary folder with every layer but
    the first as a unit of its own. Divergence is the mean KL from dense, in nats per token. The time grows with tokens
    x units: SmolLM2-135M takes about a minute per 512 tokens and 30 units on two idle cores.
    """
    from dash_export.evaluation.sets import greedy_sets, measure_sets
    from dash_export.evaluation.text import windows
    from dash_export.resources import resource_folder
    from dash_export.text_files import read_text

    path = text or resource_folder("calibration") / "prose.txt"
    prose = read_text(path)
    began = time.perf_counter()
    with progress_bar("calibrate") as progress, _runtime(ctx, source, target, progress) as runtime:
        units = runtime.bundle.manifest.policy.units
        if not units:
            raise RequestError(f"{source} has no unit. Export it with --units, or give the model itself.")
        parts = windows(runtime, prose, str(path), tokens // WINDOW, WINDOW)
        dense, *singles = measure_sets(runtime, [(unit,) for unit in units], parts, progress)
        greedy = greedy_sets(runtime, singles, sets, parts, progress)
    seconds = time.perf_counter() - began
    report = _report(runtime, dense, singles, greedy, seconds)
    # What took minutes to measure is lost neither where nothing can be written nor where nobody reads.
    try:
        _print(runtime, dense, singles, greedy)
        click.echo(f"Took {seconds:.1f} s.")
    finally:
        if output is not None:
            ctx.meta[OUTPUT] = str(output)
            _write(output, report)
    if output is not None:
        click.echo(f"Written to {output}")


@contextmanager
def _runtime(ctx: click.Context, source: str, target: str | None, progress: Progress) -> Iterator[DashRuntime]:
    """The bundle's engines, or those of a model exported for this measurement only."""
    from dash_export.runtime import DashRuntime

    progress("loading", 0, 0)
    if is_bundle(source):
        yield DashRuntime.load(source, choose_target(Bundle.open(source), target))
        return
    from dash_export.builders import build
    from dash_export.models import open_checkpoint

    with tempfile.TemporaryDirectory(prefix="dash-export-calibrate-") as folder:
        ctx.meta[OUTPUT] = f"the temporary folder {folder} (TMPDIR chooses another place)"
        path = Path(folder) / "model.dash"
        checkpoint = open_checkpoint(source)
        options = PolicyOptions("none", tuple(Unit(layer, layer) for layer in range(1, checkpoint.spec.num_layers)))
        made = export_with_policy(checkpoint, path, options, progress)
        weights = None if target else "fp32"
        built = build(made, target or MODEL_TARGET, weights=weights, progress=progress)
        yield DashRuntime.load(path, built.target, verify=False)


def _report(
    runtime: DashRuntime,
    dense: TextResult,
    singles: Sequence[TextResult],
    greedy: Sequence[TextResult],
    seconds: float,
) -> dict[str, object]:
    from dash_export.evaluation.sets import essential
    from dash_export.evaluation.settings import record

    return {
        "model": runtime.bundle.manifest.model.name,
        "target": runtime.build.target,
        "seconds": round(seconds, 1),
        "dense": record(dense),
        "units": [record(result) for result in singles],
        "essential": [result.setting.skip for result in essential(singles)],
        "sets": [record(result) for result in greedy],
    }


def _print(
    runtime: DashRuntime, dense: TextResult, singles: Sequence[TextResult], greedy: Sequence[TextResult]
) -> None:
    from dash_export.evaluation.sets import ESSENTIAL_FACTOR, essential

    console = result_console()
    needed = essential(singles)
    numbers = ("KL (nats)", "perplexity")
    name = f"{runtime.bundle.manifest.model.name}, target {runtime.build.target}"
    table = plain_table(f"{name}: one unit skipped, {dense.tokens} tokens", "unit", *numbers, "", right=numbers)
    table.add_row("dense", "0", f"{dense.perplexity.value:.2f}", "")
    for result in singles:
        mark = Text("essential", "bold red") if result in needed else ""
        table.add_row(*_cells(result), mark)
    print_table(console, table)
    click.echo(f"Essential: KL over {ESSENTIAL_FACTOR:g} times the median.\n")
    if greedy:
        columns = (*numbers, "time vs dense")
        table = plain_table("Greedy static sets", "skipped", *columns, right=columns)
        for result in greedy:
            table.add_row(*_cells(result), f"{result.time:.3f}")
        print_table(console, table)
        click.echo(
            "The sets were chosen on this text: on other text they do a little worse. Time: from the cost table."
        )


def _cells(result: TextResult) -> tuple[str, str, str]:
    return spans(result.setting.skip or ()), f"{result.kl.value:.4f}", f"{result.perplexity.value:.2f}"


def _write(output: Path, report: dict[str, object]) -> None:
    from dash_export.artifacts import write_atomic

    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(report, indent=1) + "\n")
