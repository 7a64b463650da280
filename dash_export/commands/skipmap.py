"""`dash-export skipmap`: which layers each token of a text skips, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dash_export.cli import OUTPUT
from dash_export.commands.progress import progress_bar
from dash_export.commands.setting_options import NumberList, dial_of, load
from dash_export.errors import RequestError

BUDGET = (0.85,)


@click.command("skipmap")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Take the text from a file.")
@click.option("--target", help="Which build: cpu, or the only one there is.")
@click.option("--kind", default="token", show_default=True, help="Policy kind.")
@click.option("--budget", type=NumberList(0, 1), help="Decode time as a fraction of dense; 0.85 if nothing is given.")
@click.option("--skipped", type=NumberList(0), help="Mean number of skipped layers.")
@click.option("--max-kl", type=NumberList(0), help="Divergence on the calibration text.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the random kind.")
@click.option("--prefix", type=click.IntRange(min=2), default=16, show_default=True, help="Dense tokens; not drawn.")
@click.option(
    "--tokens", type=click.IntRange(min=1, max=400), default=64, show_default=True, help="Rows: tokens after those."
)
@click.option(
    "-o", "--output", default="skipmap", show_default=True, metavar="NAME", type=click.Path(path_type=Path),
    help="Writes NAME.png and NAME.svg.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, bundle: Path, text: str | None, file: Path | None, target: str | None, kind: str, seed: int,
    prefix: int, tokens: int, output: Path, **dials: Any,
) -> None:  # fmt: skip
    """Draw the skip map of TEXT under a policy: its tokens down, the layers across.

    Each row is a token that goes in; its first --prefix tokens are dense like a prompt and left out. Without a text, the
    calibration text.
    """
    import numpy as np

    from dash_export.commands.pictures import save_pictures
    from dash_export.evaluation.evaluate import read_text
    from dash_export.evaluation.pictures import skip_map_figure  # fails at once where matplotlib is missing
    from dash_export.evaluation.settings import Setting
    from dash_export.resources import resource_folder

    if text is not None and file is not None:
        raise click.UsageError("Give the text or --file, not both.")
    dial, values = dial_of(dials, ("budget", BUDGET))
    if len(values) != 1:
        raise click.UsageError("Give one setting: a skip map shows one.")
    ctx.meta[OUTPUT] = str(output)
    sample = text if text is not None else read_text(file or resource_folder("calibration") / "prose.txt")
    with progress_bar("skipmap") as progress:
        progress("loading", 0, 0)
        setting = Setting("dense") if kind == "dense" else Setting(kind, dial, values[0], seed)
        runtime = load(bundle, target, (kind,))
        session = setting.session(runtime)
        ids = np.array(runtime.text.encode(sample)[: prefix + tokens], np.int64)
        if len(ids) <= prefix:
            raise RequestError(
                f"The text has {len(ids)} tokens, and the first {prefix} are dense: give a longer text or a smaller --prefix."
            )
        actions = session.score(ids, prefix=prefix).actions[prefix:]
    manifest = runtime.bundle.manifest
    pieces = [runtime.text.decode([token]) for token in ids[prefix:].tolist()]
    executed = manifest.model.num_layers - (actions != 0).sum(axis=1).mean()
    title = f"{manifest.model.name}: {setting.label}"
    caption = f"{executed:.1f} of {manifest.model.num_layers} layers run per token, mean over {len(pieces)} tokens"
    figure = skip_map_figure(pieces, actions, manifest.policy.gated, title, caption)
    for path in save_pictures(output, figure):
        click.echo(f"Written to {path}")
    click.echo(caption)
