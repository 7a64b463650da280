"""`dash-export doctor`: what this machine has, what conflicts, what to install."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from rich.text import Text

from dash_export.commands import machine
from dash_export.commands.common import plain_table, print_table, result_console, size


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show this machine's hardware, packages and backends, and which targets it can build and run.

    Exits with 1 when something is broken, such as two conflicting ONNX Runtime packages.
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)
    if report["problems"]:
        ctx.exit(1)


def examine() -> dict[str, Any]:
    """Everything `doctor` prints, as plain data."""
    packages = {name: machine.installed(name) for name in machine.PACKAGES}
    devices = machine.gpus()
    available, error = machine.providers() if packages["onnxruntime"] or packages["onnxruntime-gpu"] else ([], None)
    found = machine.problems(packages, error, bool(devices), available)
    return {
        "system": machine.system(),
        "gpus": devices,
        "packages": packages,
        "providers": available,
        "targets": machine.targets(packages),
        "missing_for_export": machine.can_export(packages),
        "problems": [asdict(finding) for finding in found],
    }


def _print(report: dict[str, Any]) -> None:
    console = result_console()
    system = report["system"]
    about = plain_table("This machine", "", "")
    about.show_header = False
    about.add_row("dash-export", system["dash-export"])
    about.add_row("Python", system["python"])
    about.add_row("system", f"{system['os']}, {system['architecture']}")
    about.add_row("processor", f"{system['cpu']}, {system['physical_cores']} cores ({system['logical_cores']} threads)")
    about.add_row("free memory", size(system["memory_available"]))
    if system["jetson"]:
        about.add_row("Jetson", system["jetson"])
    for device in report["gpus"]:
        about.add_row("NVIDIA", ", ".join(device.values()))
    if not report["gpus"] and not system["jetson"]:
        about.add_row("NVIDIA", "none found")
    print_table(console, about)

    packages = plain_table("Packages", "package", "version", "extra", "for")
    for name, version in report["packages"].items():
        extra = machine.PACKAGES[name]
        label = {"": "always", machine.NOT_YET: ""}.get(extra, f"[{extra}]")
        packages.add_row(name, version or "not installed", label, _PURPOSE[extra])
    print_table(console, packages)
    if report["providers"]:
        console.print(f"ONNX Runtime offers: {', '.join(report['providers'])}\n")

    table = plain_table("Targets", "target", "build here", "run here", "install what is missing")
    for row in report["targets"]:
        table.add_row(row["target"], _yes(row["build"]), _yes(row["run"]), row["install"])
    print_table(console, table)
    if report["missing_for_export"]:
        missing = ", ".join(report["missing_for_export"])
        click.echo(f"To export models (missing: {missing}): pip install 'dash-export[export]'")
    for finding in report["problems"]:
        click.secho(f"Problem: {finding['problem']}", fg="red", bold=True)
        click.echo(f"  Fix: {finding['fix']}")
    if not report["problems"]:
        click.secho("No conflicts found.", fg="green")


_PURPOSE = {
    "": "the runtime",
    "cpu": "run and build on a CPU",
    "gpu": "ONNX Runtime on CUDA",
    machine.NOT_YET: "not used by this version",
    "export": "read models, write graphs",
    "train": "train policies, PyTorch oracle",
}


def _yes(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "yellow")
