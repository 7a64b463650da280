"""`dash-export eval`: what skipping costs in quality, under every policy kind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export import __version__
from dash_export.commands.common import plain_table, print_table, result_console
from dash_export.commands.comparison import (
    Comparison,
    Loaded,
    comparison_options,
    counted,
    window_options,
    with_bounds,
)
from dash_export.commands.progress import progress_bar
from dash_export.evaluate import DENSE_SHARE, NEW_TOKENS

if TYPE_CHECKING:
    from dash_export.evaluate.evaluate import FileResult, Request
    from dash_export.evaluate.intervals import Interval

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("eval")
@comparison_options(budgets=(0.9, 0.8))
@click.option("--text", "texts", type=_FILE, multiple=True, help="A text for KL and perplexity; may be given again.")
@click.option("--tasks", type=_FILE, multiple=True, metavar="FILE.jsonl", help="A task file; may be given again.")
@window_options
@counted("--new-tokens", NEW_TOKENS, "Length of an answer to a prompt.")
@click.option(
    "--dense-share", type=click.FloatRange(0, 1), default=DENSE_SHARE, show_default=True,
    help="Part of an answer task's context that is dense; the rest is taken as if the model had written it.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure.")
def command(comparison: Comparison, as_json: bool, **measure: Any) -> None:
    """Measure a built BUNDLE under each policy kind at equal settings, and other builds, against its own dense mode.

    \b
    --text   perplexity, KL from dense, top-1 agreement with dense
    --tasks  one JSON object a line, in one of these forms:
             {"query", "choices", "gold"}   multiple choice, log P(" " + choice given query)
             {"context", "target"}          generated answers, like LAMBADA's last word
             {"prompt"} or {"turns"}        how long a greedy answer agrees with dense

    Without either, the calibration text. Settings are budgets by default (0.9 and 0.8): the kinds then take equal
    time on the calibration text, predicted from the build's cost table; `time` says what they take on this one.
    """
    from dash_export.evaluate.evaluate import Request, evaluate
    from dash_export.resources import resource_folder

    request = Request(**measure)
    if not request.texts and not request.tasks:
        request = Request(**measure | {"texts": (resource_folder("calibration") / "prose.txt",)})
    began = time.perf_counter()
    with progress_bar("eval") as progress:
        progress("loading", 0, 0)
        loaded = comparison.load()
        files = evaluate(loaded.runtime, loaded.settings, request, loaded.others, progress)
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps(_report(loaded, request, files, seconds), ensure_ascii=False))
        return
    _print(loaded, request, files)
    loaded.print_refused()
    click.echo(f"Took {seconds:.0f} s.")


def _report(loaded: Loaded, request: Request, files: Sequence[FileResult], seconds: float) -> dict[str, object]:
    from dash_export.evaluate.candidates import record
    from dash_export.evaluate.intervals import CONFIDENCE, RESAMPLES

    names = {field: [path.name for path in getattr(request, field)] for field in ("texts", "tasks")}
    runtime, manifest = loaded.runtime, loaded.runtime.bundle.manifest
    return {
        "bundle": runtime.bundle.root.name,
        "model": manifest.model.name,
        "layers": manifest.model.num_layers,
        "target": runtime.build.target,
        "device": runtime.build.device,
        "policy": {"origin": manifest.policy.origin, "bypass": manifest.policy.bypass},
        "dispatch": runtime.dispatch,
        "request": asdict(request) | names,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "method": "percentile, over items"},
        "files": [record(file) for file in files],
        "refused": [record(item) for item in loaded.refused],
        "seconds": round(seconds, 1),
        "version": __version__,
    }  # fmt: skip


def percent(figure: Interval) -> str:
    """`61.0% (52 to 70)`."""
    return f"{100 * figure.value:.1f}% ({100 * figure.low:.0f} to {100 * figure.high:.0f})"


# Form -> its items, what is to know about them, and its columns.
_FORMS: dict[str, tuple[str, str, dict[str, Callable[[Any], str]]]] = {
    "text": (
        "windows", " of {0.window} tokens, the first {0.prefix} dense",
        {
            "KL (nats)": lambda row: with_bounds(row.kl, 3),
            "perplexity": lambda row: with_bounds(row.perplexity, 2),
            "of dense": lambda row: f"{row.perplexity_ratio.value:.3f}",
            "top-1": lambda row: f"{100 * row.top1.value:.1f}%",
        },
    ),
    "prompts": (
        "prompts", ", greedy, up to {0.new_tokens} tokens after the first",
        {
            "agreement (tokens)": lambda row: with_bounds(row.agreement, 1),
            "equal tokens": lambda row: percent(row.share),
            "identical": lambda row: percent(row.identical),
        },
    ),
    "choices": (
        "questions", ", the query dense; flips: right with dense, wrong here, or back",
        {
            "accuracy": lambda row: percent(row.accuracy),
            "normalised": lambda row: percent(row.normalised),
            "flips": lambda row: percent(row.flips),
        },
    ),
    "answers": (
        "contexts", ", {0.dense_share:.0%} of each dense; flips: right with dense, wrong here, or back",
        {"exact match": lambda row: percent(row.exact), "flips": lambda row: percent(row.flips)},
    ),
}  # fmt: skip


def _print(loaded: Loaded, request: Request, files: Sequence[FileResult]) -> None:
    """One table per file, every setting a row, then what the columns mean."""
    from dash_export.evaluate.candidates import amount

    console = result_console()
    model = loaded.runtime.bundle.manifest.model
    click.echo(f"{model.name}, target {loaded.runtime.build.target}, {model.num_layers} layers\n")
    for file in files:
        items, more, columns = _FORMS[file.form]
        names = ("layers", "time", *columns)
        title = f"{file.file}: {file.results[0].items} {items}{more.format(request)}"
        table = plain_table(title, "kind", "asked for", *names, right=names)
        for row in file.results:
            # Without a token under the setting there is no mean to tell.
            means = (f"{row.layers:.2f}", f"{row.time:.3f}") if row.tokens else ("", "")
            kind = row.build or row.setting.kind
            table.add_row(kind, amount(row.setting), *means, *(show(row) for show in columns.values()))
        print_table(console, table)
    click.echo(
        "layers: mean run where skipping was allowed. time: of the build's dense, from its cost table. In brackets: "
        "95 % bootstrap intervals."
    )
