"""`dash-export eval`: what skipping costs in quality, under every policy kind."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.commands.comparing import comparison_options, dial_of, load, load_also, print_refused, settings_for
from dash_export.commands.progress import progress_bar

if TYPE_CHECKING:
    from dash_export.evaluation.evaluate import FileResult
    from dash_export.evaluation.settings import Refusal
    from dash_export.runtime import DashRuntime

BUDGETS = (0.9, 0.8)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@comparison_options
@click.option("--text", type=_FILE, multiple=True, help="A text for KL and perplexity; may be given again.")
@click.option("--tasks", type=_FILE, multiple=True, metavar="FILE.jsonl", help="A task file; may be given again.")
@click.option("--limit", type=click.IntRange(min=1), default=32, show_default=True, help="Windows or items per file.")
@click.option("--window", type=click.IntRange(min=4), default=256, show_default=True, help="Tokens of a text window.")
@click.option("--prefix", type=click.IntRange(min=2), default=64, show_default=True, help="How many of them are dense.")
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Length of an answer to a prompt."
)
@click.option(
    "--dense-share",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Part of an answer task's context that is dense; the rest is taken as if the model had written it.",
)
@click.option(
    "--matched",
    is_flag=True,
    help="Move the token policy's trade-off until it takes the budget, or skips as many layers, on each file itself: "
    "up to 8 passes.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure.")
def command(
    bundle: Path, target: str | None, kinds: tuple[str, ...] | None, also: tuple[str, ...], text: tuple[Path, ...],
    tasks: tuple[Path, ...], limit: int, window: int, prefix: int, new_tokens: int, dense_share: float,
    matched: bool, as_json: bool, **dials: Any,
) -> None:  # fmt: skip
    """Measure a built BUNDLE under each policy kind at equal settings, and other builds, against its own dense mode.

    \b
    --text   perplexity, KL from dense, top-1 agreement with dense
    --tasks  one JSON object a line, in one of these forms:
             {"query", "choices", "gold"}   multiple choice, log P(" " + choice given query)
             {"context", "target"}          generated answers, like LAMBADA's last word
             {"prompt"} or {"turns"}        how long a greedy answer agrees with dense

    Without either, the calibration text. Settings are budgets by default (0.9 and 0.8): the kinds then take equal
    time on the calibration text, predicted from the build's cost table; `time` says what they take on this one, and
    --matched makes the token policy take what was asked for there.
    """
    from dash_export.evaluation.evaluate import Request, evaluate
    from dash_export.evaluation.settings import check_same_tokens
    from dash_export.resources import resource_folder

    dial = dial_of(dials, ("budget", BUDGETS))
    if matched and dial[0] == "max_kl":
        raise click.UsageError("--matched goes with --budget or --skipped, not with --max-kl.")
    if matched and kinds is not None and "token" not in kinds:
        raise click.UsageError("--matched moves a trade-off: have token among --kinds.")
    if not text and not tasks:
        text = (resource_folder("calibration") / "prose.txt",)
    began = time.perf_counter()
    request = Request(text, tasks, limit, window, prefix, new_tokens, dense_share, matched)
    with progress_bar("eval") as progress:
        progress("loading", 0, 0)
        runtime, others = load(bundle, target), load_also(also)
        settings, refused = settings_for(runtime, kinds, dial)
        check_same_tokens([runtime, *(other for _, other in others)])
        files = evaluate(runtime, settings, request, others, progress)
    seconds = time.perf_counter() - began
    if as_json:
        click.echo(json.dumps(_report(runtime, request, files, refused, seconds), ensure_ascii=False))
        return
    from dash_export.commands.eval_tables import print_tables

    print_tables(runtime, request, files)
    print_refused(refused)
    click.echo(f"Took {seconds:.0f} s.")


def _report(
    runtime: DashRuntime, request: Any, files: Sequence[FileResult], refused: Sequence[Refusal], seconds: float
) -> dict[str, object]:
    from dash_export import __version__
    from dash_export.evaluation.bootstrap import CONFIDENCE, RESAMPLES
    from dash_export.evaluation.settings import record

    manifest = runtime.bundle.manifest
    asked = asdict(request) | {name: [path.name for path in getattr(request, name)] for name in ("texts", "tasks")}
    return {
        "bundle": runtime.bundle.root.name,
        "model": manifest.model.name,
        "layers": manifest.model.num_layers,
        "target": runtime.build.target,
        "device": runtime.build.device,
        "policy": {"origin": manifest.policy.origin, "bypass": manifest.policy.bypass},
        "dispatch": runtime.dispatch,
        "request": asked,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "method": "percentile, over items"},
        "files": [record(file) for file in files],
        "refused": [record(item) for item in refused],
        "seconds": round(seconds, 1),
        "version": __version__,
    }
