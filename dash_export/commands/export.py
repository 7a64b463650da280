"""`dash-export export`: a model to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from dash_export.artifacts import Progress
from dash_export.bundle import Bundle
from dash_export.cli import OUTPUT
from dash_export.commands.common import UnitList, bundle_bytes, size
from dash_export.commands.progress import progress_bar
from dash_export.decision import Unit, units_text

if TYPE_CHECKING:
    from dash_export.models import Checkpoint, DecoderSpec
    from dash_export.policy import SkipPolicy

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class PolicyOptions:
    """Which skip policy goes into a new bundle (`none`, `untrained` or a trained one's name or path), and which units
    of it; None: all. `prune`: instead of that, the units of it that the model is to be without.
    """

    policy: str = "none"
    units: tuple[Unit, ...] | None = None
    prune: tuple[Unit, ...] = ()

    @property
    def trained(self) -> bool:
        """Whether it is read from a file."""
        return self.policy not in ("none", "untrained")

    def load(self, spec: DecoderSpec) -> SkipPolicy:
        """Raises PolicyError when the file is damaged or for another model, or where it has no such units."""
        from dash_export.policy import load_policy, narrowed, no_policy, untrained_policy

        if not self.trained:
            none = self.policy == "none"
            return no_policy(spec.num_layers, self.units) if none else untrained_policy(spec, self.units)
        trained = load_policy(self.policy, spec)
        return trained if self.units is None else narrowed(trained, (n for unit in self.units for n in unit.layers))


def policy_options(command: _Command) -> _Command:
    """Adds the options that say which policy goes into a new bundle; they arrive as one argument `options`."""

    @wraps(command)
    def packed(*args: Any, **given: Any) -> Any:
        options = PolicyOptions(given.pop("policy"), given.pop("units"), given.pop("prune"))
        return command(*args, options=options, **given)

    options = (
        click.option(
            "--policy",
            default="none",
            show_default=True,
            metavar="none|untrained|NAME|FILE.safetensors",
            help="none: dense and static skipping only. untrained: a random network, to measure and to test. NAME: a "
            "trained policy that comes with this package. FILE: one of yours.",
        ),
        click.option(
            "--units",
            type=UnitList(),
            metavar="UNITS",
            help="The layers that are skipped as one, like 5-7,8-10,13, or none; by default all units of a trained "
            "policy, else units of about four layers.",
        ),
        click.option(
            "--prune",
            type=UnitList(),
            default=(),
            metavar="UNITS",
            help="Leave these units of the trained policy out for good, their bypasses in their place: a smaller "
            "model, without a policy.",
        ),
    )
    for option in reversed(options):
        packed = option(packed)
    return cast(_Command, packed)


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
def command(ctx: click.Context, model: str, output: Path | None, options: PolicyOptions) -> None:
    """Write the ONNX graphs of MODEL, one per layer and one per bypass of a unit, as a bundle.

    MODEL is a Hugging Face folder, a .gguf file or a hub id (org/name). An export that was killed goes on where it
    stopped; one that is already there is left alone.
    """
    _summary(export_model(ctx, model, output, options))


def export_model(ctx: click.Context, model: str, output: Path | None, options: PolicyOptions) -> Bundle:
    """Export with a progress bar; `build` calls it too."""
    if options.prune and not (options.trained and options.units is None):
        raise click.UsageError("--prune takes units out by a trained --policy, and leaves none for --units.")
    output = output or default_output(model, options.prune)
    ctx.meta[OUTPUT] = str(output)
    with progress_bar("export") as progress:
        return export_with_policy(model, output, options, progress)


def export_with_policy(model: str | Checkpoint, output: Path, options: PolicyOptions, progress: Progress) -> Bundle:
    from dash_export.exporting import check_inputs, export
    from dash_export.models import open_checkpoint
    from dash_export.models.bypasses import pruned
    from dash_export.outputs import named
    from dash_export.policy import no_policy, policy_path

    if options.trained:
        check_inputs([policy_path(options.policy)], named(output))
    if isinstance(model, str):
        progress(f"reading {model}", 0, 0)
        model = open_checkpoint(model)
    policy = options.load(model.spec)
    if options.prune:
        model = pruned(model, policy, options.prune)
        policy = no_policy(model.spec.num_layers, ())
    return export(model, output, policy, progress)


def default_output(model: str, prune: Sequence[Unit] = ()) -> Path:
    """`org/SmolLM2`, `models/SmolLM2/`, `SmolLM2.gguf` -> `SmolLM2.dash`; pruned `SmolLM2-without-13-18.dash`."""
    path = Path(model)
    name = path.resolve().name if path.exists() else path.name
    without = f"-without-{units_text(prune)}" if prune else ""
    return Path(f"{name.removesuffix('.gguf')}{without}.dash")


def _summary(bundle: Bundle) -> None:
    manifest = bundle.manifest
    policy = manifest.policy.origin if manifest.policy.has_network else "none (dense and static skipping)"
    counts = f"{manifest.model.num_layers} layers, {len(manifest.graphs)} graphs"
    click.echo(f"{bundle.root}: {counts}, {size(bundle_bytes(bundle))}")
    click.echo(f"Units: {units_text(manifest.policy.units)}. Token policy: {policy}.")
    click.echo(f"Next: dash-export build {bundle.root} --target cpu")
