"""`dash-export calibrate`: which layers are essential, and what static sets cost in quality."""

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
from dash_export.commands.common import (
    check_reports,
    choose_target,
    is_bundle,
    plain_table,
    print_table,
    result_console,
)
from dash_export.commands.export import PolicyOptions, export_with_policy
from dash_export.commands.progress import progress_bar
from dash_export.decision import spans
from dash_export.errors import RequestError
from dash_export.names import REPORT
from dash_export.stretches import TokenTime

if TYPE_CHECKING:
    from dash_export.calibration import Damage
    from dash_export.runtime import DashRuntime

MODEL_TARGET = "portable"
"""What a bare model is measured with: its fp32 graphs as they are, so nothing but skipping disturbs it."""


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
    """Measure what skipping each layer, and growing sets of layers, does to a model.

    A built BUNDLE is measured through its own engines, over the layers it may skip. A MODEL is exported to a temporary
    folder with every layer but the first free to be skipped. Divergence is the mean KL from dense, in nats per token.
    The time grows with tokens x layers: SmolLM2-135M takes about a minute per 512 tokens on two idle cores.
    """
    from dash_export.calibration import Calibrator, text_windows

    prose = _read(text)
    if output is not None:
        check_reports(output)
    began = time.perf_counter()
    with progress_bar("calibrate") as progress, _runtime(ctx, source, target, progress) as runtime:
        if not runtime.bundle.manifest.policy.gated:
            raise RequestError(
                f"{source} has no layer that may be skipped. Export it with --gated, or give the model itself."
            )
        progress("loading", 0, 0)
        calibrator = Calibrator(runtime, text_windows(runtime, prose, tokens), progress)
        dense = calibrator.dense()
        singles = calibrator.single_layers()
        greedy = calibrator.greedy_sets(singles, sets)
    seconds = time.perf_counter() - began
    report = _report(runtime, dense, singles, greedy, calibrator.tokens, seconds)
    # What took minutes to measure is lost neither where nothing can be written nor where nobody reads.
    try:
        _print(runtime, report, dense, singles, greedy)
    finally:
        if output is not None:
            ctx.meta[OUTPUT] = str(output)
            _write(output, report)
    if output is not None:
        click.echo(f"Written to {output}")


def _read(text: Path | None) -> str:
    from dash_export.resources import resource_folder
    from dash_export.text_files import read_text

    return read_text(text or resource_folder("calibration") / "prose.txt")


@contextmanager
def _runtime(ctx: click.Context, source: str, target: str | None, progress: Progress) -> Iterator[DashRuntime]:
    """The bundle's engines, or those of a model exported for this measurement only."""
    from dash_export.runtime import DashRuntime

    if is_bundle(source):
        yield DashRuntime.load(source, choose_target(Bundle.open(source), target), dispatch="plain")
        return
    from dash_export.builders import build
    from dash_export.models import open_checkpoint

    with tempfile.TemporaryDirectory(prefix="dash-export-calibrate-") as folder:
        ctx.meta[OUTPUT] = f"the temporary folder {folder} (TMPDIR chooses another place)"
        path = Path(folder) / "model.dash"
        checkpoint = open_checkpoint(source)
        options = PolicyOptions("none", tuple(range(1, checkpoint.spec.num_layers)))
        made = export_with_policy(checkpoint, path, options, progress)
        built = build(made, target or MODEL_TARGET, progress=progress)
        yield DashRuntime.load(path, built.target, dispatch="plain", verify=False)


def _report(
    runtime: DashRuntime,
    dense: Damage,
    singles: Sequence[Damage],
    greedy: Sequence[Damage],
    tokens: int,
    seconds: float,
) -> dict[str, object]:
    from dataclasses import asdict

    from dash_export.calibration import essential_layers
    from dash_export.skip_policy import default_gated

    essential = essential_layers(singles)
    measured = runtime.bundle.manifest.policy.gated
    suggested = set(default_gated(runtime.engines.model.num_layers, essential)) & set(measured)
    return {
        "made_by": REPORT,
        "model": runtime.bundle.manifest.model.name,
        "target": runtime.build.target,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "dense_perplexity": dense.perplexity,
        "layers": [asdict(damage) for damage in singles],
        "essential": list(essential),
        "gated": spans(suggested),
        "sets": [asdict(damage) | {"time": _time(runtime, damage)} for damage in greedy],
    }


def _time(runtime: DashRuntime, damage: Damage) -> float:
    """Decode time as a fraction of dense, from the build's cost table."""
    return round(TokenTime(runtime.build).of(damage.skipped), 4)


def _print(
    runtime: DashRuntime, report: dict[str, object], dense: Damage, singles: Sequence[Damage], greedy: Sequence[Damage]
) -> None:
    from dash_export.calibration import ESSENTIAL_FACTOR, essential_layers

    console = result_console()
    essential = set(essential_layers(singles))
    numbers = ("KL (nats)", "perplexity")
    title = f"{report['model']}, target {report['target']}: one layer skipped, {report['tokens']} tokens"
    table = plain_table(title, "layer", *numbers, "", right=("layer", *numbers))
    table.add_row("dense", "0", f"{dense.perplexity:.2f}", "")
    for damage in singles:
        mark = Text("essential", "bold red") if damage.skipped[0] in essential else ""
        table.add_row(str(damage.skipped[0]), f"{damage.kl:.4f}", f"{damage.perplexity:.2f}", mark)
    print_table(console, table)
    click.echo(
        f"Essential: KL over {ESSENTIAL_FACTOR:g} times the median. By default the first two and the last never skip."
    )
    click.echo(f"Suggested: dash-export export MODEL --gated {report['gated']}\n")
    if greedy:
        columns = ("layers", *numbers, "time vs dense")
        table = plain_table("Greedy static sets", "skipped", *columns, right=columns)
        for damage in greedy:
            layers = str(len(damage.skipped))
            table.add_row(
                spans(damage.skipped),
                layers,
                f"{damage.kl:.4f}",
                f"{damage.perplexity:.2f}",
                f"{_time(runtime, damage):.3f}",
            )
        print_table(console, table)
        click.echo(
            "The sets were chosen on this text: on other text they do a little worse. Time: from the cost table."
        )
    click.echo(f"Took {report['seconds']} s.")


def _write(output: Path, report: dict[str, object]) -> None:
    from dash_export.artifacts import write_atomic

    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(report, indent=1) + "\n")
