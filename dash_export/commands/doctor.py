"""`dash-export doctor`: what this machine has, what conflicts, which targets it can build and run, what to install."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from dash_export.building.backend import Backend, backend_of
from dash_export.commands import hardware
from dash_export.commands.common import plain_table, print_table, result_console, size
from dash_export.commands.jetson import jetson
from dash_export.errors import RecipeError
from dash_export.runtime.backends import BACKENDS
from dash_export.targets import load_recipe, recipe_names

if TYPE_CHECKING:
    from rich.console import Console

LOWERING = ("onnx", "onnx_ir", "ml_dtypes")
"""Packages that building (not running) a lowered target needs beside its backend."""
_PURPOSE = {
    "": "the runtime",
    "cpu": "run and build on a CPU",
    "gpu": "ONNX Runtime on CUDA",
    "tensorrt": "compile and run for Jetson, H100, L4",
    "rtx": "compile for RTX cards anywhere, run there",
    "export": "read models, write graphs",
    "train": "train policies, PyTorch oracle",
}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Show this machine's hardware, packages and backends, and which targets it can build and run.

    Exits with 1 when something is broken: two conflicting ONNX Runtime packages, half an install, a GPU that CUDA
    cannot use.
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
    packages = {name: hardware.installed(name) for name in hardware.PACKAGES}
    imports = {name: hardware.imported(name) for name in hardware.LOADED}
    devices, ort = hardware.cuda(), imports["onnxruntime"]
    return {
        "system": hardware.system(),
        "jetson": jetson(),
        "cuda": devices,
        "packages": packages,
        "imports": {name: result and asdict(result) for name, result in imports.items()},
        "providers": list(ort.providers) if ort is not None else [],
        "targets": [_target(name, imports) for name in recipe_names()],
        "missing_for_export": [
            name for name, extra in hardware.PACKAGES.items() if extra == "export" and not packages[name]
        ],
        "problems": [asdict(finding) for finding in hardware.problems(packages, imports, devices)],
    }


def _target(name: str, imports: dict[str, hardware.Import | None]) -> dict[str, Any]:
    """A shipped target: `build` and `run` here, `kit` where `build` writes a build kit instead, why not, and the
    install line for what is missing. `imports`: how importing each backend's package went.
    """
    kit, install = False, ""
    try:
        backend = backend_of(load_recipe(name))
        reasons = build, run = _obstacles(backend, imports)
        kit = backend.needs_another_machine() and not _missing(backend) and find_spec("onnxruntime") is not None
        install = _install(backend, build, run)
    except RecipeError as error:
        reasons = (str(error), str(error))
    except Exception as error:  # this machine is odd in a way nobody thought of: say so, go on with the others
        reasons = (f"{type(error).__name__}: {error}"[: hardware.LINE],) * 2
    # The first sentence of each: what else they say (no driver at all, the known backends) is told elsewhere.
    said = dict.fromkeys(reason.partition(". ")[0].rstrip(".") for reason in reasons if reason is not None)
    return {
        "target": name,
        "build": reasons[0] is None,
        "run": reasons[1] is None,
        "kit": kit,
        "reason": "; ".join(said),
        "install": install,
    }


def _obstacles(backend: Backend, imports: dict[str, hardware.Import | None]) -> tuple[str | None, str | None]:
    """Why the recipe can neither be built nor run here: both None where it can."""
    recipe, build, run = backend.recipe, backend.build_obstacle(), backend.run_obstacle()
    package = BACKENDS[recipe.backend][1]
    found = imports.get(package)
    if found is not None and found.error is not None:
        broken = f"the package {package} cannot be imported."
        compiles = recipe.backend != "onnxruntime_cuda"
        build, run = build or (broken if compiles else None), run or broken
    elif found is not None and recipe.backend == "onnxruntime_cuda" and "CUDAExecutionProvider" not in found.providers:
        run = run or "this ONNX Runtime does not offer CUDA."
    elif found is not None and found.version is not None:
        build = build or backend.refused_version(found.version)
    if build is None and (missing := _missing(backend)):
        build = f"{', '.join(missing)} not installed."
    return build, run


def _missing(backend: Backend) -> list[str]:
    """Packages of the `export` extra that lowering needs. The target `portable` takes graphs as they are."""
    lowered = backend.on_device or backend.recipe.dialect != "portable"
    return [package for package in LOWERING if find_spec(package) is None] if lowered else []


def _install(backend: Backend, build: str | None, run: str | None) -> str:
    """One line for everything that installing can put right; "" where nothing can. What a reason says to install is
    what is missing: for a device that is not here no reason says anything.
    """
    extras = {"export"} if _missing(backend) else set()
    if build is not None and (command := backend.how_to_install()) in build:
        if not command.startswith("pip"):
            return command
        extras.add(backend.extra)
    if run is not None and f"[{backend.extra}]" in run:
        extras.add(backend.extra)
    return f"pip install 'dash-export[{','.join(sorted(extras))}]'" if extras else ""


def _print(report: dict[str, Any]) -> None:
    console = result_console()
    _print_machine(console, report)
    packages = plain_table("Packages", "package", "version", "extra", "for")
    for name, version in report["packages"].items():
        extra = hardware.PACKAGES[name]
        told = report["imports"].get(name) or {}
        label = f"[{extra}]" if extra else "always"
        packages.add_row(name, version or told.get("version") or "not installed", label, _PURPOSE[extra])
    print_table(console, packages)
    if report["providers"]:
        console.print(f"ONNX Runtime offers: {', '.join(report['providers'])}\n")

    table = plain_table("Targets", "target", "build here", "run here", "why not, or what to install")
    for row in report["targets"]:
        build = Text("a kit", "yellow") if row["kit"] else _yes(row["build"])
        table.add_row(row["target"], build, _yes(row["run"]), row["install"] or row["reason"])
    print_table(console, table)
    if any(row["kit"] for row in report["targets"]):
        click.echo("A kit: `dash-export build` writes a folder here that builds the engines on the device.")
    if report["missing_for_export"]:
        missing = ", ".join(report["missing_for_export"])
        click.echo(f"To export models (missing: {missing}): pip install 'dash-export[export]'")
    for finding in report["problems"]:
        click.secho(f"Problem: {finding['problem']}", fg="red", bold=True)
        click.echo(f"  Fix: {finding['fix']}")
    if not report["problems"]:
        click.secho("No conflicts found.", fg="green")


def _yes(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "yellow")


def _print_machine(console: Console, report: dict[str, Any]) -> None:
    system, cuda = report["system"], report["cuda"]
    table = plain_table("This machine", "", "")
    table.show_header = False
    table.add_row("dash-export", system["dash-export"])
    table.add_row("Python", system["python"])
    table.add_row("system", f"{system['os']}, {system['architecture']}")
    table.add_row("processor", f"{system['cpu']}, {system['physical_cores']} cores ({system['logical_cores']} threads)")
    table.add_row("free memory", size(system["memory_available"]))
    for device in cuda["devices"]:
        memory = f"{size(device['memory'])}{' shared with the CPU' if device['integrated'] else ''}"
        table.add_row("CUDA", f"{device['name']}, compute capability {device['capability']}, {memory}")
    if cuda["devices"]:
        table.add_row("driver", f"{cuda['driver'] or 'unknown'}, speaks CUDA {cuda['devices'][0]['driver']}")
    else:
        table.add_row("CUDA", f"no device. {cuda['reason'] or ''}")
    for name, value in _about_jetson(report["jetson"]) if report["jetson"] else ():
        table.add_row(name, value)
    print_table(console, table)


def _about_jetson(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Jetson", facts["model"]
    yield "JetPack", f"{facts['jetpack'] or 'unknown'} (Jetson Linux {facts['l4t'] or 'unknown'})"
    yield "power mode", facts["power_mode"] or "unknown: run `nvpmodel -q`"
    if not facts["clocks"]:
        yield "clocks", "unknown: run `sudo jetson_clocks --show`"
        return
    yield "clocks", "; ".join(_about_clock(name, clock) for name, clock in facts["clocks"].items())
    if "EMC" not in facts["clocks"]:
        yield "", "the memory's clock (EMC) is told to root only: sudo jetson_clocks --show"
    if not facts["clocks_fixed"]:
        yield "", "they move: run `sudo jetson_clocks` before you measure"


def _about_clock(name: str, clock: dict[str, Any]) -> str:
    if clock["fixed"]:
        return f"{name} fixed at {clock['now']} MHz"
    return f"{name} {clock['lowest']} to {clock['highest']} MHz, now {clock['now']}"
