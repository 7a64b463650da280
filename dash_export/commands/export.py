"""`dash-export export`: a model to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from dash_export.artifacts import Progress
from dash_export.bundle import Bundle
from dash_export.cli import OUTPUT
from dash_export.commands.common import LayerList, bundle_bytes, size
from dash_export.commands.progress import progress_bar
from dash_export.decision import spans

POLICY_WIDTH = 64
_Command = TypeVar("_Command", bound=Callable[..., Any])


def policy_options(command: _Command) -> _Command:
    """The options that say which skip policy goes into a new bundle."""
    options = (
        click.option(
            "--policy",
            type=click.Choice(["none", "untrained"]),
            default="none",
            show_default=True,
            help="none: dense and static skipping only. untrained: a random network, to measure and to test.",
        ),
        click.option(
            "--gated",
            type=LayerList(),
            metavar="LAYERS",
            help="Layers that may be skipped, like 2-28 or 3,5-9; by default all but the first two and the last.",
        ),
        click.option("--seed", type=int, help="Seed of the untrained policy (0)."),
        click.option(
            "--width",
            type=click.IntRange(0, 65536),
            help=f"Hidden units of the untrained policy; 0: linear ({POLICY_WIDTH}).",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command("export")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="The bundle to write; by default NAME.dash here.",
)
@policy_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    output: Path | None,
    policy: str,
    gated: tuple[int, ...] | None,
    seed: int | None,
    width: int | None,
) -> None:
    """Write the ONNX graphs of MODEL, one per layer, as a bundle.

    MODEL is a Hugging Face folder, a .gguf file or a hub id (org/name). An export that was killed goes on where it
    stopped; one that is already there is left alone.
    """
    bundle = export_model(ctx, model, output, policy, gated, seed, width)
    _summary(bundle)


def export_model(
    ctx: click.Context,
    model: str,
    output: Path | None,
    policy: str,
    gated: tuple[int, ...] | None,
    seed: int | None,
    width: int | None,
) -> Bundle:
    """Export with a progress bar; `build` calls it too. Raises UsageError and the library's errors."""
    if policy == "none" and not (seed is None and width is None):
        raise click.UsageError("--seed and --width belong to --policy untrained.")
    output = output or default_output(model)
    ctx.meta[OUTPUT] = str(output)
    with progress_bar("export") as progress:
        width = POLICY_WIDTH if width is None else width
        return export_with_policy(model, output, policy, gated, seed or 0, width, progress)


def export_with_policy(
    model: str, output: Path, policy: str, gated: tuple[int, ...] | None, seed: int, width: int, progress: Progress
) -> Bundle:
    from dash_export.exporting import export
    from dash_export.models import open_checkpoint
    from dash_export.skip_policy import no_policy, untrained_policy

    progress(f"reading {model}", 0, 0)
    checkpoint = open_checkpoint(model)
    if policy == "untrained":
        chosen = untrained_policy(checkpoint.spec, gated, width, seed)
    else:
        chosen = no_policy(checkpoint.spec.num_layers, gated)
    return export(checkpoint, output, chosen, progress)


def default_output(model: str) -> Path:
    """`org/SmolLM2`, `models/SmolLM2/`, `SmolLM2.gguf` -> `SmolLM2.dash`."""
    path = Path(model)
    name = path.resolve().name if path.exists() else path.name
    return Path(f"{name.removesuffix('.gguf')}.dash")


def _summary(bundle: Bundle) -> None:
    manifest = bundle.manifest
    policy = manifest.policy.origin if manifest.policy.has_network else "none (dense and static skipping)"
    counts = f"{manifest.model.num_layers} layers, {len(manifest.graphs)} graphs"
    click.echo(f"{bundle.root}: {counts}, {size(bundle_bytes(bundle))}")
    click.echo(f"Layers that may be skipped: {spans(manifest.policy.gated)}. Token policy: {policy}.")
    click.echo(f"Next: dash-export build {bundle.root} --target cpu")
