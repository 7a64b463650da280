"""Every parser, fed with what failed once and for some seconds with new damage. For longer: `make fuzz`."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.helpers import ROOT, environment
from tests.fuzz.parsers import PARSERS, make_seeds

SECONDS = 6


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "seeds"
    make_seeds(folder)
    return folder


@pytest.mark.parametrize("name", PARSERS)
def test_sound_files_are_accepted(name: str, seeds: Path, tmp_path: Path) -> None:
    """Otherwise all damage would be refused for what was wrong before."""
    for number, data in enumerate(PARSERS[name].seeds(seeds)):
        PARSERS[name].run(Path(shutil.copytree(seeds, tmp_path / str(number))), data)


def test_damaged_files_are_read_or_refused(seeds: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(SECONDS), "--seed", "1", "--seeds", str(seeds)]
    done = subprocess.run(
        [*command, "--save", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    table = json.loads(done.stdout.splitlines()[-1])["parsers"]
    assert table.keys() == PARSERS.keys()
    for name, row in table.items():
        assert row["accepted"] > 0, name
        assert row["refused"] > 0, name


BREAKS = {
    "KeyError": "raise KeyError('x')",
    "hang": "import time; time.sleep(20)",
    "crash": "import os; os.kill(os.getpid(), 11)",
    "0.5 s": "import time; end = time.process_time() + 0.7\nwhile time.process_time() < end: pass",
    "memory": "x = bytearray(100 << 20)",
    "MemoryError": "x = bytearray(8 << 30)",
    "outside": "open('../outside', 'w')",
}
HARNESS = f"""
from dataclasses import replace
from tests.fuzz import __main__ as fuzz
from tests.fuzz.parsers import PARSERS

fuzz.HANG, fuzz.LIMIT, fuzz.FEWEST = 3, 0.5, 1
plain = PARSERS.pop("prompts")
PARSERS.clear()
for name, code in {BREAKS!r}.items():
    PARSERS[name] = replace(plain, run=lambda folder, data, code=code: exec(code))
fuzz.main()
"""


def test_parsers_that_break_are_found(seeds: Path, tmp_path: Path) -> None:
    folders = ["--seeds", str(seeds), "--save", str(tmp_path)]
    command = [sys.executable, "-c", HARNESS, *folders, "--seconds", "1", "--corpus", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 1, done.stderr
    for name in BREAKS:
        (kept, *_) = (tmp_path / name).iterdir()
        assert f"{name} {kept.name}: {name}" in done.stderr
