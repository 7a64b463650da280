"""`dash-export skipmap`: which layers each token of a text skips, as a picture."""

from dataclasses import replace
from pathlib import Path

import click

from dash_export.commands.options import TARGET, load_runtime, setting_options
from dash_export.commands.reports import picture_files, save_pictures, sole_writer
from dash_export.core.kinds import Setting
from dash_export.errors import RequestError

DEFAULT = Setting("token", budget=0.85)


@click.command("skipmap")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Take the text from a file.")
@TARGET
@setting_options
@click.option("--prefix", type=click.IntRange(min=2), default=16, show_default=True, help="Dense tokens; not drawn.")
@click.option("--tokens", type=click.IntRange(1, 400), default=64, show_default=True, help="Rows: tokens after those.")
@click.option(
    "-o", "--output", default="skipmap", show_default=True, metavar="NAME", type=click.Path(path_type=Path),
    help="Writes NAME.png and NAME.svg.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, bundle: Path, text: str | None, file: Path | None, target: str | None, setting: Setting,
    prefix: int, tokens: int, output: Path
) -> None:  # fmt: skip
    """Draw the skip map of TEXT under a policy (by default token at budget 0.85): its tokens down, the layers across.

    Each row is a token that goes in; the first --prefix tokens are dense like a prompt and left out. Without a text,
    the calibration text.
    """
    import numpy as np

    from dash_export.files.resources import resource_folder
    from dash_export.measure.candidates import label
    from dash_export.measure.pictures import layers_run, skip_map_figure  # fails at once where matplotlib is missing
    from dash_export.text.text_files import read_text
    from dash_export.text.tokenizer import LETTERS

    if text is not None and file is not None:
        raise click.UsageError("Give the text or --file, not both.")
    setting = replace(DEFAULT, hold=setting.hold) if setting.policy is None and not setting.given else setting
    files = picture_files(output, "png", "svg")
    with sole_writer(ctx, *files):
        if text is None:
            text = read_text(file or resource_folder("calibration") / "prose.txt", pipe=True)
        runtime = load_runtime(bundle, target)
        session = runtime.session_with(setting)
        wanted = prefix + tokens
        ids = np.array(runtime.text.encode(text[: LETTERS * wanted])[:wanted], np.int64)  # a long file is cut first
        if len(ids) <= prefix:
            raise RequestError(
                f"The text has {len(ids)} tokens, and the first {prefix} are dense: give more text or a smaller "
                "--prefix."
            )
        actions = session.score(ids, prefix=prefix).actions[prefix:]
        pieces = [runtime.text.decode([token]) for token in ids[prefix:].tolist()]
        manifest = runtime.bundle.manifest
        figure = skip_map_figure(pieces, actions, manifest.policy.units, f"{manifest.model.name}: {label(setting)}")
        for path in save_pictures(files, figure):
            click.echo(f"Written to {path}")
        click.echo(layers_run(actions))
