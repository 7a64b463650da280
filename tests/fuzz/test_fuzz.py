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
    scratch = Path(shutil.copytree(seeds, tmp_path / "scratch"))
    for data in PARSERS[name].seeds(seeds):
        PARSERS[name].run(scratch, data)


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
