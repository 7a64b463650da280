"""`dash-export doctor`: what this machine has, what conflicts, which targets it can build and run, what to install."""

import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from dash_export import __version__
from dash_export.backends.base import MAIN, RIVALS, has_reference
from dash_export.backends.cuda.cuda_devices import cuda_devices
from dash_export.backends.host.cpus import allowed_processors, available_memory, cpu_name, physical_cores
from dash_export.backends.maker import Backend, backend_of
from dash_export.bundle.recipe import load_recipe, recipe_names
from dash_export.cli import EXTRAS, printable
from dash_export.commands.tables import print_table, size
from dash_export.errors import BackendError

ROOT = Path("/")
"""Root of the machine's file system."""
LINE = 200
"""Characters shown, at most, of a system file's line or of an import error."""
# package -> the extra of dash-export that installs it; "" for what dash-export itself always installs
PACKAGES = {
    **dict.fromkeys(("numpy", "tokenizers"), ""),
    **{name: backend.extra for name, backend in (MAIN | RIVALS).items()},
    **{package: extra for package, extra in EXTRAS.items() if extra in ("export", "train")},
}
LOADED = tuple(MAIN)
"""Modules that are imported too, because a package is often installed but broken."""
LOWERING = ("onnx", "onnx_ir", "ml_dtypes")
"""Packages that building a lowered target needs beside its backend, and that running does not need."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option(
    "--probe", "probed", is_flag=True,
    help="Try the first GPU, for seconds: launches, waits, copies, graphs with decisions. Send --json back with a bug.",
)  # fmt: skip
@click.option(
    "--card", type=click.Path(path_type=Path), metavar="BUNDLE",
    help="Check, step by step, that this bundle is right on this card, and how fast. Writes BUNDLE-TARGET-card.json "
    "and .html here, to be sent.",
)  # fmt: skip
@click.option("--target", help="With --card: the GPU target; by default the only one of the bundle.")
@click.pass_context
def command(ctx: click.Context, as_json: bool, probed: bool, card: Path | None, target: str | None) -> None:
    """Show this machine's hardware, packages and backends, and which targets it can build and run.

    Exits with 1 when something is broken: two conflicting ONNX Runtime packages, half an install, a GPU that CUDA
    cannot use, a step of --card.
    """
    if card is not None:
        from dash_export.commands.card_report import report_card

        report_card(ctx, card, target, examine(), as_json)
        return
    report = examine()
    if probed:
        from dash_export.backends.cuda.cuda import Cuda
        from dash_export.backends.cuda.launch_costs import probe

        device = Cuda()
        report["probe"] = {"device": asdict(device.device), **probe(device)}
        fix = "take dispatch 'overlapped', and send this report (--json) to the makers of dash-export"
        wrong = report["probe"].get("wrong", [])
        report["problems"] += [{"problem": f"A graph decides wrongly ({each}).", "fix": fix} for each in wrong]
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)
        if probed:
            _print_probe(report["probe"])
    if report["problems"]:
        ctx.exit(1)


def _print_probe(found: dict[str, Any]) -> None:
    rows = {f"a token, {name}": f"{took:.0f} µs" for name, took in found["token_us"].items()}
    rows |= {"a launch": f"{found['launch_us']:.2f} µs", "a launch and its end": f"{found['wait_us']:.1f} µs"}
    rows |= {"copying on the card": f"{found['bytes_per_second'] / 1e9:.0f} GB/s"}
    rows |= {f"not recorded: {name}": why for name, why in found.get("not_recorded", {}).items()}
    name, dispatch = found["device"]["name"], found["dispatch"]
    title = f"{name}: {found['units']} units that do nothing; dispatch '{dispatch}' pays here"
    print_table(title, ("", ""), (), rows.items())


def examine() -> dict[str, Any]:
    """Return everything `doctor` prints, as plain data."""
    packages = {name: installed(name) for name in PACKAGES}
    imports = {name: imported(name) for name in LOADED}
    devices = cuda()
    return {
        "system": system(),
        "cuda": devices,
        "packages": packages,
        "imports": {name: result and asdict(result) for name, result in imports.items()},
        "providers": [name for result in imports.values() if result is not None for name in result.providers],
        "targets": [_target(name, imports) for name in recipe_names()],
        "missing_for_export": [name for name, extra in PACKAGES.items() if extra == "export" and not packages[name]],
        "problems": [{"problem": said, "fix": fix} for said, fix in problems(packages, imports, devices)],
    }


@dataclass(frozen=True)
class Import:
    """Result of importing a module. `error` is None where the import succeeded."""

    version: str | None
    error: str | None
    providers: tuple[str, ...] = ()


def installed(package: str) -> str | None:
    """Return a package's version, None without it. TensorRT's wheels may have their CUDA version in the name."""
    for name in (package, f"{package}_cu13", f"{package}_cu12"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def imported(module: str) -> Import | None:
    """Import a module and return the result; None where the module is not installed."""
    if find_spec(module) is None:
        return None
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        found = import_module(module)
        return Import(str(found.__version__), None, tuple(getattr(found, "get_available_providers", tuple)()))
    except Exception as error:  # a broken install can raise anything
        return Import(None, printable(f"{type(error).__name__}: {error}")[:LINE])


def system() -> dict[str, Any]:
    """Return the facts of interpreter, operating system, board and processor, and the free memory in bytes."""
    return {
        "dash-export": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "board": _read("proc/device-tree/model").strip("\0"),
        "l4t": _read("etc/nv_tegra_release").partition(", GCID")[0].removeprefix("# "),
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "logical_cores": len(allowed_processors()),
        "memory_available": available_memory(),
    }


def _read(path: str) -> str:
    """Return the first line of a system file, at most LINE characters; "" where the file cannot be read."""
    try:
        with (ROOT / path).open(encoding="utf-8", errors="replace") as file:
            return printable(file.readline(LINE).strip())
    except OSError:
        return ""


def cuda() -> dict[str, Any]:
    """Return CUDA's devices as the driver lists them, or why there are none (`reason`); the driver's version; and the
    devices that the kernel sees (`seen`), which may be more than CUDA can use.
    """
    devices, reason = [], None
    try:
        devices = [asdict(device) for device in cuda_devices()]
    except BackendError as error:
        reason = str(error)
    # The file begins: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug ..."
    driver = re.search(r"Module.*?  (\d[\d.]*)", _read("proc/driver/nvidia/version"))
    seen = [path.name for path in sorted(ROOT.glob("dev/nvidia[0-9]*"))]
    return {"devices": devices, "reason": reason, "driver": driver and driver[1], "seen": seen}


def problems(
    packages: dict[str, str | None], imports: dict[str, Import | None], devices: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what makes work fail, or run slowly without a message: the problem, and the command that fixes it."""
    has_gpu = bool(devices["devices"])
    if devices["seen"] and not has_gpu:
        yield (
            f"There is a GPU ({', '.join(devices['seen'][:4])}), but CUDA cannot use it: {devices['reason']}",
            "install the whole NVIDIA driver again; in a container: docker run --gpus all (on a Jetson: --runtime "
            "nvidia)",
        )
    wheels = {module: backend.wheel or module for module, backend in MAIN.items()}
    for wheel, backend in RIVALS.items():
        module, result = backend.package, imports[backend.package]
        if packages[wheel] and packages[module]:
            said = f"{module} and {wheel} are both installed: they overwrite each other's files."
            yield said, f"pip uninstall -y {module} {wheel} && pip install {wheel if has_gpu else module}"
            del wheels[module]
        elif packages[wheel]:
            wheels[module] = wheel
            if has_gpu and result is not None and result.error is None and backend.provider not in result.providers:
                said = f"{wheel} does not offer CUDA here: another {module} has overwritten its files."
                yield said, f"pip install --force-reinstall '{wheel}[cuda,cudnn]'"
    for module, wheel in wheels.items():
        if (result := imports[module]) is not None and result.error is not None:
            said = f"{module} is installed but cannot be imported ({result.error})."
            yield said, "; ".join(filter(None, (f"pip install --force-reinstall {wheel}", MAIN[module].mend)))


def _target(name: str, imports: dict[str, Import | None]) -> dict[str, Any]:
    """Return the row of a shipped target: whether `build` and `run` work here, whether `build` only lowers the graphs
    here (`lowers`), the reason where they do not work, and the command that installs what is missing. `imports`: the
    results of importing the backends' packages.
    """
    backend = backend_of(load_recipe(name))
    reasons = _obstacles(backend, imports)
    lowers = not _missing(backend) and has_reference()
    # Only the first sentence of each reason: the rest (no driver at all, the known backends) is printed elsewhere.
    said = dict.fromkeys(reason.partition(". ")[0].rstrip(".") for reason in reasons if reason is not None)
    return {
        "target": name,
        "build": reasons[0] is None,
        "run": reasons[1] is None,
        "lowers": backend.needs_another_machine() and lowers,
        "reason": "; ".join(said),
        "install": _install(backend, *reasons),
    }


def _obstacles(backend: Backend, imports: dict[str, Import | None]) -> tuple[str | None, str | None]:
    """Return why the recipe cannot be built here and why it cannot be run here; None for each that works."""
    build, run, package = backend.build_obstacle(), backend.run_obstacle(), backend.entry.package
    found, python = imports.get(package), MAIN[package].python
    if found is None and sys.version_info < python:
        build = run = "{} needs Python {}.{} or newer.".format(package, *python)
    elif found is not None and found.error is not None:
        broken = f"the package {package} cannot be imported."
        build, run = build or (broken if backend.compiles or not backend.on_device else None), run or broken
    elif found is not None and found.version is not None:
        build = build or backend.refused_version(found.version)
    if build is None and (missing := _missing(backend)):
        build = f"{', '.join(missing)} not installed{' (lowered graphs are compiled without)' * backend.compiles}."
    return build, run


def _missing(backend: Backend) -> list[str]:
    """Return the `export` packages that lowering needs and that are missing. The target `portable` lowers nothing."""
    lowered = backend.on_device or backend.recipe.dialect != "portable"
    return [package for package in LOWERING if find_spec(package) is None] if lowered else []


def _install(backend: Backend, build: str | None, run: str | None) -> str:
    """Return one command that installs all that is missing; "" where no install helps. A missing package is recognised
    by its obstacle's text, which has the install command in it; an obstacle about an absent device has none.
    """
    extras = {"export"} if _missing(backend) else set()
    if build is not None and (command := backend.how_to_install()) in build:
        if not command.startswith("pip"):
            return command
        extras.add(backend.entry.extra)
    if run is not None and f"[{backend.entry.extra}]" in run and "uninstall" not in run:
        extras.add(backend.entry.extra)
    return f"pip install 'dash-export[{','.join(sorted(extras))}]'" if extras else ""


def _print(report: dict[str, Any]) -> None:
    system, cuda, told = report["system"], report["cuda"], report["imports"]
    machine = [
        ("dash-export", system["dash-export"]),
        ("Python", system["python"]),
        ("system", f"{system['os']}, {system['architecture']}"),
        ("board", ", ".join(filter(None, (system["board"], system["l4t"])))),
        ("processor", f"{system['cpu']}, {system['physical_cores']} cores ({system['logical_cores']} threads)"),
        ("free memory", size(system["memory_available"])),
    ]
    for device in cuda["devices"]:
        memory = f"{size(device['memory'])}{' shared with the CPU' if device['integrated'] else ''}"
        machine.append(("CUDA", f"{device['name']}, compute capability {device['capability']}, {memory}"))
        machine.append(("driver", f"{cuda['driver'] or 'unknown'}, speaks CUDA {device['driver']}"))
    if not cuda["devices"]:
        machine.append(("CUDA", f"no device. {cuda['reason']}"))
    print_table("This machine", ("", ""), (), (row for row in machine if row[1]))
    packages = (
        (
            name, version or (told.get(name) or {}).get("version") or "not installed",
            f"[{PACKAGES[name]}]" if PACKAGES[name] else "always",
        )
        for name, version in report["packages"].items()
    )  # fmt: skip
    print_table("Packages", ("package", "version", "extra"), (), packages)
    if report["providers"]:
        click.echo(f"ONNX Runtime offers: {', '.join(report['providers'])}\n")
    answers = {True: Text("yes", "green"), False: Text("no", "yellow")}
    targets = (
        (row["target"], Text("on the device", "yellow") if row["lowers"] else answers[row["build"]],
         answers[row["run"]], row["install"] or row["reason"])
        for row in report["targets"]
    )  # fmt: skip
    print_table("Targets", ("target", "build here", "run here", "why not, or what to install"), (), targets)
    if any(row["lowers"] for row in report["targets"]):
        click.echo(
            "On the device: `dash-export build` lowers the graphs here. Copy the bundle to the device, and run the "
            "same command there: it compiles them."
        )
    if report["missing_for_export"]:
        missing = ", ".join(report["missing_for_export"])
        click.echo(f"To export models (missing: {missing}): pip install 'dash-export[export]'")
    for finding in report["problems"]:
        click.secho(f"Problem: {finding['problem']}", fg="red", bold=True)
        click.echo(f"  Fix: {finding['fix']}")
    if not report["problems"]:
        click.secho("No conflicts found.", fg="green")
