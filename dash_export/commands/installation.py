"""What this machine has, for `doctor`: packages, how importing them goes, CUDA; and what of it is broken."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dash_export import __version__
from dash_export.cli import EXTRAS, printable
from dash_export.errors import BackendError
from dash_export.runtime.cpus import available_memory, cpu_name, physical_cores
from dash_export.runtime.cuda_devices import cuda_devices

ROOT = Path("/")
"""Where the machine's files are."""
LINE = 200
"""Characters shown of an answer."""
# package -> the extra of dash-export that installs it; "" is always there
PACKAGES = {
    **dict.fromkeys(("numpy", "tokenizers"), ""),
    "onnxruntime": "cpu",
    "onnxruntime-gpu": "gpu",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
    **{package: extra for package, extra in EXTRAS.items() if extra in ("export", "train")},
}
LOADED = ("onnxruntime", "tensorrt", "tensorrt_rtx")
"""Modules that are also imported, because half an install of them is common."""


@dataclass(frozen=True)
class Import:
    """The result of importing a module. `error` is None where it did."""

    version: str | None
    error: str | None
    providers: tuple[str, ...] = ()


def installed(package: str) -> str | None:
    """A package's version; TensorRT's wheels are also named after their CUDA."""
    for name in (package, f"{package}_cu13", f"{package}_cu12"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def imported(module: str) -> Import | None:
    """Import a module; None where it is not installed."""
    if find_spec(module) is None:
        return None
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        found = import_module(module)
        return Import(str(found.__version__), None, tuple(getattr(found, "get_available_providers", tuple)()))
    except Exception as error:  # half an install fails in any way
        return Import(None, printable(f"{type(error).__name__}: {error}")[:LINE])


def system() -> dict[str, Any]:
    """Interpreter, operating system, board, processor, memory in bytes."""
    return {
        "dash-export": __version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "board": _read("proc/device-tree/model").strip("\0"),
        "l4t": _read("etc/nv_tegra_release").partition(", GCID")[0].removeprefix("# "),
        "cpu": cpu_name(),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count() or 1,
        "memory_available": available_memory(),
    }


def _read(path: str) -> str:
    """The beginning of a file of the system; "" where there is none."""
    try:
        with (ROOT / path).open(encoding="utf-8", errors="replace") as file:
            return printable(file.readline(LINE).strip())
    except OSError:
        return ""


def cuda() -> dict[str, Any]:
    """CUDA's devices as the driver itself lists them, or why there is none; the driver's version; and the devices that
    the kernel sees, which may be more than CUDA can use.
    """
    devices, reason = [], None
    try:
        devices = [asdict(device) for device in cuda_devices()]
    except BackendError as error:
        reason = str(error)
    # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug ..."
    driver = re.search(r"Module.*?  (\d[\d.]*)", _read("proc/driver/nvidia/version"))
    seen = [path.name for path in sorted(ROOT.glob("dev/nvidia[0-9]*"))]
    return {"devices": devices, "reason": reason, "driver": driver and driver[1], "seen": seen}


def problems(
    packages: dict[str, str | None], imports: dict[str, Import | None], devices: dict[str, Any]
) -> Iterator[dict[str, str]]:
    """Conflicts that make things fail or run slowly in silence: the problem, and the fix to type. `devices` is
    `cuda()`.
    """
    has_gpu, gpu_package = bool(devices["devices"]), packages["onnxruntime-gpu"]
    if devices["seen"] and not has_gpu:
        yield {
            "problem": f"There is a GPU ({', '.join(devices['seen'][:4])}), but CUDA cannot use it: "
            f"{devices['reason']}",
            "fix": "install the whole NVIDIA driver again; in a container: docker run --gpus all "
            "(on a Jetson: --runtime nvidia)",
        }
    both = packages["onnxruntime"] and gpu_package
    if both:
        yield {
            "problem": "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files.",
            "fix": "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" + "-gpu" * has_gpu,
        }
    for module, result in imports.items():
        if result is not None and result.error is not None and not (both and module == "onnxruntime"):
            name = {"tensorrt_rtx": "tensorrt-rtx-cu13"}.get(module, module)
            name += "-gpu" if packages.get(f"{module}-gpu") else ""
            apt = "; on a Jetson: sudo apt install --reinstall python3-libnvinfer" * (module == "tensorrt")
            yield {
                "problem": f"{module} is installed but cannot be imported ({result.error}).",
                "fix": f"pip install --force-reinstall {name}{apt}",
            }
    ort = imports["onnxruntime"]
    offers = ort.providers if ort is not None and ort.error is None else ("CUDAExecutionProvider",)
    if gpu_package and not both and has_gpu and "CUDAExecutionProvider" not in offers:
        yield {
            "problem": "onnxruntime-gpu does not offer CUDA here: its CUDA libraries are missing.",
            "fix": "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        }
