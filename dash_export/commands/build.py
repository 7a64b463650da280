"""`dash-export build`: compile the engines for a target, and measure their costs on the machine that runs them."""

from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, get_args

import click

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import DEFAULT_TARGET, GGUF_TARGET, LOWERED, MANIFEST, ROUNDINGS, is_bundle
from dash_export.bundle.recipe import Precision, Recipe, load_recipe
from dash_export.bundle.records import Build
from dash_export.bundle.suitable import calibration_minutes, is_in_few_bits, suitable_target
from dash_export.cli import OUTPUT
from dash_export.commands.export import export_model, policy_options, tell_without_policy
from dash_export.commands.options import is_given
from dash_export.commands.progress import progress_bar
from dash_export.commands.tables import files_size, print_units
from dash_export.core.dial import WORTH, recommended_budget
from dash_export.core.units import Unit
from dash_export.files.outputs import REPLACED, work_of

PRECISION = click.Choice(get_args(Precision))


@click.command("build")
@click.argument("source", metavar="BUNDLE|MODEL")
@click.option(
    "--target", default=DEFAULT_TARGET, show_default=f"{DEFAULT_TARGET}; {GGUF_TARGET} for a GGUF file of few bits",
    metavar="NAME|FILE.toml", help="A shipped recipe (`dash-export list` shows them) or the path of one.",
)  # fmt: skip
@click.option(
    "--weights", type=PRECISION,
    help="Precision of the layers. Other parts follow it unless their option is given. A GPU's embedding never does; "
    "with fp8 the head does not.",
)  # fmt: skip
@click.option("--head", type=PRECISION, help="Precision of the head.")
@click.option("--embedding", type=PRECISION, help="Precision of the embedding.")
@click.option(
    "--rounding", type=click.Choice(["nearest", "gptq"]),
    help="How int4 weights are chosen: each the nearest, or calibrated.",
)  # fmt: skip
@click.option("--verify", is_flag=True, help="Compare every engine with its portable graph and keep the result.")
@click.option(
    "--no-portable", is_flag=True,
    help="Delete the portable graphs in the end: engines run without them, another build needs the model again.",
)  # fmt: skip
@click.option("--measure", is_flag=True, help="Measure costs and dial again: on a quieter machine, say.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="BUNDLE",
    help="For a MODEL: the bundle to write; by default NAME.dash here.",
)  # fmt: skip
@policy_options
@click.pass_context
def command(
    ctx: click.Context, /, source: str, target: str, verify: bool, measure: bool, no_portable: bool,
    output: Path | None, policy: str, units: tuple[Unit, ...] | None, prune: tuple[Unit, ...], **changes: Any
) -> None:  # fmt: skip
    """Compile the engines of a bundle for a target, and measure what each unit costs here.

    Given a MODEL it exports first (see `dash-export export` for the policy options). Engines whose inputs are
    unchanged are reused; a build that was killed goes on where it stopped. TensorRT compiles only on the
    device: elsewhere the graphs are lowered. Copy the bundle to the device, and run the same command there.
    """
    from dash_export.backends.maker import backend_of

    folder = Path(source)
    other = any(folder.glob("*.safetensors*")) and not is_bundle(folder)  # a checkpoint beside another manifest.json
    interrupted = not folder.exists() and (work_of(folder) / REPLACED).is_dir()  # a killed export: `open` finishes it
    if folder.suffix == ".dash" or interrupted or ((folder / MANIFEST).is_file() and not other):
        for name in ("output", "policy", "units", "prune"):
            if is_given(ctx, name):
                raise click.UsageError(f"--{name} belongs to a MODEL, and {source} is a bundle.")
        bundle, model = Bundle.open(source), None
        recipe = bundle.recipe(target, **changes)
    else:
        model, recipe = source, load_recipe(target, **changes)
        backend_of(recipe).here()  # refuse impossible requests first: an export takes minutes
        bundle = export_model(ctx, source, output, policy, units, prune)
    from dash_export.building import build

    if not is_given(ctx, "target") and not any(changes.values()):
        target = _suitable(bundle)
    elif recipe.weights.rounding == "gptq" and not recipe.on_device and is_in_few_bits(bundle.manifest):
        _tell_alternative(bundle, recipe)
    ctx.meta[OUTPUT] = str(bundle.root)
    with progress_bar(f"build {target}") as progress:
        how = partial(build, verify=verify, measure=measure, keep_portable=not no_portable, progress=progress)
        made = how(bundle, target, **changes)
    _summary(bundle, made)
    tell_without_policy(bundle, model)


def _suitable(bundle: Bundle) -> str:
    """Return the target for who names none: that which suits how the model is stored, unless the default is built."""
    built = bundle.targets()
    target = DEFAULT_TARGET if DEFAULT_TARGET in built else suitable_target(bundle.manifest)
    if target == GGUF_TARGET not in built:
        click.echo(
            f"--target {GGUF_TARGET}, for the model is stored in few bits: it keeps them, needs no calibration and is "
            f"closer to the file than {DEFAULT_TARGET}, whose tokens take a sixth less time.",
            err=True,
        )
    return target


def _tell_alternative(bundle: Bundle, recipe: Recipe) -> None:
    """Say how long a calibration will take, and what needs none; nothing where one is there."""
    if not bundle.path(f"engines/{recipe.name}/{ROUNDINGS}").exists():
        minutes = calibration_minutes(bundle.manifest.model.parameters)
        click.echo(
            f"Calibrating int4 takes about {minutes} minutes on 2 cores. The model is stored in few bits: "
            f"--target {GGUF_TARGET} keeps these in a fraction of that time, closer to the file; a token takes a sixth "
            "longer.",
            err=True,
        )


def _summary(bundle: Bundle, build: Build) -> None:
    cost = build.cost
    engines, wanted = f"{len(build.engines)} engines, {files_size(build.files)}", build.target.removesuffix(LOWERED)
    if wanted != build.target:
        engines = f"{len(build.engines)} graphs lowered, not compiled, {files_size(build.files)}"
    if not build.files:
        engines = f"{len(build.engines)} portable graphs, used as they are"
    click.echo(f"{bundle.root}/engines/{build.target}: {engines} (all else {files_size(bundle.files)})")
    if build.verification:
        found = {name: each for name, each in build.verification.engines.items() if name in build.engines}
        worst = max((error for errors in found.values() for error in errors.values()), default=0.0)
        click.echo(f"Verified: {len(found)} engines, {build.verification.compared}; largest error {worst:.2g}.")
    if not cost.segment_us:
        from dash_export.backends.maker import backend_of

        obstacle = backend_of(build.recipe).run_obstacle()
        if wanted != build.target:
            click.echo(f"They are compiled on their device only, and here {obstacle}")
            there = f"dash-export build {quote(bundle.root.name)} --target {quote(wanted)}"
            click.echo(f"Copy the bundle to the device (it does not need onnx/), and run there: {there}")
            return
        why = f": {obstacle}" if obstacle else "."
        click.echo(f"For {build.device}. Costs are not measured here{why} `build` measures them where it can.")
        return
    asks = f"; asking the policy adds {added:.1%} ({cost.dispatch})" if (added := cost.dense_asked - 1) else ""
    measure = bundle.manifest.measure
    click.echo(f"Dense: {cost.dense_us / 1000:.2f} ms/{measure.at(cost.context)} on {build.device}{asks}")
    if cost.cost:
        print_units(build, bundle.manifest.policy.units, measure)
    if cost.disturbed:
        click.echo(cost.disturbed, err=True)
    if build.dial:
        fastest = min(point.time for point in build.dial)
        budget, loss = recommended_budget(build.dial, measure), measure.loss
        advice = f"{budget:g} costs about {loss}" if budget else f"none saves {WORTH:.0%} of the time at {loss}: dense"
        dial = f"Dial of the {measure.item} policy: budget 1.0 (dense) down to {fastest:.2f}."
        click.echo(f"{dial} Recommended: {advice}.")
    flag = "" if build.target == DEFAULT_TARGET else f" --target {build.target}"
    click.echo(f"Next: dash-export run {quote(str(bundle.root))}{flag} {measure.example}")
