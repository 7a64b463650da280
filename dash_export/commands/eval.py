"""`dash-export eval`: what skipping costs in quality, under every policy kind."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export import __version__
from dash_export.commands.options import Load, comparison_options, print_refused, window_options, with_bounds
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_table
from dash_export.measure import DENSE_SHARE

if TYPE_CHECKING:
    from dash_export.measure.score import Result
    from dash_export.runtime import DashRuntime

_FILE = click.Path(path_type=Path, dir_okay=False)
_File = tuple[str, str, "list[Result]"]
"""Name, form (`text`, `choices` or `answers`) and results of one file."""


@click.command("eval")
@comparison_options(budgets=(0.9, 0.8))
@click.option("--text", "texts", type=_FILE, multiple=True, help="A text for KL and perplexity; may be given again.")
@click.option("--tasks", type=_FILE, multiple=True, metavar="FILE.jsonl", help="A task file; may be given again.")
@window_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure.")
def command(load: Load, as_json: bool, **measure: Any) -> None:
    """Measure a built BUNDLE under each policy kind at equal settings, and other builds, against its own dense mode.

    \b
    --text   perplexity, KL from dense, top-1 agreement with dense: of a plain text, or (.jsonl) of chat
             prompts with the model's answers, which the dense mode writes where the file has none
    --tasks  one JSON object a line, in one of these forms:
             {"query", "choices", "gold"}   multiple choice, log P(" " + choice given query)
             {"context", "target"}          generated answers, like LAMBADA's last word

    Without either, the model's held-out answers that came with the policy, or else the calibration text. Settings are
    budgets by default (0.9 and 0.8). The column `time` is the decode time on this text, as a fraction of dense,
    predicted from the build's cost table.
    """
    from dash_export.measure.tasks import evaluate

    if not measure["texts"] and not measure["tasks"]:
        measure["texts"] = (None,)
    began = time.perf_counter()
    with progress_bar("eval") as progress:
        progress("loading", 0, 0)
        candidates, refused = load()
        files = evaluate(candidates, **measure, progress=progress)
    seconds, runtime = time.perf_counter() - began, candidates[0].runtime
    if as_json:
        report = _report(runtime, measure, files) | {"refused": refused}
        click.echo(json.dumps(report | {"seconds": round(seconds, 1)}))
        return
    _print(runtime, measure, files)
    print_refused(refused)
    click.echo(f"Took {seconds:.0f} s.")


def _report(runtime: DashRuntime, measure: dict[str, Any], files: Sequence[_File]) -> dict[str, object]:
    from dash_export.measure.intervals import CONFIDENCE, RESAMPLES

    names = {kind: [path and path.name for path in measure[kind]] for kind in ("texts", "tasks")}
    manifest = runtime.bundle.manifest
    return {
        "bundle": runtime.bundle.name,
        "model": manifest.decoder.name,
        "layers": manifest.decoder.num_layers,
        "target": runtime.build.target,
        "device": runtime.build.device,
        "policy": {"origin": manifest.policy.origin, "bypass": manifest.policy.bypass},
        "dispatch": runtime.dispatch,
        "request": measure | names,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "method": "percentile, over items"},
        "files": [
            {"file": name, "form": form, "results": [row.record() for row in results]} for name, form, results in files
        ],
        "version": __version__,
    }


_FORMS = {
    "text": "windows of {window} tokens, the first {prefix} dense",
    "choices": "questions, the query dense",
    "answers": f"contexts, {DENSE_SHARE:.0%} of each dense",
}


def _print(runtime: DashRuntime, measure: dict[str, Any], files: Sequence[_File]) -> None:
    """Print one table per file, with a row per setting, and then what the columns mean."""
    from dash_export.measure.candidates import amount, kind_shown

    model = runtime.bundle.manifest.decoder
    click.echo(f"{model.name}, target {runtime.build.target}, {model.num_layers} layers\n")
    for name, form, results in files:
        print_table(
            f"{name}: {results[0].items} {_FORMS[form].format(**measure)}",
            ("kind", "asked for"), ("layers", "time", *(figure.replace("_", " ") for figure in results[0].figures)),
            (
                (
                    row.build or kind_shown(row.setting), amount(row.setting),
                    # Where no token falls under the setting, there is no mean to show.
                    *((f"{row.layers:.2f}", f"{row.time:.3f}") if row.tokens else ("", "")),
                    # Only the first figure has its interval: more do not fit a terminal.
                    *(f"{figure.value:.3f}" if at else with_bounds(figure, 3)
                      for at, figure in enumerate(row.figures.values())),
                )
                for row in results
            ),
        )  # fmt: skip
    click.echo(
        "layers: mean run where skipping was allowed. time: of each build's own dense, from its cost table (frontier "
        "measures across builds). kl: nats per token. flips: right with dense and wrong here, or back. In brackets: "
        "95 % bootstrap intervals; --json has those of all."
    )
