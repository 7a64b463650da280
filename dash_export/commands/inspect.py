"""`dash-export inspect`: what is in a bundle, as tables or as JSON. Needs neither onnx nor a backend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dash_export.bundle import Bundle
from dash_export.commands.tables import build_bytes, bundle_bytes, print_table, print_units, size
from dash_export.decision import Unit, units_text
from dash_export.errors import StaleBuildError
from dash_export.manifest import Build, Segment
from dash_export.targets import WeightsRecipe


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
        _verify(opened, builds)
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


def _verify(bundle: Bundle, builds: list[Build]) -> None:
    files = bundle.manifest.files
    bundle.verify(record for record in files if bundle.has_graphs or not record.name.startswith("onnx/"))
    bundle.check_listed(None)
    for build in builds:
        bundle.check_listed(build)
        bundle.verify(build.files)


def describe(bundle: Bundle, builds: list[Build]) -> dict[str, Any]:
    """Return everything the tables show, as plain data."""
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
    """Return the graphs by kind, each with count and bytes: layer_00 .. layer_29 are one row."""
    sizes = {record.name: record.bytes for record in bundle.manifest.files}
    rows: dict[str, dict[str, Any]] = {}
    for name, file in bundle.manifest.graphs.items():
        row = rows.setdefault(kind := name.partition("_")[0], {"kind": kind, "count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += sizes.get(file, 0) + sizes.get(file.removesuffix(".onnx") + ".data", 0)
    return list(rows.values())


def _describe_build(build: Build, units: Sequence[Unit]) -> dict[str, Any]:
    engines, cost = build.engines, build.cost
    return {
        "backend": f"{build.backend} {build.backend_version}",
        "device": build.device,
        "recipe": asdict(build.recipe),
        "bytes": build_bytes(build),
        "engines": len(engines),
        "context": cost.context,
        "dense_us": cost.dense_us,
        "segments": [
            {
                "name": segment.name,
                "gated": segment.gated,
                "precision": precision(build.recipe.weights, segment),
                "bytes": engines[segment.name].bytes if segment.name in engines else 0,
                "run_us": cost.segment_us.get(segment.name),
            }
            for segment in build.segments
        ],
        "units": [
            {
                "unit": str(unit),
                "layers": len(unit.layers),
                "bypass_bytes": engines[unit.bypass].bytes,
                "bypass_us": cost.bypass_us.get(unit.bypass),
                "cost": saved,
            }
            for unit, saved in zip(units, cost.cost, strict=True)
        ],
        "others": cost.others,
        "stolen": cost.stolen,
        "dial": [asdict(point) for point in build.dial],
        "seconds": build.seconds,
    }


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


def _print_bundle(bundle: Bundle, facts: dict[str, Any]) -> None:
    model, policy = bundle.manifest.model, bundle.manifest.policy
    rows = {
        "model": f"{model.name} ({model.model_type})",
        "parameters": f"{model.parameters / 1e6:.1f} M",
        "layers": f"{model.num_layers} of hidden size {model.hidden_size}",
        "attention": f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} for K and V",
        "vocabulary": model.vocab_size,
        "context": f"{model.max_positions} positions",
        "portable size": size(facts["bytes"]),
        "units": f"{units_text(policy.units)} ({len(policy.layers)} layers)",
        "bypass": policy.bypass,
        "policy": policy.origin,
        "decides": f"by what enters layer {policy.read}" if policy.has_network else "nothing",
        "serves": ", ".join(policy.kinds),
        "static order": ", ".join(str(policy.units[place]) for place in policy.static_order) or "not ranked",
        "made with": ", ".join(f"{name} {version}" for name, version in facts["tools"].items()),
    }
    print_table(str(bundle.root), ("", ""), (), rows.items())
    if facts["graphs"]:
        graphs = ((row["kind"], row["count"], size(row["bytes"])) for row in facts["graphs"])
        print_table("Portable graphs", ("kind",), ("count", "size"), graphs)
    else:
        click.echo("The portable graphs are not here: engines run, and new ones are built elsewhere.\n")


def _print_build(build: Build, units: Sequence[Unit], facts: dict[str, Any]) -> None:
    alone = sum(build.cost.segment_us.values())

    def times(run: float | None) -> tuple[str, str]:
        return ("-", "-") if run is None or not alone else (f"{run:.0f}", f"{100 * run / alone:.1f} %")

    print_table(
        f"Target {build.target}: {facts['engines']} engines, {size(facts['bytes'])} on disk, {facts['backend']}",
        ("segment", "precision"), ("size", "run µs", "share"),
        ((row["name"], row["precision"], size(row["bytes"]), *times(row["run_us"])) for row in facts["segments"]),
    )  # fmt: skip
    if units:
        print_units(build, units)
    dense = f"{build.cost.dense_us / 1000:.2f} ms/token at {build.cost.context} cached tokens"
    measured = f"Measured on {build.device}: dense {dense}."
    click.echo(measured if build.cost.segment_us else f"For {build.device}; costs not measured.")
    click.echo("Size: what an engine reads of its files. Saved: units of as many layers share a figure.")
    click.echo(build.cost.disturbed and f"{build.cost.disturbed}\n")
    if build.dial:
        print_table(
            "Dial of the token policy (calibrated)", (),
            ("trade-off", "layers/token", "time vs dense", "KL (nats)", "perplexity vs dense"),
            ((f"{at.trade_off:.4g}", f"{at.layers:.2f}", f"{at.time:.3f}", f"{at.kl:.4f}", f"{at.perplexity:.3f}")
             for at in build.dial),
        )  # fmt: skip
