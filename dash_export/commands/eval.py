"""`dash-export eval`: what skipping costs in quality, under every policy kind."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export import __version__
from dash_export.cli import printable
from dash_export.commands import options
from dash_export.commands.options import Load, print_refused, with_bounds
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_images, print_table
from dash_export.errors import RequestError

if TYPE_CHECKING:
    from dash_export.measure.score import Result
    from dash_export.runtime import DashRuntime

_File = tuple[str, str, "list[Result]"]
"""Name, form (`text` or `task`) and results of one text or task."""


@click.command("eval")
@options.comparison_options(budgets=(0.9, 0.8))
@click.option("--text", "texts", type=click.Path(path_type=Path, dir_okay=False), multiple=True,
              help="A text for KL and perplexity; may be given again.")  # fmt: skip
@click.option("--tasks", type=options.comma_separated(click.STRING), default=(), metavar="NAMES",
              help="Tasks or groups of lm-eval, like arc_easy,gsm8k.")  # fmt: skip
@click.option("--images", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
              help="Of an image encoder: pictures, in a folder for each class.")  # fmt: skip
@click.option("--include-path", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
              help="A folder of your own tasks, as YAML, for --tasks.")  # fmt: skip
@options.window_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object with every figure.")
def command(
    load: Load, texts: Any, tasks: Any, images: Path | None, include_path: Path | None, as_json: bool, **window: int
) -> None:
    """Measure a built BUNDLE under each policy kind at equal settings, and other builds, against its own dense mode.

    \b
    --text   perplexity, KL from dense, top-1 agreement with dense: of a plain text, or (.jsonl) of chat
             prompts with the model's answers, which the dense mode writes where the file has none
    --tasks  the metrics of lm-eval, and which items dense has right and a setting wrong, or the reverse
    --images of an image encoder: cosine with dense, and how well a linear classifier and the nearest neighbours
             on its pooled vectors tell the classes apart

    Without any, the text is the held-out answers that came with the policy, or else the calibration text. The
    settings are budgets, 0.9 and 0.8 by default. The column `time` is a prediction: the build's cost table, applied to
    what was skipped in this text or task.
    """
    from dash_export.measure.score import score
    from dash_export.measure.texts import judged_text

    began, limit = time.perf_counter(), window["limit"]
    if images is not None:
        if texts or tasks:
            raise click.UsageError("--images is of an image encoder, --text and --tasks of a causal LM: give one.")
        _of_images(load, images, limit, as_json)
        return
    texts = texts or (() if tasks else (None,))
    with progress_bar("eval") as progress:
        progress("loading", 0, 0)
        candidates, refused = load()
        runtime = candidates[0].runtime
        _check_kind(runtime, "prompt")
        # All are read and checked before the first is measured.
        judged = [judged_text(runtime, path, **window, progress=progress) for path in texts]
        loaded = {}
        if tasks:
            os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars; tqdm reads it on import
            from dash_export.measure.tasks import load_tasks, run_task

            loaded = load_tasks(tasks, include_path, limit)
        files = [(text.name, "text", score(text.items, candidates, progress, text.name)) for text in judged]
        files += [(name, "task", run_task(name, task, candidates, limit, progress)) for name, task in loaded.items()]
    seconds = time.perf_counter() - began
    if as_json:
        request = window | {"texts": [path and path.name for path in texts], "tasks": tasks}
        report = _report(runtime, request, files) | {"refused": refused}
        click.echo(json.dumps(report | {"seconds": round(seconds, 1)}))
        return
    _print(runtime, window, files)
    print_refused(refused)
    click.echo(f"Took {seconds:.0f} s.")


_TAKEN = {
    "prompt": "a causal LM: give it text, by --text or --tasks, and no pictures.",
    "pictures": "an image encoder: give it pictures, --images DIR with a folder for each class, and no text.",
    "texts": "a text encoder, which nothing is measured for so far: `dash-export run` gives its vectors.",
}
"""What a model takes -> what it is, and what to give."""


def _check_kind(runtime: DashRuntime, expected: str) -> None:
    """Raise RequestError for a model that does not take what is `expected`."""
    model = runtime.bundle.manifest.model
    if model.takes != expected:
        raise RequestError(f"{model.name} is {_TAKEN[model.takes]}")


def _of_images(load: Load, images: Path, limit: int, as_json: bool) -> None:
    """Measure an image encoder on pictures in a folder for each class."""
    from dash_export.measure.image_quality import image_quality, image_report

    with progress_bar("eval") as progress:
        candidates, refused = load()
        runtime = candidates[0].runtime
        _check_kind(runtime, "pictures")
        settings = [candidate.setting for candidate in candidates[1:]]
        rows = image_quality(runtime, images, settings, limit, progress, labelled=True)
    if as_json:
        report = image_report(runtime, images, limit, rows)
        click.echo(json.dumps(report | {"refused": refused, "version": __version__}))
        return
    print_images(
        f"{runtime.bundle.manifest.model.name}, target {runtime.build.target}; {printable(images.name)}: "
        f"{rows[0].pictures} pictures", rows,
        ("predicted", "layers", "cosine", "worst", "same_class", "accuracy", "neighbours", "lost", "won", "guarded"),
    )  # fmt: skip
    print_refused(refused)
    click.echo(
        "predicted: time of dense by the build's cost table (`frontier` measures it). cosine: of pooled vectors with "
        "dense ones, mean and worst. accuracy: of a linear classifier, neighbours: of the nearest ones; both learn "
        "dense vectors of every other picture and are judged on the rest. lost: share that the linear classifier has "
        "right on dense vectors and wrong on these; won: the reverse. guarded: share held back as foreign. In "
        "brackets: 95 % intervals; `--json` has those of all shares."
    )


def _report(runtime: DashRuntime, request: dict[str, Any], files: Sequence[_File]) -> dict[str, object]:
    from dash_export.measure.intervals import CONFIDENCE, RESAMPLES

    manifest = runtime.bundle.manifest
    return {
        "bundle": runtime.bundle.name,
        "model": manifest.decoder.name,
        "layers": manifest.decoder.num_layers,
        "target": runtime.build.target,
        "device": runtime.build.device,
        "policy": {"origin": manifest.policy.origin, "bypass": manifest.policy.bypass},
        "dispatch": runtime.dispatch,
        "request": request,
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "method": "percentile, over items"},
        "files": [
            {"file": name, "form": form, "results": [row.record() for row in results]} for name, form, results in files
        ],
        "version": __version__,
    }


_FORMS = {"text": "windows of {window} tokens, the first {prefix} dense", "task": "items, contexts dense"}


def _print(runtime: DashRuntime, window: dict[str, int], files: Sequence[_File]) -> None:
    """Print one table per text and task, with a row per setting, and then what the columns mean."""
    from dash_export.measure.candidates import amount, kind_shown

    model = runtime.bundle.manifest.decoder
    click.echo(f"{model.name}, target {runtime.build.target}, {model.num_layers} layers\n")
    for name, form, results in files:
        print_table(
            f"{name}: {results[0].items} {_FORMS[form].format(**window)}",
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
        "layers: mean number that ran, where skipping was allowed. time: decode time as a fraction of this build's own "
        "dense, predicted from its cost table (`frontier` measures it, across builds too). kl: nats per token. lost: "
        "share of items that dense has right and this row wrong; won: the reverse. In brackets: 95 % bootstrap "
        "intervals; --json has those of all figures."
    )
