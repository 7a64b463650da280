"""`dash-export inspect`: what is in a bundle, as tables or as JSON. Needs neither onnx nor a backend."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.recipe import WeightsRecipe
from dash_export.bundle.records import Build, Segment
from dash_export.bundle.suitable import suitable_target
from dash_export.cli import printable
from dash_export.commands.tables import files_size, print_table, print_units, size
from dash_export.core.advice import if_without_policy
from dash_export.core.dial import Measure
from dash_export.core.kinds import kinds_of
from dash_export.core.units import Unit, units_text
from dash_export.errors import StaleBuildError


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Only this build; by default all.")
@click.option("--verify", is_flag=True, help="Also compare every file with its recorded SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(bundle: Path, target: str | None, verify: bool, as_json: bool) -> None:
    """Show a bundle's model, graphs, policy, and per target its engines, sizes and measured costs."""
    opened = Bundle.open(bundle)
    builds, stale = [], []
    for name in [target] if target is not None else opened.targets():
        try:
            builds.append(opened.load_build(name))
        except StaleBuildError as error:
            if target:
                raise
            stale.append(str(error))
    if verify:
        opened.verify(opened.files)
        opened.check_listed(None)
        for build in builds:
            opened.check_listed(build)
            opened.verify(build.files)
    if as_json:
        records = {"manifest": asdict(opened.manifest), "builds": {build.target: asdict(build) for build in builds}}
        # In ASCII, for terminals obey some control characters of a stranger's file.
        click.echo(json.dumps({"bundle": str(opened.root), **records, "stale": stale}))
        return
    _print_bundle(opened)
    if advice := if_without_policy(opened.manifest.model, opened.manifest.policy):
        click.echo(printable(f"{advice}\n"))
    for build in builds:
        _print_build(build, opened.manifest.policy.units, opened.manifest.measure)
    for line in stale:
        click.echo(line)
    if not builds and not stale:
        click.echo(f"Nothing is built yet. Next: {opened.build_command(suitable_target(opened.manifest))}")
    if verify:
        but = ", but for the builds above, which were not looked at" if stale else ""
        click.echo(f"Every file is what was written (SHA-256){but}.")


def _graph_kinds(bundle: Bundle) -> dict[str, list[int]]:
    """Return the bytes of every graph by kind: layer_00 .. layer_29 are one."""
    sizes = {record.name: record.bytes for record in bundle.manifest.files}
    kinds: dict[str, list[int]] = {}
    for name, file in bundle.manifest.graphs.items():
        data = file.removesuffix(".onnx") + ".data"
        kinds.setdefault(name.partition("_")[0], []).append(sizes.get(file, 0) + sizes.get(data, 0))
    return kinds


def precision(weights: WeightsRecipe, segment: Segment) -> str:
    """Return the weights of a segment as the recipe has them: "int4, qkv int8", "embedding int8; int8". With rounding
    "as-is" weights keep the bits of a file, 4 or else 8, so "int4" is shown as "int4 or int8".
    """
    parts = [f"embedding {weights.embedding}"] if segment.embed else []
    if len(segment.layers):
        layers = weights.layers if segment.gated else weights.ungated
        parts.append(layers if layers == weights.qkv or not segment.gated else f"{layers}, qkv {weights.qkv}")
    found = "; ".join(parts + [f"head {weights.head}"] * segment.head)
    return found.replace("int4", "int4 or int8") if weights.rounding == "as-is" else found


def _print_bundle(bundle: Bundle) -> None:
    model, policy = bundle.manifest.model, bundle.manifest.policy
    rows = {
        "model": f"{model.name} ({model.model_type})",
        "parameters": f"{model.parameters / 1e6:.1f} M",
        "layers": f"{model.num_layers} of hidden size {model.hidden_size}",
        **model.sizes(),
        "portable size": files_size(bundle.files),
        "units": f"{units_text(policy.units)} ({len(policy.layers)} layers)",
        "bypass": policy.bypass,
        "policy": policy.origin,
        "drafter": policy.drafter or "none",
        "decides": f"by what enters layer {policy.read}" if policy.has_network else "nothing",
        "serves": ", ".join(kinds_of(policy)),
        "static order": ", ".join(str(policy.units[place]) for place in policy.static_order) or "not ranked",
        "made with": ", ".join(f"{name} {version}" for name, version in bundle.manifest.tools.items()),
    }
    print_table(str(bundle.root), ("", ""), (), rows.items())
    if bundle.has_graphs:
        graphs = ((kind, len(each), size(sum(each))) for kind, each in _graph_kinds(bundle).items())
        print_table("Portable graphs", ("kind",), ("count", "size"), graphs)
    else:
        click.echo("The portable graphs are not here: engines run, and new ones are built after another export.\n")


def _print_build(build: Build, units: Sequence[Unit], measure: Measure) -> None:
    alone, engines = sum(build.cost.segment_us.values()), build.engines

    def row(segment: Segment) -> tuple[str, ...]:
        run = build.cost.segment_us.get(segment.name)
        times = ("-", "-") if run is None or not alone else (f"{run:.0f}", f"{100 * run / alone:.1f} %")
        stored = engines[segment.name].bytes if segment.name in engines else 0
        return segment.name, precision(build.recipe.weights, segment), size(stored), *times

    print_table(
        f"Target {build.target}: {len(engines)} engines, {files_size(build.files)} on disk, {build.backend} "
        f"{build.backend_version}", ("segment", "precision"), ("size", "run µs", "share"), map(row, build.segments),
    )  # fmt: skip
    if units:
        print_units(build, units, measure)
    dense = f"{build.cost.dense_us / 1000:.2f} ms/{measure.at(build.cost.context)}"
    measured = f"Measured on {build.device}: dense {dense}."
    click.echo(measured if build.cost.segment_us else f"For {build.device}; costs not measured.")
    click.echo("Size: what an engine reads of its files. Saved: units of as many layers share a figure.")
    click.echo(build.cost.disturbed and f"{build.cost.disturbed}\n")
    if (passes := build.cost.passes) is not None:
        print_table(
            "Passes of several rows: time over that of one decoded token", (),
            ("cached tokens", *(f"{rows} rows" for rows in passes.rows[1:])),
            ((context, *(f"{time:.2f}" for time in times[1:]))
             for context, times in zip(passes.contexts, passes.times, strict=True)),
        )  # fmt: skip
        if passes.draft:
            click.echo(f"One draft takes {passes.draft:.3f} of a decoded token.\n")
    if build.dial:
        print_table(
            "Dial of the token policy (calibrated)", (),
            ("trade-off", "layers/token", "time vs dense", "KL (nats)", "perplexity vs dense"),
            ((f"{at.trade_off:.4g}", f"{at.layers:.2f}", f"{at.time:.3f}", f"{at.kl:.4f}", f"{at.perplexity:.3f}")
             for at in build.dial),
        )  # fmt: skip
