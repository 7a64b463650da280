"""`dash-export export`: write a model as a bundle of ONNX graphs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.suitable import suitable_target
from dash_export.cli import OUTPUT, printable
from dash_export.commands.options import UNITS, with_options
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import files_size
from dash_export.core.advice import if_without_policy
from dash_export.core.facts import ModelFacts
from dash_export.core.units import Unit, units_text
from dash_export.errors import BundleError

_Command = TypeVar("_Command", bound=Callable[..., Any])


def policy_options(command: _Command) -> _Command:
    """Add --policy, --units and --prune, which choose the policy of a new bundle."""
    return with_options(
        command,
        click.option(
            "--policy", default="none", show_default=True, metavar="none|untrained|NAME|FILE.safetensors",
            help="none: dense and static skipping only. untrained: a random network, to measure and to test. NAME: a "
            "trained policy that comes with this package. FILE: one of yours.",
        ),
        click.option(
            "--units", type=UNITS, metavar="UNITS",
            help="The layers that are skipped as one, like 5-7,8-10,13, or none; by default all units of a trained "
            "policy, else units of about four layers.",
        ),
        click.option(
            "--prune", type=UNITS, default=(), metavar="UNITS",
            help="Leave these units of the trained policy out for good, their bypasses in their place: a smaller "
            "model, without a policy.",
        ),
    )  # fmt: skip


@click.command("export")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="BUNDLE",
    help="The bundle to write; by default NAME.dash here.",
)  # fmt: skip
@policy_options
@click.pass_context
def command(ctx: click.Context, /, model: str, output: Path | None, **policy: Any) -> None:
    """Write the ONNX graphs of MODEL, one per layer and one per bypass of a unit, as a bundle.

    MODEL is a Hugging Face folder, a .gguf file or a hub id (org/name). An export that was killed goes on where it
    stopped; one that is already there is left alone.
    """
    bundle = export_model(ctx, model, output, **policy)
    manifest = bundle.manifest
    token = manifest.policy.origin if manifest.policy.has_network else "none (dense and static skipping)"
    counts = f"{manifest.model.num_layers} layers, {len(manifest.graphs)} graphs"
    click.echo(f"{bundle.root}: {counts}, {files_size(manifest.files)}")
    click.echo(f"Units: {units_text(manifest.policy.units)}. Token policy: {token}.")
    click.echo(f"Next: {bundle.build_command(suitable_target(manifest))}")
    tell_without_policy(bundle, model)


def tell_without_policy(bundle: Bundle, model: str | None) -> None:
    """Print how a bundle that has no policy gets one. `model`: as the user gave it; None where that is not known."""
    if advice := if_without_policy(bundle.manifest.model, bundle.manifest.policy, model):
        click.echo(printable(advice))


def export_model(
    ctx: click.Context, source: str, output: Path | None, policy: str, units: tuple[Unit, ...] | None,
    prune: tuple[Unit, ...]
) -> Bundle:  # fmt: skip
    """Export a model with a progress bar; `dash-export build` calls this too. Raises PolicyError when the policy's file
    is damaged, is for another model or does not have the given units.
    """
    from dash_export.building.exporting import check_inputs, checked_output, export
    from dash_export.bundle.policy_file import load_policy, policy_path
    from dash_export.core.policy import narrowed, no_policy, untrained_policy
    from dash_export.models import Checkpoint, open_model
    from dash_export.models.bypasses import pruned

    trained = policy not in ("none", "untrained")
    if prune and (not trained or units is not None):
        raise click.UsageError("--prune takes units out by a trained --policy, and leaves none for --units.")
    named, output = output is not None, output or default_output(source, prune)
    ctx.meta[OUTPUT] = str(output)
    with progress_bar("export") as progress:
        output = checked_output(output)  # before the model is fetched and read
        if trained:
            check_inputs([policy_path(policy)], output)
        progress(f"reading {source}", 0, 0)
        model = open_model(source)
        if not trained and units is None and model.spec.decides == "input":
            units = ()  # an exit has nothing to say that was not trained
        if policy == "none":
            chosen = no_policy(model.spec.num_layers, units)
        elif policy == "untrained":
            chosen = untrained_policy(model.spec, units)
        else:
            chosen = load_policy(policy, model.spec)
            chosen = chosen if units is None else narrowed(chosen, (n for unit in units for n in unit.layers))
        if prune:
            if not isinstance(model, Checkpoint):
                raise click.UsageError("--prune is for causal LMs.")
            model = pruned(model, chosen, prune)
            chosen = no_policy(model.spec.num_layers, ())
        if not named:
            _refuse_another(output, model.spec)
        return export(model, output, chosen, progress)


def _refuse_another(output: Path, asked: ModelFacts) -> None:
    """Raise BundleError where a bundle of another architecture lies at a name that nobody has given."""
    try:
        known = Bundle.open(output).manifest.model
    except BundleError:
        return  # none, or a damaged one, which is made anew
    if any(getattr(known, fact) != getattr(asked, fact) for fact in ("model_type", "num_layers", "parameters")):
        raise BundleError(
            f"{output} is a bundle of another model ({known.model_type}, {known.parameters:,} parameters): "
            "choose another output (-o) or remove it."
        )


def default_output(model: str, prune: Sequence[Unit] = ()) -> Path:
    """Name a bundle: `org/M`, `models/M/`, `M.gguf` -> `M.dash`; with units pruned `M-without-13-18.dash`."""
    path = Path(model)
    name = path.resolve().name if path.exists() else path.name
    without = f"-without-{units_text(prune)}" if prune else ""
    return Path(f"{name.removesuffix('.gguf')}{without}.dash")
