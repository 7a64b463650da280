"""`dash-export profile`: where the time of a token goes, as a table, JSON, a report and a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.cli import OUTPUT, printable
from dash_export.commands.common import check_reports, save_report
from dash_export.commands.comparing import comparison_options, dial_of, load, load_also, print_refused, settings_for
from dash_export.commands.progress import progress_bar

if TYPE_CHECKING:
    from dash_export.evaluation.settings import Refusal
    from dash_export.profiling.results import Profile

BUDGETS = (0.85,)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("profile")
@click.argument("bundle", type=click.Path(path_type=Path))
@comparison_options
@click.option("--text", type=_FILE, help="Text to decode; by default the held-out text that ships with the package.")
@click.option("--context", type=click.IntRange(min=2), help="Cached tokens before the timed ones; by default 256.")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Timed tokens of a round."
)  # fmt: skip
@click.option(
    "--repeats", type=click.IntRange(min=2), default=8, show_default=True, help="Rounds, settings interleaved."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure, instead of the tables.")
@click.option("--html", type=_FILE, metavar="REPORT.html", help="Write a report: one file, nothing fetched.")
@click.option(
    "--trace", type=_FILE, metavar="TRACE.json", help="Write a trace for ui.perfetto.dev or chrome://tracing."
)
@click.option(
    "--trace-tokens",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Tokens per setting in the trace, at most --tokens.",
)
@click.pass_context
def command(
    ctx: click.Context, /, bundle: Path, target: str | None, kinds: tuple[str, ...] | None, also: tuple[str, ...],
    text: Path | None, context: int | None, tokens: int, repeats: int, as_json: bool, html: Path | None,
    trace: Path | None, trace_tokens: int, **dials: Any,
) -> None:  # fmt: skip
    """Measure where the time of a token goes in a built BUNDLE.

    Time to first token and per token; per segment and bypass, and what a skip owes; decisions, sampling and the host
    apart; layers run, bytes moved and the share of this machine's memory bandwidth that is; peak memory. Dense and
    the policy kinds (all, at a budget of 0.85, unless told otherwise) take turns on the same known tokens. Let nothing
    else run meanwhile.
    """
    from dash_export.evaluation.settings import entrants
    from dash_export.profiling.run import Request, profile
    from dash_export.resources import resource_folder
    from dash_export.text_files import read_text

    if html is not None:
        import dash_export.profiling.figures  # noqa: F401  fails at once where matplotlib is missing
    dial = dial_of(dials, ("budget", BUDGETS))
    path = text or resource_folder("calibration") / "heldout.txt"
    request = Request(read_text(path), printable(path.name), context, tokens, repeats, trace_tokens)
    for output in (html, trace):
        if output is not None:
            check_reports(output)
            ctx.meta[OUTPUT] = str(output)
            output.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("profile") as progress:
        progress("loading", 0, 0)
        runtime, others = load(bundle, target), load_also(also)
        settings, refused = settings_for(runtime, kinds, dial)
        found, lanes = profile(entrants(runtime, settings, others), request, progress)
    # What took minutes to measure is lost neither where nothing can be written nor where nobody reads.
    try:
        if as_json:
            click.echo(json.dumps(_report(found, refused), ensure_ascii=False))
        else:
            from dash_export.commands.profile_tables import print_profile

            print_profile(found)
        print_refused(refused)
    finally:
        if html is not None:
            from dash_export.profiling.report import render_report

            html = save_report(html, render_report(found, lanes))
        if trace is not None:
            from dash_export.profiling.trace import chrome_trace

            trace = save_report(trace, json.dumps(chrome_trace(lanes, found.model), ensure_ascii=False))
    for output in (html, trace):
        if output is not None:
            click.echo(f"Written to {output}", err=as_json)


def _report(found: Profile, refused: list[Refusal]) -> dict[str, object]:
    from dash_export.evaluation.settings import record

    return record(found) | {
        "stream_bytes_per_second": found.bandwidth.stream,
        "refused": [record(item) for item in refused],
        "units": {"token_ms, first_ms, samples_ms": "milliseconds", "parts, segments": "microseconds"},
    }
