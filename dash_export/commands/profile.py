"""`dash-export profile`: where the time of a token goes, as a table, JSON, a report and a trace."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.cli import printable
from dash_export.commands.options import Load, comparison_options, count_option, print_refused
from dash_export.commands.progress import progress_bar
from dash_export.commands.reports import save_report, sole_writer
from dash_export.commands.tables import print_table, size
from dash_export.core.facts import EncoderFacts
from dash_export.errors import RequestError
from dash_export.files.artifacts import Progress
from dash_export.measure import PROFILE_ROUNDS, PROFILE_TOKENS, TRACE_TOKENS

if TYPE_CHECKING:
    from dash_export.runtime import DashRuntime

TOP_LAYERS = 10
"""Layers of an engine that are printed one by one: --json has all."""
_FILE = click.Path(path_type=Path, dir_okay=False)
_SHORT = {"always": "always run", "run": "units, run", "bypass": "bypasses", "host": "host gaps"}


@click.command("profile")
@comparison_options(budgets=(0.85,))
@click.option("--text", type=_FILE, help="Text to decode; by default the held-out text that ships with the package.")
@click.option("--context", type=click.IntRange(min=2), help="Cached tokens before the timed; by default the build's.")
@count_option("--tokens", PROFILE_TOKENS, "Timed tokens of a round.", least=2)
@count_option("--repeats", PROFILE_ROUNDS, "Rounds, settings interleaved.", least=2)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure, instead of the tables.")
@click.option("--html", type=_FILE, metavar="REPORT.html", help="Write a report: one file, nothing fetched.")
@click.option(
    "--trace", type=_FILE, metavar="TRACE.json",
    help=f"Write a trace of {TRACE_TOKENS} tokens per setting for ui.perfetto.dev or chrome://tracing.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Time the layers inside each engine, too (TensorRT, TensorRT-RTX).")
@click.pass_context
def command(
    ctx: click.Context, /, load: Load, text: Path | None, context: int | None, tokens: int, repeats: int,
    as_json: bool, html: Path | None, trace: Path | None, layers: bool
) -> None:  # fmt: skip
    """Measure where the time of a token goes in a built BUNDLE.

    Time per token, per segment and bypass, and what a skip takes; decisions, sampling and the host apart; layers run;
    peak memory. Dense and the policy kinds (all, at a budget of 0.85, unless told otherwise) take turns on the same
    known tokens. Let nothing else run meanwhile. `bench` tells rates, of prompts too. On a GPU engines have the
    device's own times, and every token is launched piece by piece, which takes longer than as one graph.
    --layers launches each engine of BUNDLE alone, too, under TensorRT's profiler, which slows it: read shares off it.

    Of an image encoder: the time of each segment and exit for 1 and for 8 pictures together, as a table or --json. They
    are the same under every setting.
    """
    from dash_export.files.resources import resource_folder
    from dash_export.measure.breakdown import profile
    from dash_export.text.text_files import read_text

    if html is not None:
        from dash_export.measure.report import render_report  # fails at once where matplotlib is missing
    path = text or resource_folder("calibration") / "heldout.txt"
    content, name = read_text(path), printable(path.name)
    if html is not None and trace is not None and html.resolve() == trace.resolve():
        raise click.UsageError("--html and --trace are the same file: give each a name of its own.")
    with sole_writer(ctx, *filter(None, (html, trace))):
        with progress_bar("profile") as progress:
            progress("loading", 0, 0)
            candidates, refused = load()
            if isinstance(candidates[0].runtime.bundle.manifest.model, EncoderFacts):
                if candidates[0].runtime.bundle.manifest.model.takes != "pictures":
                    raise RequestError("A text encoder is not profiled so far: its times go with the length of a text.")
                if given := [
                    name for name, path in (("--html", html), ("--trace", trace), ("--layers", layers)) if path
                ]:
                    raise RequestError(f"{given[0]} is of a causal LM: leave it out, or take --json.")
                _of_encoder(candidates[0].runtime, repeats, as_json, progress)
                return
            found, lanes = profile(candidates, content, name, context, tokens, repeats, progress, layers)
        # Measuring took minutes: save the report even if printing fails, and print before saving can fail.
        try:
            if as_json:
                click.echo(json.dumps(found | {"refused": refused}))
            else:
                _print(found)
            print_refused(refused)
        finally:
            written = []
            if trace is not None:
                from dash_export.measure.trace import chrome_trace

                events = chrome_trace(lanes, found["model"], TRACE_TOKENS, found["engines"])
                written.append(save_report(trace, json.dumps(events, ensure_ascii=False)))
            if html is not None:  # last: it is the larger file
                written.append(save_report(html, render_report(found, lanes)))
        for output in written:
            click.echo(f"Written to {output}", err=as_json)


def _of_encoder(runtime: DashRuntime, rounds: int, as_json: bool, progress: Progress) -> None:
    from dash_export.measure.image_profile import image_profile

    found = image_profile(runtime, rounds, progress)
    if as_json:
        click.echo(json.dumps(found))
        return
    machine = found["machine"]
    click.echo(f"{found['model']}, {found['target']}, {machine['cpu']}, {machine['cores']} cores\n"
               f"load before: {machine['load']:g}\n")  # fmt: skip
    for batch in found["batches"]:
        whole, p50, p90, p99 = batch["picture_ms"]["p50"], *_percentiles(batch["picture_ms"], 1)
        print_table(
            f"{batch['size']} at a time: milliseconds a picture, dense: {p50}, p90 {p90}, p99 {p99}; its segments "
            f"together {batch['together']:.1%} of that. Microseconds a picture:",
            ("segment",),
            ("run p50", "p90", "p99", "of dense", "exit p50", "p90", "p99"),
            ((row["name"], *_percentiles(row["run"]), f"{row['run']['p50'] / whole / 1e3:.1%}",
              *_percentiles(row["exit"])) for row in batch["segments"]),
        )  # fmt: skip


def _print(found: dict[str, Any]) -> None:
    from dash_export.measure.breakdown import PARTS, conditions, shares

    click.echo("\n".join([*conditions(found), ""]))
    print_table(
        "Milliseconds per token",
        ("setting",),
        ("layers", "p50", "p90", "p99", "of dense", "peak RSS"),
        (
            (
                lane["label"], f"{lane['layers']['mean']:.2f}", *_percentiles(lane["token_ms"], 3),
                f"{lane['ratio']['value']:.3f}", size(lane["peak_memory"]),
            )
            for lane in found["lanes"]
        ),
    )  # fmt: skip
    print_table(
        "Where it goes: microseconds per token (mean) and share",
        ("setting",),
        [_SHORT.get(part, part) for part in PARTS],
        ((lane["label"], *(f"{mean:.0f} {share:6.1%}" for mean, share in shares(lane).values()))
         for lane in found["lanes"]),
    )  # fmt: skip
    for lane in found["lanes"]:
        print_table(
            f"{lane['label']}: microseconds per segment",
            ("segment",),
            ("run p50", "p90", "p99", "bypass p50", "p90", "p99", "of run", "skipped"),
            (
                (
                    row["name"], *_percentiles(row["run"]), *_percentiles(row["bypass"]),
                    "" if row["owed"] is None else f"{row['owed']:.0%}", f"{row['skipped']:.0%}" if row["unit"] else "",
                )
                for row in lane["segments"]
            ),
        )  # fmt: skip
        if lane["device"]:
            print_table(
                f"{lane['label']}: microseconds per engine, by events of the device",
                ("engine",),
                ("device p50", "p90", "p99", "host p50", "p90", "p99", "gap p50", "p90", "p99"),
                ((row["name"], *(text for kind in ("device", "host", "gap") for text in _percentiles(row[kind], 1)))
                 for row in lane["device"]),
            )  # fmt: skip
    for engine in found["engines"]:
        _print_layers(engine)


def _print_layers(engine: dict[str, Any]) -> None:
    rows = sorted(engine["layers"].items(), key=itemgetter(1), reverse=True)
    whole, others = sum(engine["layers"].values()), rows[TOP_LAYERS:]
    rows[TOP_LAYERS:] = [(f"{len(others)} others", sum(took for _, took in others))] if others else []
    print_table(
        f"{engine['name']}: {engine['device_us']:.1f} microseconds; under the profiler its layers take {whole:.1f}",
        ("layer",), ("microseconds", "share"),
        ((printable(name), f"{took:.1f}", f"{took / whole:.1%}") for name, took in rows),
    )  # fmt: skip


def _percentiles(times: dict[str, Any] | None, digits: int = 0) -> tuple[str, ...]:
    return tuple("" if times is None else f"{times[name]:.{digits}f}" for name in ("p50", "p90", "p99"))
