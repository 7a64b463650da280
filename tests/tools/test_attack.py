"""The attacks of tools/attack, a few trials of each: that they run, find what is there to be found, and clean up."""

import importlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

ATTACK = Path(__file__).parents[2] / "tools" / "attack"
DRAWN, LAST = 11, 6
"""Operations before which a command is killed: by seed, and the last ones."""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module")
def shared() -> Iterator[ModuleType]:
    """What the attacks share; they set how small a build's dial is, for the whole process."""
    from dash_export.building import dial_table, pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ATTACK))
        for module, name in ((dial_table, "WINDOWS"), (dial_table, "SHARES"), (pipeline, "TRIALS")):
            patch.setattr(module, name, getattr(module, name))
        yield importlib.import_module("shared")


@pytest.fixture(scope="module")
def stage(shared: ModuleType) -> Iterator[Any]:
    with shared.staged() as made:
        yield made


def test_writers(shared: ModuleType, stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Today's faults, if any, are not this test's: they are counted, and the folder is gone."""
    writers = importlib.import_module("writers")
    report = shared.Report("writers")
    for name in ("build + build, two targets", "train + build"):
        writers.attempt(name, 0, stage, report)
    assert not (stage.folder / "trial").exists()
    with suppress(SystemExit):  # on faults
        report.finish()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(counts["started"] and counts["succeeded"] for counts in line["tried"].values())


def test_writers_see_what_is_not_whole(stage: Any, tmp_path: Path) -> None:
    states = importlib.import_module("states")
    folder = tmp_path / "a"
    shutil.copytree(stage.folder / "a", folder)
    assert states.bundle_state(stage, folder) == states.policy_state(stage, folder) == "a"
    assert states.build_state(stage, folder, "fp32") == "whole"
    assert not states.leftovers(folder)
    shutil.copy(stage.folder / "b" / "p.json", folder)
    assert states.policy_state(stage, folder).kind == "a policy with the card of another"
    (folder / "m.dash.unfinished").mkdir()
    (folder / "m.dash" / ".tmp-1-x").touch()
    assert {fault.kind for fault in states.leftovers(folder)} == {
        "left behind: an unfinished folder",
        "left behind: a temporary name",
    }
    (folder / "m.dash" / "onnx" / "head.data").write_bytes(b"")
    assert states.bundle_state(stage, folder).kind == "a bundle that is damaged"


@pytest.mark.parametrize("name", ["export", "export over a bundle", "build"])
def test_kills(name: str, shared: ModuleType, stage: Any) -> None:
    """What is there is usable or says that it is not finished, and the next run completes it: the same files, and
    engines that give the same tokens. Killed once by time, else before an operation, the last ones among them.
    """
    kills, scenes = importlib.import_module("kills"), importlib.import_module("scenes")
    report = shared.Report("kills")
    scene = scenes.SCENES[name].rehearsed(stage, name, scenes.killable)
    late = scene.operations - LAST + 1
    moments = [None, *sorted(Random(0).sample(range(1, late), DRAWN)), *range(late, scene.operations + 1)]
    for moment in moments:
        kills.attempt(name, scene, 0, stage, report, moment)
    assert report.trials[name] == len(moments)
    assert report.notes[name]["killed"] >= DRAWN
    assert not report.faults[name]


def test_power(shared: ModuleType, stage: Any) -> None:
    power, scenes = importlib.import_module("power"), importlib.import_module("scenes")
    report = shared.Report("power")
    scene = scenes.SCENES["train"].rehearsed(stage, "trained", power.powered)
    power.attempt("trained", scene, 0, 2, stage, report)
    assert report.trials.keys() == {"trained, names in order", "trained, names by folder"}


def test_soak(shared: ModuleType, tiny_root: Path) -> None:  # noqa: ARG001  makes it importable
    arguments = [str(tiny_root), "--minutes", "0.05", "--threads", "3", "--tasks", "20", "--every", "0.5"]
    result = CliRunner().invoke(importlib.import_module("soak").main, arguments)
    line = json.loads(result.stdout.splitlines()[-1])
    assert line["faults"] == 0
    assert line["done"]


@pytest.mark.usefixtures("shared")
def test_streams(tiny_root: Path) -> None:
    result = CliRunner().invoke(
        importlib.import_module("streams").main, [str(tiny_root), "--minutes", "0.05"], catch_exceptions=False
    )
    line = json.loads(result.stdout.splitlines()[-1])
    assert line["faults"] == 0
    assert any("answered" in kind for kind in line["done"])


@pytest.mark.usefixtures("shared")
def test_bodies(tiny_root: Path) -> None:
    arguments = [str(tiny_root), "--target", "cpu-fp32", "--bodies", "60"]
    result = CliRunner().invoke(importlib.import_module("bodies").main, arguments)
    line = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, line["faults"]) == (0, 0), result.stdout
    assert line["done"].keys() >= {"200", "400"}


@pytest.mark.parametrize("order", ["in order", "by folder"])
@pytest.mark.usefixtures("shared")
def test_a_crash_loses_what_was_not_synced(tmp_path: Path, order: str) -> None:
    """A file that was synced, and its name, survive; what was not is there, in part or in whole, or not."""
    power = importlib.import_module("power")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("as it was")
    disk = power.Disk(folder, tmp_path / "store")
    for name in ("synced", "loose"):
        (folder / f".{name}").write_text(f"{name} content")
        disk.look()
        if name == "synced":
            _sync(disk, folder / ".synced")
        (folder / f".{name}").replace(folder / name)
        disk.look()
        if name == "synced":
            _sync(disk, folder)
    (folder / "old").unlink()
    disk.look()
    for inode in disk._held:
        disk._copy(inode, power.LAST)
    seen = set()
    for seed in range(60):
        power.crashed(tmp_path / "store", tmp_path / "after", order, Random(seed))
        after = {path.name: path.read_bytes() for path in (tmp_path / "after").iterdir()}
        shutil.rmtree(tmp_path / "after")
        assert after["synced"] == b"synced content"
        assert after.get("old", b"as it was") == b"as it was"
        assert after.keys() <= {"synced", "old", "loose", ".loose"}
        assert not after.keys() >= {"loose", ".loose"}
        seen |= {(name, content) for name, content in after.items() if name != "synced"}
    assert {("old", b"as it was"), ("loose", b""), ("loose", b"loose content"), (".loose", b"loose content")} <= seen


def _sync(disk: object, path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    disk.synced(file)  # type: ignore[attr-defined]
    os.close(file)
