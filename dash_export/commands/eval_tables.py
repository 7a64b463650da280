"""The tables of `dash-export eval`: one per file, every setting a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from dash_export.commands.common import plain_table, print_table, result_console
from dash_export.evaluation.bootstrap import Interval
from dash_export.evaluation.evaluate import FileResult, Request
from dash_export.evaluation.settings import asked

if TYPE_CHECKING:
    from dash_export.runtime import DashRuntime

_Column = tuple[str, Callable[[Any], str]]


def with_bounds(figure: Interval, digits: int) -> str:
    """`0.123 (0.101 to 0.140)`."""
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"


def percent(figure: Interval) -> str:
    """`61.0% (52 to 70)`."""
    return f"{100 * figure.value:.1f}% ({100 * figure.low:.0f} to {100 * figure.high:.0f})"


COLUMNS: dict[str, tuple[_Column, ...]] = {
    "text": (
        ("KL (nats)", lambda row: with_bounds(row.kl, 3)),
        ("perplexity", lambda row: with_bounds(row.perplexity, 2)),
        ("of dense", lambda row: f"{row.perplexity_ratio.value:.3f}"),
        ("top-1", lambda row: f"{100 * row.top1.value:.1f}%"),
    ),
    "prompts": (
        ("agreement (tokens)", lambda row: with_bounds(row.agreement, 1)),
        ("equal tokens", lambda row: percent(row.share)),
        ("identical", lambda row: percent(row.identical)),
    ),
    "choices": (
        ("accuracy", lambda row: percent(row.accuracy)),
        ("normalised", lambda row: percent(row.normalised)),
        ("flips", lambda row: percent(row.flips)),
    ),
    "answers": (
        ("exact match", lambda row: percent(row.exact)),
        ("flips", lambda row: percent(row.flips)),
    ),
}
_ITEMS = {"text": "windows", "prompts": "prompts", "choices": "questions", "answers": "contexts"}


def print_tables(runtime: DashRuntime, request: Request, files: Sequence[FileResult]) -> None:
    """One table per file, then what the columns mean."""
    console = result_console()
    model = runtime.bundle.manifest.model
    click.echo(f"{model.name}, target {runtime.build.target}, {model.num_layers} layers\n")
    for file in files:
        columns = COLUMNS[file.form]
        names = ("layers", "time", *(name for name, _ in columns))
        table = plain_table(f"{file.file}: {_described(file, request)}", "kind", "asked for", *names, right=names)
        for row in file.results:
            # Without a token under the setting there is no mean to tell.
            means = (f"{row.layers:.2f}", f"{row.time:.3f}") if row.tokens else ("", "")
            kind = row.build or row.setting.kind
            table.add_row(kind, asked(row.setting), *means, *(show(row) for _, show in columns))
        print_table(console, table)
    click.echo(
        "layers: mean run where skipping was allowed. time: of the build's dense, from its cost table. In brackets: "
        "95 % bootstrap intervals."
    )


def _described(file: FileResult, request: Request) -> str:
    first = file.results[0]
    what = f"{first.items} {_ITEMS[file.form]}"
    extra = {
        "text": f" of {request.window} tokens, the first {request.prefix} dense",
        "prompts": f", greedy, up to {request.new_tokens} tokens after the first",
        "choices": ", the query dense; flips: right with dense, wrong here, or back",
        "answers": f", {request.dense_share:.0%} of each dense; flips: right with dense, wrong here, or back",
    }
    return what + extra[file.form]
