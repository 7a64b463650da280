"""The attacks of tools/attack, a few trials of each: that they run, find what is there to be found, and clean up."""

import importlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
from click.testing import CliRunner

ATTACK = Path(__file__).parents[2] / "tools" / "attack"
DRAWN, LAST = 6, 5
"""Operations before which a command is killed: by seed, and the last ones."""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Make the attacks importable; they set how small a build's dial is, for the whole process."""
    from dash_export.building import dial_table, pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ATTACK))
        for module, name in ((dial_table, "WINDOWS"), (dial_table, "SHARES"), (pipeline, "TRIALS")):
            patch.setattr(module, name, getattr(module, name))
        yield


@pytest.fixture(scope="module")
def stage(scripts: None) -> Iterator[Path]:  # noqa: ARG001
    with importlib.import_module("stage").staged() as made:
        yield made


@pytest.fixture
def power() -> ModuleType:
    return importlib.import_module("power")


@pytest.mark.parametrize("name", ["export", "export over a bundle", "build"])
def test_kills(name: str, power: ModuleType, stage: Path) -> None:
    """What is there is usable or says that it is not finished, and the next run completes it: the same files, and
    engines that give the same tokens. Killed before operations that are drawn, and before the last ones.
    """
    scene = importlib.import_module("stage").Scene.rehearsed(stage, name, power.powered)
    late = scene.operations - LAST + 1
    for number, moment in enumerate([*sorted(Random(0).sample(range(1, late), DRAWN)), *range(late, late + LAST)]):
        now_and_then = number % DRAWN == 0
        assert power.attempt(name, scene, number, 2 * now_and_then, moment, now_and_then) == []


def test_what_an_attack_would_find(stage: Path, tmp_path: Path) -> None:
    """Damage, other bytes and leftovers."""
    of_stage = importlib.import_module("stage")
    folder = Path(shutil.copytree(stage / "a", tmp_path / "a"))
    scene = of_stage.Scene(stage, "build", (), folder, 0, frozenset(of_stage._names(folder)))
    assert scene.finished(folder) == []
    (folder / "m.dash.unfinished").mkdir()
    (folder / "m.dash" / ".tmp-1-x").touch()
    assert scene.finished(folder) == [f"left behind: {name}" for name in ("m.dash.unfinished", "m.dash/.tmp-1-x")]
    (folder / "m.dash" / "engines" / "cpu-fp32" / "layer_00.data").unlink(missing_ok=True)
    next((folder / "m.dash" / "engines" / "cpu-fp32").glob("*.data")).write_bytes(b"")
    with pytest.raises(of_stage.FaultError, match="a build that is damaged"):
        scene.finished(folder)
    (folder / "m.dash" / "onnx" / "head.data").write_bytes(b"")
    assert "a bundle that is damaged" in scene.survived(folder)[0]


def test_streams(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds nothing, and has tried something. Whether memory stays flat is not seen in three seconds."""
    streams = importlib.import_module("streams")
    monkeypatch.setattr(streams, "FLAT", 0.5)
    result = CliRunner().invoke(streams.main, [str(tiny_root), "--minutes", "0.05"], catch_exceptions=False)
    line = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, line["faults"]) == (0, 0), result.stdout
    assert line["done"]["answered"]
