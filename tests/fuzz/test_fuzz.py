"""Every parser, fed with what failed once and for a moment with new damage. For longer: `make fuzz`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.helpers import ROOT, environment
from tests.fuzz.parsers import PARSERS, make_seeds

SECONDS = 20


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
    "0.2 s": "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass",
    "memory": "x = bytearray(200 << 20)",
    "MemoryError": "x = bytearray(8 << 30)",
    "outside": "open('../outside', 'w')",
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_parser_that_breaks_is_found(name: str, seeds: Path, tmp_path: Path) -> None:
    """By the harness, which is broken on purpose here."""
    code = f"""
import sys
from dataclasses import replace
from tests.fuzz import __main__ as fuzz
from tests.fuzz.parsers import PARSERS

def broken(folder, data):
    exec({BREAKS[name]!r})

fuzz.HANG, fuzz.LIMIT = 4, 0.2
PARSERS["tasks"] = replace(PARSERS["tasks"], run=broken)
sys.argv += ["--seconds", "0.5", "--only", "tasks", "--jobs", "1"]
fuzz.main()
"""
    folders = ["--seeds", str(seeds), "--save", str(tmp_path)]
    command = [sys.executable, "-c", code, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 1, done.stderr
    assert name in done.stderr
    assert list((tmp_path / "tasks").iterdir())
