"""What a machine has, asked without importing anything heavy: `doctor`'s eyes."""

from __future__ import annotations

import csv
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dash_export import __version__
from dash_export.errors import RecipeError
from dash_export.runtime.cpus import available_memory, cpu_name, physical_cores

# package on PyPI -> the extra of dash-export that installs it; "" is always there, NOT_YET has no extra in this version
NOT_YET = "-"
PACKAGES = {
    "numpy": "",
    "tokenizers": "",
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "tensorrt": NOT_YET,
    "tensorrt_rtx": NOT_YET,
    "onnx": "export",
    "onnx_ir": "export",
    "gguf": "export",
    "safetensors": "export",
    "huggingface_hub": "export",
    "ml_dtypes": "export",
    "torch": "train",
    "transformers": "train",
}
LOWERING = ("onnx", "onnx_ir", "ml_dtypes")
"""What building (not running) a lowered target needs beside its backend."""
RUNTIME_EXTRAS = {"onnxruntime": (("onnxruntime", "onnxruntime-gpu"), "cpu")}
"""backend -> (packages of which one is enough, the extra that installs one)."""
_SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """Something wrong, and what to type."""

    problem: str
    fix: str


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def system() -> dict[str, Any]:
    """Interpreter, operating system, processor, memory in bytes."""
    return {
        "dash-export": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "memory_available": available_memory(),
        "jetson": jetson(),
    }


def jetson() -> str | None:
    """The Jetson's own words about itself, or None on any other machine."""
    try:
        release = Path("/etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return None
    try:
        model = Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        model = "Jetson"
    return f"{model} ({release.lstrip('# ')})"


def gpus() -> list[dict[str, str]]:
    """NVIDIA devices as nvidia-smi lists them; the device files when there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    columns = ("name", "compute_cap", "memory.total", "driver_version")
    if tool is not None:
        ask = [tool, f"--query-gpu={','.join(columns)}", "--format=csv,noheader"]
        try:
            answer = subprocess.run(ask, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
            rows = [row for row in csv.reader(answer.splitlines(), skipinitialspace=True) if len(row) == len(columns)]
            return [dict(zip(columns, row, strict=True)) for row in rows]
        except (OSError, subprocess.SubprocessError):
            pass
    return [{"name": path.name} for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def providers() -> tuple[list[str], str | None]:
    """ONNX Runtime's execution providers, or why it cannot be imported."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers()), None
    except Exception as error:  # a broken wheel can raise anything
        return [], f"{type(error).__name__}: {error}"


def problems(
    packages: dict[str, str | None], import_error: str | None, has_gpu: bool, available: list[str]
) -> list[Finding]:
    """Conflicts that make things fail or run slowly in silence."""
    found = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        found.append(
            Finding(
                "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files.",
                "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" + ("-gpu" if has_gpu else ""),
            )
        )
    elif (packages["onnxruntime"] or packages["onnxruntime-gpu"]) and import_error:
        found.append(
            Finding(
                f"onnxruntime is installed but cannot be imported ({import_error}).",
                "pip install --force-reinstall onnxruntime",
            )
        )
    elif packages["onnxruntime-gpu"] and has_gpu and "CUDAExecutionProvider" not in available:
        found.append(
            Finding(
                "onnxruntime-gpu does not offer CUDA here: its CUDA libraries are missing.",
                "pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )
        )
    return found


def targets(packages: dict[str, str | None]) -> list[dict[str, Any]]:
    """Every shipped target: can it be built and run here, and the install line for what is missing."""
    from dash_export.targets import load_recipe, recipe_names

    rows = []
    for name in recipe_names():
        try:
            recipe = load_recipe(name)
        except RecipeError as error:
            rows.append({"target": name, "build": False, "run": False, "install": str(error)})
            continue
        choices, extra = RUNTIME_EXTRAS.get(recipe.backend, ((recipe.backend,), recipe.backend))
        runs = any(packages.get(package) for package in choices)
        lowers = recipe.dialect == "portable" or all(packages[package] for package in LOWERING)
        missing = [] if runs else [extra]
        missing += [] if lowers else ["export"]
        install = f"pip install 'dash-export[{','.join(missing)}]'" if missing else ""
        rows.append({"target": name, "build": runs and lowers, "run": runs, "install": install})
    return rows


def can_export(packages: dict[str, str | None]) -> list[str]:
    """Packages of the `export` extra that are missing."""
    return [name for name, extra in PACKAGES.items() if extra == "export" and not packages[name]]
