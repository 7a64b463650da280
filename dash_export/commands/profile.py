"""`dash-export profile`: where the time of a token goes, as a table, JSON, a report and a trace."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.cli import OUTPUT, printable
from dash_export.commands.common import check_reports, plain_table, print_table, result_console, save_report, size
from dash_export.commands.comparison import Comparison, Loaded, comparison_options, counted
from dash_export.commands.progress import progress_bar
from dash_export.evaluate import PROFILE_ROUNDS, PROFILE_TOKENS, TRACE_TOKENS

if TYPE_CHECKING:
    from dash_export.evaluate.profile import Profile, Spread

_FILE = click.Path(path_type=Path, dir_okay=False)
_SHORT = {"always": "always run", "run": "units, run", "bypass": "bypasses", "host": "host gaps"}


@click.command("profile")
@comparison_options(budgets=(0.85,))
@click.option("--text", type=_FILE, help="Text to decode; by default the held-out text that ships with the package.")
@click.option("--context", type=click.IntRange(min=2), help="Cached tokens before the timed ones; by default 256.")
@counted("--tokens", PROFILE_TOKENS, "Timed tokens of a round.", least=2)
@counted("--repeats", PROFILE_ROUNDS, "Rounds, settings interleaved.", least=2)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure, instead of the tables.")
@click.option("--html", type=_FILE, metavar="REPORT.html", help="Write a report: one file, nothing fetched.")
@click.option(
    "--trace", type=_FILE, metavar="TRACE.json", help="Write a trace for ui.perfetto.dev or chrome://tracing."
)
@counted("--trace-tokens", TRACE_TOKENS, "Tokens per setting in the trace, at most --tokens.")
@click.pass_context
def command(
    ctx: click.Context, /, comparison: Comparison, text: Path | None, context: int | None, tokens: int, repeats: int,
    as_json: bool, html: Path | None, trace: Path | None, trace_tokens: int,
) -> None:  # fmt: skip
    """Measure where the time of a token goes in a built BUNDLE.

    Time to first token and per token; per segment and bypass, and what a skip takes; decisions, sampling and the host
    apart; layers run, bytes moved and the share of this machine's memory bandwidth that is; peak memory. Dense and
    the policy kinds (all, at a budget of 0.85, unless told otherwise) take turns on the same known tokens. Let nothing
    else run meanwhile.
    """
    from dash_export.evaluate.profile import profile
    from dash_export.resources import resource_folder
    from dash_export.text_files import read_text

    if html is not None:
        import dash_export.evaluate.pictures  # noqa: F401  fails at once where matplotlib is missing
    path = text or resource_folder("calibration") / "heldout.txt"
    content, name = read_text(path), printable(path.name)
    if html is not None and trace is not None and html.resolve() == trace.resolve():
        raise click.UsageError("--html and --trace are the same file: give each a name of its own.")
    from dash_export.outputs import locked

    with ExitStack() as held:
        for own in filter(None, (html, trace)):
            held.enter_context(locked(own, "profile"))
        for output in (html, trace):
            if output is not None:
                check_reports(output)
                ctx.meta[OUTPUT] = str(output)
                output.parent.mkdir(parents=True, exist_ok=True)
        with progress_bar("profile") as progress:
            progress("loading", 0, 0)
            loaded = comparison.load()
            found, lanes = profile(loaded.candidates(), content, name, context, tokens, repeats, progress)
        # What took minutes to measure is lost neither where nothing can be written nor where nobody reads.
        try:
            if as_json:
                click.echo(json.dumps(_report(found, loaded), ensure_ascii=False))
            else:
                _print(found)
            loaded.print_refused()
        finally:
            if html is not None:
                from dash_export.evaluate.report import render_report

                html = save_report(html, render_report(found, lanes))
            if trace is not None:
                from dash_export.evaluate.trace import chrome_trace

                events = chrome_trace(lanes, found.model, trace_tokens)
                trace = save_report(trace, json.dumps(events, ensure_ascii=False))
        for output in (html, trace):
            if output is not None:
                click.echo(f"Written to {output}", err=as_json)


def _report(found: Profile, loaded: Loaded) -> dict[str, Any]:
    from dash_export.evaluate.candidates import record

    return record(found) | {
        "stream_bytes_per_second": found.bandwidth.stream,
        "refused": [record(item) for item in loaded.refused],
        "units": {"token_ms, first_ms, samples_ms": "milliseconds", "parts, segments": "microseconds"},
    }


def _print(found: Profile) -> None:
    from dash_export.evaluate.profile import PARTS
    from dash_export.evaluate.report import conditions, lane_names, title

    console, names = result_console(), lane_names(found)
    click.echo("\n".join([title(found), *conditions(found), ""]))
    numbers = ("layers", "p50", "p90", "p99", "of dense", "1st token", "moved", "of stream", "peak RSS")
    heading = (
        "Milliseconds per token and to the first one (median); bytes per token, and their share of memory bandwidth"
    )
    times = plain_table(heading, "setting", *numbers, right=numbers)
    columns = [_SHORT.get(part, part) for part in PARTS]
    parts = plain_table("Where it goes: microseconds per token (mean) and share", "setting", *columns, right=columns)
    for name, lane in zip(names, found.lanes, strict=True):
        traffic, whole = lane.traffic, sum(own.mean for own in lane.parts.values())
        times.add_row(
            name,
            f"{lane.layers.mean:.2f}",
            *_percentiles(lane.token_ms, 3),
            f"{lane.ratio.value:.3f}",
            f"{lane.first_ms.p50:.1f}",
            size(traffic.engines + traffic.cache),
            f"{traffic.utilisation:.0%}",
            "" if lane.peak_memory is None else size(lane.peak_memory),
        )
        parts.add_row(name, *(f"{lane.parts[part].mean:.0f} {lane.parts[part].mean / whole:6.1%}" for part in PARTS))
    print_table(console, times)
    print_table(console, parts)
    # One table a lane: its segments have their own percentiles.
    for name, lane in zip(names, found.lanes, strict=True):
        heads = ("run p50", "p90", "p99", "bypass p50", "p90", "p99", "of run", "skipped")
        table = plain_table(f"{name}: microseconds per segment", "segment", *heads, right=heads)
        for row in lane.segments:
            share = "" if row.owed is None else f"{row.owed:.0%}"
            skipped = f"{row.skipped:.0%}" if row.unit else ""
            table.add_row(row.name, *_percentiles(row.run), *_percentiles(row.bypass), share, skipped)
        print_table(console, table)


def _percentiles(times: Spread | None, digits: int = 0) -> tuple[str, ...]:
    return ("",) * 3 if times is None else tuple(f"{each:.{digits}f}" for each in (times.p50, times.p90, times.p99))
