"""Build kit: python3 build.py compiles this folder's engines on this machine and writes report.json.

python3 build.py --check only checks that the kit arrived whole. Needs Python 3.10 or newer, the target's TensorRT and
what requirements.txt lists.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LOG_CHARACTERS = 20_000
OLDEST_PYTHON = (3, 10)
INSTALL = (
    "python3 -m venv --system-site-packages .venv && .venv/bin/python -m pip install -r requirements.txt && "
    ".venv/bin/python build.py"
)
"""Commands that make an environment, which also sees the system's TensorRT, and run this script in it."""


def main() -> int:
    """Check the kit and build. Return 0 on success; a failure is told in a paragraph, a build's also in report.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only check that the kit arrived whole")
    options = parser.parse_args()
    try:
        kit = json.loads((HERE / "kit.json").read_text(encoding="utf-8"))
        if kit.pop("sha256") != hashlib.sha256(json.dumps(kit).encode()).hexdigest():
            raise ValueError("it was changed or damaged after it was made")
        damaged = [record["name"] for record in kit["files"] if sha256(HERE / record["name"]) != record["sha256"]]
        target = kit["target"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return fail(f"kit.json cannot be read ({error}). Copy the kit again.")
    if damaged:
        return fail(f"{len(damaged)} files did not arrive whole, the first: {damaged[0]}. Copy the kit again.")
    print(f"{len(kit['files'])} files are whole. Target: {target}.")
    if options.check:
        return 0
    if sys.version_info < OLDEST_PYTHON:
        return fail("Python 3.10 or newer is needed: run this script with another python3.")
    lines = (HERE / "requirements.txt").read_text().splitlines()  # after `;`: for Python 3.10 only
    wanted = [line.partition(";")[0] for line in lines if ";" not in line or sys.version_info < (3, 11)]
    missing = [line for line in wanted if not installed(line)]
    if missing:
        return fail(f"Missing: {', '.join(missing)}. Run in {HERE}: {INSTALL}")
    return build(kit)


def installed(line: str) -> bool:
    """Return whether a package is there, in the version or a newer one that its line asks for (`numpy>=1.26`)."""
    name, _, least = line.partition(">=")
    if importlib.util.find_spec(name.strip()) is None:
        return False
    try:
        found = version(name.strip())
    except PackageNotFoundError:  # without metadata: nobody knows
        return True
    numbers, floor = ([int(part) for part in re.findall(r"\d+", text)[:3]] for text in (found, least))
    return numbers >= floor


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex; "" where it is missing, cannot be read or is not a regular file."""
    digest = hashlib.sha256()
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            while block := file.read(8 << 20):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def build(kit: dict[str, Any]) -> int:
    """Run the build, and write its result, its output and the facts of this machine to report.json."""
    environment = os.environ | {"PYTHONPATH": str(HERE / "lib"), "ORT_DISABLE_TELEMETRY": "1"}
    program = [sys.executable, "-m", "dash_export"]

    def doctor(*options: str) -> str:
        asked = [*program, "doctor", "--json", *options]
        return subprocess.run(asked, cwd=HERE, env=environment, capture_output=True, text=True, check=False).stdout

    machine = doctor("--probe")  # before the build: the report has the card's facts even if the build breaks off
    machine = machine if machine.startswith("{") else doctor()
    command = [*program, *kit["command"]]
    print("+", " ".join(command), flush=True)
    lines = []
    with subprocess.Popen(
        command, cwd=HERE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    folder = HERE / kit["command"][1] / "engines" / kit["target"]
    done = process.returncode == 0 and (folder / "build.json").is_file()
    report = {
        "target": kit["target"],
        "done": done,
        "build": json.loads((folder / "build.json").read_text(encoding="utf-8")) if done else None,
        "machine": json.loads(machine) if machine.startswith("{") else None,
        "log": "".join(lines)[-LOG_CHARACTERS:],
    }
    written = HERE / ".report.json"
    written.unlink(missing_ok=True)
    written.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    written.replace(HERE / "report.json")  # replaces a link, does not write through it
    if not done:
        return fail("The build did not finish; report.json says what happened.")
    print(f"Done. Engines: {folder}. Send back report.json; run from here, or copy {kit['command'][1]} as a whole.")
    return 0


def fail(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
