"""`dash-export inspect`: what is in a bundle, as tables or as JSON. Needs neither onnx nor a backend."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dash_export.build_record import Build, Segment
from dash_export.bundle import Bundle
from dash_export.commands.common import (
    build_bytes,
    bundle_bytes,
    plain_table,
    print_table,
    result_console,
    size,
    units_table,
)
from dash_export.commands.onnx_header import opsets
from dash_export.decision import Unit, units_text
from dash_export.errors import BundleError, StaleBuildError
from dash_export.targets import WeightsRecipe, recipe_from_dict


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Only this build; by default all.")
@click.option("--verify", is_flag=True, help="Also compare every file with its recorded SHA-256.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(bundle: Path, target: str | None, verify: bool, as_json: bool) -> None:
    """Show a bundle's model, graphs, policy, and per target its engines, sizes and measured costs."""
    opened = Bundle.open(bundle)
    builds, stale = [], []
    for name in [target] if target else opened.targets():
        try:
            builds.append(opened.load_build(name))
        except StaleBuildError as error:
            if target:
                raise
            stale.append(str(error))
    if verify:
        here = opened.has_graphs
        opened.verify(record for record in opened.manifest.files if here or not record.name.startswith("onnx/"))
        opened.check_listed(None)
        for build in builds:
            opened.check_listed(build)
            opened.verify(build.files)
    facts = describe(opened, builds) | {"stale": stale}
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    _print_bundle(opened, facts)
    for build in builds:
        _print_build(build, opened.manifest.policy.units, facts["builds"][build.target])
    for line in stale:
        click.echo(line)
    if not builds and not stale:
        click.echo(f"Nothing is built yet. Next: dash-export build {bundle} --target cpu")
    if verify:
        but = ", but for the builds above, which were not looked at" if stale else ""
        click.echo(f"Every file is what was written (SHA-256){but}.")


def describe(bundle: Bundle, builds: list[Build]) -> dict[str, Any]:
    """Everything the tables show, as plain data."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "bytes": bundle_bytes(bundle),
        "model": asdict(manifest.model),
        "policy": asdict(manifest.policy) | {"kinds": manifest.policy.kinds},
        "graphs": graph_kinds(bundle) if bundle.has_graphs else [],
        "tools": manifest.tools,
        "key": manifest.key,
        "builds": {build.target: _describe_build(build, manifest.policy.units) for build in builds},
    }


def graph_kinds(bundle: Bundle) -> list[dict[str, Any]]:
    """The graphs by kind: layer_00 .. layer_29 are one row."""
    sizes = {record.name: record.bytes for record in bundle.manifest.files}
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"count": 0, "bytes": 0, "opset": {}})
    for name, file in bundle.manifest.graphs.items():
        row = rows[name.partition("_")[0]]
        row["count"] += 1
        row["bytes"] += sizes.get(file, 0) + sizes.get(file.removesuffix(".onnx") + ".data", 0)
        if not row["opset"]:
            try:
                row["opset"] = {domain or "ai.onnx": version for domain, version in opsets(bundle.path(file)).items()}
            except (OSError, ValueError) as error:
                raise BundleError(
                    f"{bundle.root}: {file} cannot be read ({error}). The bundle is damaged: export it again."
                ) from error
    return [{"kind": kind, **row} for kind, row in rows.items()]


def _describe_build(build: Build, units: Sequence[Unit]) -> dict[str, Any]:
    recipe = recipe_from_dict(build.recipe, f"the recipe recorded in the build for {build.target}")
    return {
        "backend": f"{build.backend} {build.backend_version}",
        "device": build.device,
        "recipe": recipe.as_dict(),
        "bytes": build_bytes(build),
        "engines": len(build.engines),
        "context": build.cost.context,
        "dense_us": build.cost.dense_us,
        "segments": [_segment(build, recipe.weights, segment) for segment in build.segments],
        "units": [_unit(build, place, unit) for place, unit in enumerate(units)],
        "others": build.cost.others,
        "stolen": build.cost.stolen,
        "dial": [asdict(point) for point in build.dial],
        "seconds": build.seconds,
    }


def _segment(build: Build, weights: WeightsRecipe, segment: Segment) -> dict[str, Any]:
    engine = build.engines.get(segment.name)
    return {
        "name": segment.name,
        "gated": segment.gated,
        "precision": precision(weights, segment),
        "bytes": engine.bytes if engine else 0,
        "run_us": build.cost.segment_us.get(segment.name),
    }


def _unit(build: Build, place: int, unit: Unit) -> dict[str, Any]:
    return {
        "unit": str(unit),
        "layers": len(unit.layers),
        "bypass_bytes": build.engines[unit.bypass].bytes,
        "bypass_us": build.cost.bypass_us.get(unit.bypass),
        "cost": build.cost.cost[place],
    }


def precision(weights: WeightsRecipe, segment: Segment) -> str:
    """What the recipe says of a segment's weights: "int4, qkv int8", "embedding int8; int8"."""
    parts = []
    if segment.embed:
        parts.append(f"embedding {weights.embedding}")
    if len(segment.layers):
        layers = weights.layers if segment.gated else weights.ungated
        parts.append(layers if layers == weights.qkv or not segment.gated else f"{layers}, qkv {weights.qkv}")
    if segment.head:
        parts.append(f"head {weights.head}")
    return "; ".join(parts)


def _print_bundle(bundle: Bundle, facts: dict[str, Any]) -> None:
    model, policy = bundle.manifest.model, bundle.manifest.policy
    table = plain_table(f"{bundle.root}", "", "")
    table.show_header = False
    for name, value in (
        ("model", f"{model.name} ({model.model_type})"),
        ("parameters", f"{model.parameters / 1e6:.1f} M"),
        ("layers", f"{model.num_layers} of hidden size {model.hidden_size}"),
        ("attention", f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} for K and V"),
        ("vocabulary", f"{model.vocab_size}"),
        ("context", f"{model.max_positions} positions"),
        ("portable size", size(facts["bytes"])),
        ("units", f"{units_text(policy.units)} ({len(policy.layers)} layers)"),
        ("bypass", policy.bypass),
        ("policy", policy.origin),
        ("decides", f"by what enters layer {policy.read}" if policy.has_network else "nothing"),
        ("serves", ", ".join(policy.kinds)),
        ("static order", ", ".join(str(policy.units[place]) for place in policy.static_order) or "not ranked"),
        ("made with", ", ".join(f"{name} {version}" for name, version in facts["tools"].items())),
    ):
        table.add_row(name, value)
    graphs = plain_table("Portable graphs", "kind", "count", "size", "opset", right=("count", "size"))
    for row in facts["graphs"]:
        opset = ", ".join(f"{domain} {version}" for domain, version in row["opset"].items())
        graphs.add_row(row["kind"], str(row["count"]), size(row["bytes"]), opset)
    console = result_console()
    print_table(console, table)
    if facts["graphs"]:
        print_table(console, graphs)
    else:
        click.echo("The portable graphs are not here: engines run, and new ones are built elsewhere.\n")


def _print_build(build: Build, units: Sequence[Unit], facts: dict[str, Any]) -> None:
    numbers = ("size", "run µs", "share")
    title = f"Target {build.target}: {facts['engines']} engines, {size(facts['bytes'])} on disk, {facts['backend']}"
    table = plain_table(title, "segment", "precision", *numbers, right=numbers)
    alone = sum(build.cost.segment_us.values())
    for row in facts["segments"]:
        run = row["run_us"]
        times = ("-", "-") if run is None or not alone else (f"{run:.0f}", f"{100 * run / alone:.1f} %")
        table.add_row(row["name"], row["precision"], size(row["bytes"]), *times)
    console = result_console()
    print_table(console, table)
    if units:
        print_table(console, units_table(build, units))
    dense = f"{build.cost.dense_us / 1000:.2f} ms/token at {build.cost.context} cached tokens"
    measured = bool(build.cost.segment_us)
    click.echo(
        f"Measured on {build.device}: dense {dense}." if measured else f"For {build.device}; costs not measured."
    )
    click.echo(
        "Size: what an engine reads of its files. Saved: units of as many layers share a figure.\n"
        + (build.cost.disturbed and f"{build.cost.disturbed}\n")
    )
    if build.dial:
        columns = ("trade-off", "layers/token", "time vs dense", "KL (nats)")
        table = plain_table("Dial of the token policy (calibrated)", *columns, right=columns)
        for point in build.dial:
            table.add_row(f"{point.trade_off:.4g}", f"{point.layers:.2f}", f"{point.time:.3f}", f"{point.kl:.4f}")
        print_table(console, table)
