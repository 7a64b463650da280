"""`doctor`'s eyes: what a machine has, asked of files and programs without importing anything heavy. Whatever they
answer, or if they never do, `doctor` goes on.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dash_export import __version__
from dash_export.cli import EXTRAS
from dash_export.errors import BackendError
from dash_export.runtime.cpus import available_memory, cpu_name, physical_cores
from dash_export.runtime.cuda_devices import cuda_devices

ROOT = Path("/")
"""Where the machine's files are."""
SECONDS = 10.0
LIMIT = 1 << 16
"""Bytes read of any answer."""
LINE = 200
"""Characters shown of any answer."""
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
_IMPORT = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
module = importlib.import_module(sys.argv[2])
offered = getattr(module, "get_available_providers", list)()
print(json.dumps({"version": str(module.__version__), "providers": [str(name) for name in offered]}))
"""


@dataclass(frozen=True)
class Answer:
    """`code` 0 is success, None says that the program is not there or does not start; `text` has stderr in it."""

    code: int | None
    text: str


@dataclass(frozen=True)
class Finding:
    """Something wrong, and what to type."""

    problem: str
    fix: str


@dataclass(frozen=True)
class Import:
    """The result of importing a module. `error` is None where it did."""

    version: str | None
    error: str | None
    providers: tuple[str, ...] = ()


def ask(program: str, *arguments: str) -> Answer:
    """Run a program without input, for SECONDS at most, and read the first LIMIT bytes it prints."""
    path = shutil.which(program)
    if path is None:
        return Answer(None, "")
    try:
        # A session of its own: what the program starts ends with it.
        process = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, str(error))

    def end() -> None:
        with suppress(OSError):  # it has just ended by itself
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(SECONDS, end)
    timer.start()
    try:
        with process:
            assert process.stdout is not None
            printed = process.stdout.read(LIMIT)
            if len(printed) == LIMIT:
                end()
    finally:
        timer.cancel()
    return Answer(process.returncode, _text(printed))


def read(path: str | Path) -> str:
    """The first LIMIT bytes of a file under ROOT as text; "" when it cannot be read."""
    try:
        with (ROOT / path).open("rb") as file:
            return _text(file.read(LIMIT))
    except OSError:
        return ""


def _text(data: bytes) -> str:
    """As text without what could move a terminal's cursor."""
    text = data.decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text).strip()


def installed(package: str) -> str | None:
    """A package's version; TensorRT's wheels are also named after their CUDA."""
    for name in (package, f"{package}_cu13", f"{package}_cu12"):
        with suppress(PackageNotFoundError):
            return version(name)
    return None


def imported(module: str) -> Import | None:
    """Import a module in a process of its own, which may die of it; None where it is not installed."""
    if find_spec(module) is None:
        return None
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # -I: Python would look for the script's own imports in the current folder first.
    answer = ask(sys.executable, "-I", "-c", _IMPORT, json.dumps(sys.path), module)
    last_line = answer.text.rpartition("\n")[2].strip()
    try:
        told = json.loads(last_line)
        return Import(str(told["version"])[:40], None, tuple(str(name)[:40] for name in told["providers"]))
    except (ValueError, KeyError, TypeError):
        return Import(None, last_line[:LINE] or f"importing it ended with exit code {answer.code}")


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
    }


def cuda() -> dict[str, Any]:
    """CUDA's devices as the driver itself lists them, or why there is none; the driver's version; what nvidia-smi and
    the kernel see, which may be more than CUDA can use.
    """
    devices, reason = [], None
    try:
        devices = [asdict(device) for device in cuda_devices()]
    except BackendError as error:
        reason = str(error)
    except Exception as error:  # a driver that is half there lacks functions
        reason = f"The NVIDIA driver is damaged ({type(error).__name__}: {error}). Install it again."
    rows = ask("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    listed = [line.rpartition(", ") for line in rows.text.split("\n")] if rows.code == 0 else []
    kernel = read("proc/driver/nvidia/version")
    versions = [*(number for _, _, number in listed), *re.findall(r"Module\b.*?  (\d[\d.]*)", kernel)]
    files = [path.name for path in sorted(ROOT.glob("dev/nvidia[0-9]*"))]
    return {
        "devices": devices,
        "reason": reason,
        "driver": next((found for found in versions if re.fullmatch(r"\d{2,4}(\.\d{1,4}){1,3}", found)), None),
        "seen": [name[:LINE] for name, _, _ in listed if name] or files,
    }


def problems(
    packages: dict[str, str | None], imports: dict[str, Import | None], devices: dict[str, Any]
) -> Iterator[Finding]:
    """Conflicts that make things fail or run slowly in silence. `devices` is `cuda()`."""
    has_gpu, gpu_package = bool(devices["devices"]), packages["onnxruntime-gpu"]
    if devices["seen"] and not has_gpu:
        yield Finding(
            f"There is a GPU ({', '.join(devices['seen'][:4])}), but CUDA cannot use it: {devices['reason']}",
            "install the whole NVIDIA driver again; in a container: docker run --gpus all "
            "(on a Jetson: --runtime nvidia)",
        )
    both = packages["onnxruntime"] and gpu_package
    if both:
        yield Finding(
            "onnxruntime and onnxruntime-gpu are both installed: they overwrite each other's files.",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime" + ("-gpu" if has_gpu else ""),
        )
    for module, result in imports.items():
        if result is not None and result.error is not None and not (both and module == "onnxruntime"):
            yield Finding(f"{module} is installed but cannot be imported ({result.error}).", _again(module, packages))
    ort = imports["onnxruntime"]
    offers = ort.providers if ort is not None and ort.error is None else ("CUDAExecutionProvider",)
    if gpu_package and not both and has_gpu and "CUDAExecutionProvider" not in offers:
        yield Finding(
            "onnxruntime-gpu does not offer CUDA here: its CUDA libraries are missing.",
            "pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )


def _again(module: str, packages: dict[str, str | None]) -> str:
    if module == "tensorrt":
        return "pip install --force-reinstall tensorrt; on a Jetson: sudo apt install --reinstall python3-libnvinfer"
    name = {"tensorrt_rtx": "tensorrt-rtx-cu13"}.get(module, module)
    return f"pip install --force-reinstall {name}" + ("-gpu" if packages.get(f"{module}-gpu") else "")
