"""`dash-export train`: train a policy file for a model on text."""

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import click

from dash_export.bundle.policy_file import policy_path
from dash_export.bundle.suitable import target_of_bits
from dash_export.cli import OUTPUT
from dash_export.commands.options import UNITS, is_given
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import print_table
from dash_export.core.units import Unit, parse_units
from dash_export.files.outputs import output_path
from dash_export.train import DRAFTER_EFFORTS, EFFORTS, KINDS, PRECISIONS, DrafterSettings, TrainingSettings

DEFAULTS = TrainingSettings()
_POLICY = click.Path(path_type=Path, dir_okay=False)
_POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command("train")
@click.argument("model")
@click.option(
    "-o", "--output", type=_POLICY, required=True, metavar="NAME.safetensors",
    help="The policy file to write; its card, NAME.json, lies beside it.",
)  # fmt: skip
@click.option("--skips", is_flag=True, help="Train a policy that skips layers, in the place of a drafter.")
@click.option(
    "--effort", type=click.Choice([*EFFORTS]), show_default="quick; with --skips default",
    help="Of a drafter: quick, 15 to 40 minutes; long, a night. Of skips: quick, a policy in minutes, of units by a "
    "rule; long, three times the tuning.",
)  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path), multiple=True, help="Plain text to learn from; repeatable.")
@click.option(
    "--images", type=click.Path(path_type=Path, file_okay=False, exists=True), metavar="DIR",
    help="Of an image encoder: a folder of pictures like those it will see, without labels; 500 are enough.",
)  # fmt: skip
@click.option(
    "--prompts", type=click.Path(path_type=Path), multiple=True, metavar="FILE.jsonl",
    help='Chat prompts ({"prompt": ...} a line) that the model answers itself, to learn from its answers; repeatable. '
    "A drafter's training writes prompts of its own beside them; one of skips without --text and --prompts takes "
    "those that come with this package.",
)  # fmt: skip
@click.option(
    "--kind", type=click.Choice(KINDS), default=KINDS[0], show_default=True,
    help="token: a network that decides for every token. static: fixed sets with bypasses of their own.",
)  # fmt: skip
@click.option(
    "--units", type=UNITS, metavar="UNITS",
    help="What is skipped as one, like 5-7,8-10,13; by default the units that gain most, which are looked for first "
    "(minutes), with --from some of those of the policy.",
)  # fmt: skip
@click.option(
    "--from", "start", type=_POLICY, metavar="NAME|FILE.safetensors",
    help="A trained policy, one of yours or one that comes with this package: a drafter joins its skips. With --skips "
    "go on from it, to tune it further, for other text or for a fine-tune of its model: only the tuning steps are "
    "done, after a fit where units are merged.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), default=DEFAULTS.seed, show_default=True)
@click.option(
    "--steps", type=click.IntRange(min=1), show_default=f"{DEFAULTS.tuning_steps}",
    help="Tuning steps, in the place of the effort's. A training of few steps is short in all its stages.",
)  # fmt: skip
@click.option(
    "--trade-offs", type=(_POSITIVE, _POSITIVE), default=DEFAULTS.trade_offs, show_default=True, metavar="LOW HIGH",
    help="The part of the dial to train for, nats per dense token time.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(16, 8192), default=DEFAULTS.window, show_default=True, help="Tokens per window."
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS),
    help="Of the model while it is trained on; by default bfloat16, but on a CPU without instructions for it float32, "
    "which takes twice the memory.",
)  # fmt: skip
@click.option("--device", default="", help="cpu or cuda; by default cuda where there is one.")
@click.pass_context
def command(
    ctx: click.Context, /, model: str, output: Path, images: Path | None, text: tuple[Path, ...],
    prompts: tuple[Path, ...], kind: str, units: tuple[Unit, ...] | None, start: Path | None, device: str,
    effort: str | None, steps: int | None, skips: bool, **settings: Any
) -> None:  # fmt: skip
    """Train a drafter for MODEL, a small layer that guesses the next tokens, from text that MODEL writes itself. Or,
    with --skips, a skip policy: which units of layers each token can do without, and what to do in their place.

    The model itself stays as it is. A training that was killed goes on where it stopped when the same command is given
    again. A part of the text is not trained on; the card's figures come from there. Under torchrun up to four processes
    share a training of skips, on one machine or on several that see one folder.
    """
    if images is not None:
        _on_images(ctx, model, output, images, units)
        return
    if not skips:
        of_skips = ("kind", "units", "steps", "trade_offs", "window")
        if other := [name for name in of_skips if is_given(ctx, name)]:
            raise click.UsageError(f"--{other[0].replace('_', '-')} is of a training of skips: give --skips, too.")
        _drafter(ctx, model, output, text, prompts, start, device, effort or "quick", settings)
        return
    from dash_export.train.processes import rank
    from dash_export.train.training import train

    if is_given(ctx, "trade_offs") and kind == "static" and (start or units) is not None:
        raise click.UsageError("a static policy of given units takes no --trade-offs: leave it out.")
    ctx.meta[OUTPUT] = f"{output}.unfinished"
    with progress_bar("train") as progress:
        chosen = replace(TrainingSettings.of(effort or "default"), **settings)
        if steps:
            chosen = replace(chosen, tuning_steps=steps).shortened()
        train(
            model, output, text, prompts,
            kind=kind, units=units, start=start, settings=chosen, device=device,
            planned=lambda plan: click.echo(f"train: {plan}", err=True), progress=progress,
        )  # fmt: skip
    if rank() == 0:  # of several processes the first one writes
        _summary(model, output_path(output))  # a link is followed, as `train` follows it


def _drafter(
    ctx: click.Context, model: str, output: Path, text: tuple[Path, ...], prompts: tuple[Path, ...],
    start: Path | None, device: str, effort: str, settings: dict[str, Any]
) -> None:  # fmt: skip
    """Train a drafter, and say what it does on held-out answers."""
    from dash_export.train.drafter_training import train_drafter

    if effort not in DRAFTER_EFFORTS:
        raise click.UsageError(f"--effort {effort} is of a training of skips: give --skips, too.")
    ctx.meta[OUTPUT] = f"{output}.unfinished"
    chosen = {name: settings[name] for name in ("seed", "precision")}
    with progress_bar("train") as progress:
        train_drafter(
            model, output, text, prompts, start=start and policy_path(start),
            settings=replace(DrafterSettings.of(effort), **chosen), device=device,
            planned=lambda plan: click.echo(f"train: {plan}", err=True), progress=progress,
        )  # fmt: skip
    path = output_path(output)
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    held = card["held_out"]
    print_table(
        f"Held out: {held['tokens']} tokens of answers, {held['covered']:.1%} of them in the short vocabulary",
        ("drafts",), ("all right",), ((depth, f"{share:.1%}") for depth, share in enumerate(held["accepted"], 1)),
    )  # fmt: skip
    _next(model, path, card)


def _next(model: str, output: Path, card: dict[str, Any]) -> None:
    took = "" if card["seconds"] is None else f", {card['seconds'] / 60:.0f} minutes"
    click.echo(f"{output} (card: {output.with_suffix('.json')}){took}")
    target = target_of_bits(card["model_bits"])
    click.echo(f"Next: dash-export build {quote(model)} --policy {quote(str(output))} --target {target}")


def _on_images(ctx: click.Context, model: str, output: Path, images: Path, units: tuple[Unit, ...] | None) -> None:
    """Train a policy for an image encoder. Raises UsageError for options of a training on text."""
    from dash_export.images.sources import image_files
    from dash_export.train.image_policy import train_on_images

    taken = {"model", "output", "images", "units"}
    other = [name for name in ctx.params if name not in taken and is_given(ctx, name)]
    if other:
        raise click.UsageError(f"--{other[0].replace('_', '-')} is of a training on text: --images takes --units only.")
    ctx.meta[OUTPUT] = f"{output}.unfinished"
    with progress_bar("train") as progress:
        train_on_images(model, output, image_files(images), units=units, progress=progress)
    path = output_path(output)
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    print_table(
        f"Held out: {card['pictures']['held_out']} pictures, {card['held_out']['guarded']:.1%} guarded",
        ("all leave before layer",), ("cosine with dense", "worst"),
        ((at["before"], f"{1 - at['divergence']:.4f}", f"{1 - at['worst']:.3f}") for at in card["held_out"]["exits"]),
    )  # fmt: skip
    click.echo(f"{path} (card: {path.with_suffix('.json')}), {card['seconds'] / 60:.0f} minutes")
    click.echo(f"Next: dash-export build {quote(model)} --policy {quote(str(path))} --target portable")


def _summary(model: str, output: Path) -> None:
    card = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    if card["chosen"]:
        print_table(
            "Units, by what skipping each alone costs", ("unit",), ("layers", "KL alone (nats)", "saved", "gain"),
            (
                (row["unit"], len(parse_units(row["unit"])[0].layers), f"{row['damage']:.4f}", f"{row['saved']:.1%}",
                 f"{row['gain']:.1%}")
                for row in card["chosen"]
            ),
        )  # fmt: skip
    if left := [row["unit"] for row in card["chosen"] if row["unit"] not in card["units"].split(",")]:
        click.echo(f"Left out after the tuning, for they gain less than their engines cost: {', '.join(left)}.")
    for part in [part for part in card["held_out"] if part != "tokens"]:
        judged = card["held_out"][part]
        print_table(
            f"Held out: {part}, {judged['judged']} tokens", ("setting",), ("skipped", "KL (nats)", "top-1", "nll"),
            (
                (row["setting"], f"{row['skipped']:.2f}", f"{row['kl']:.4f}", f"{row['top1']:.3f}", f"{row['nll']:.3f}")
                for row in judged["figures"]
            ),
        )  # fmt: skip
    _next(model, output, card)
