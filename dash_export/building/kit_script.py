"""Build kit: python3 build.py compiles this folder's engines on this machine and writes report.json.

python3 build.py --check only checks that the kit arrived whole. Needs Python 3.10 or newer and the target's TensorRT;
what else is missing is installed into .venv inside this folder (--no-install: it is only named).
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
NEEDED = ("numpy", "tokenizers", "jinja2", "click", "rich", "onnx", "onnx_ir", "ml_dtypes")
PYTHON = (3, 10)
FIRST_CUDA_13 = 13_000
UNMEASURED = "Without cuda-bindings engines are compiled, but neither measured nor run."
LOG_CHARACTERS = 20_000


def main(arguments: list[str] | None = None) -> int:
    """0 when everything went well; what did not is told in one paragraph and in report.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that the kit arrived whole")
    parser.add_argument("--no-install", action="store_true", help="do not make .venv; name what is missing")
    options = parser.parse_args(arguments)
    try:
        kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
        damaged, target = damaged_files(kit), kit["target"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return fail(f"kit.json cannot be read ({error}). Copy the kit again.")
    if damaged:
        return fail(f"{len(damaged)} files did not arrive whole, the first: {damaged[0]}. Copy the kit again.")
    print(f"{len(kit['files'])} files are whole. Target: {target}.")
    if options.check:
        return 0
    if sys.version_info < PYTHON:
        return fail("Python 3.10 or newer is needed: run this script with another python3.")
    python = interpreter(install=not options.no_install)
    return build(kit, python) if python else 1


def damaged_files(kit: dict[str, Any]) -> list[str]:
    """Files of the kit that are missing or not the ones that were written."""
    return [record["name"] for record in kit["files"] if sha256(HERE / record["name"]) != record["sha256"]]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(8 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def interpreter(install: bool) -> str | None:
    """A Python that has what building needs: this one, or one in .venv that also sees the system's TensorRT."""
    missing = [name for name in NEEDED if not importable(name)]
    bindings = "" if importable("cuda.bindings") else cuda_bindings()
    if not install and bindings:
        print(f"{UNMEASURED} Run: {sys.executable} -m pip install '{bindings}'")
    if not missing and not (install and bindings):
        return sys.executable
    if not install:
        fail(f"Missing: {', '.join(missing)}. Run: {sys.executable} -m pip install -r requirements.txt")
        return None
    python = VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
    steps = [] if python.is_file() else [[sys.executable, "-m", "venv", "--system-site-packages", str(VENV)]]
    steps.append([str(python), "-m", "pip", "install", "--quiet", "-r", str(HERE / "requirements.txt")])
    for step in steps:
        print("+", " ".join(step), flush=True)
        if subprocess.run(step, check=False).returncode:
            fail(f"That did not work. Install these yourself and run again: {', '.join(missing)}.")
            return None
    if bindings:
        step = [str(python), "-m", "pip", "install", "--quiet", bindings]
        print("+", " ".join(step), flush=True)
        if subprocess.run(step, check=False).returncode:
            print(f"{UNMEASURED} Install {bindings} yourself to measure and to run.")
    return str(python)


def importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package it is in
        return False


def cuda_bindings() -> str:
    """What to install to measure and run here: cuda-bindings for the CUDA that this machine's driver speaks. Nothing
    where there is no driver.
    """
    version = ctypes.c_int()
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return "cuda-bindings>=12.6,<13" if version.value < FIRST_CUDA_13 else "cuda-bindings>=13"


def build(kit: dict[str, Any], python: str) -> int:
    """Run the build, and keep what it said with the machine's facts in report.json."""
    environment = os.environ | {"PYTHONPATH": str(HERE / "lib"), "ORT_DISABLE_TELEMETRY": "1"}
    command = [python, "-m", "dash_export", *kit["command"]]
    print("+", " ".join(command), flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    doctor = [python, "-m", "dash_export", "doctor", "--json"]
    machine = subprocess.run(doctor, cwd=HERE, env=environment, capture_output=True, text=True, check=False).stdout
    folder = HERE / kit["command"][1] / "engines" / kit["target"]
    done = process.returncode == 0 and (folder / "build.json").is_file()
    report = {
        "target": kit["target"],
        "done": done,
        "build": json.loads((folder / "build.json").read_text(encoding="utf-8")) if done else None,
        "machine": json.loads(machine) if machine.startswith("{") else None,
        "log": "".join(lines)[-LOG_CHARACTERS:],
    }
    (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not done:
        return fail("The build did not finish; report.json says what happened.")
    print(
        f"Done. Engines: {folder}. Send back report.json, or copy {folder.parent.name}/{folder.name} into your bundle."
    )
    return 0


def fail(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
