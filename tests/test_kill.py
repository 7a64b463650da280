"""Kill -9 during export, re-export and build: what is there is usable or says it is unfinished, and the next run
completes it.

Each victim is killed before one of its file operations, drawn by seed from all it makes: what lies on disk changes only
there.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.artifacts import FileRecord
from dash_export.building import build, dial
from dash_export.bundle import Bundle
from dash_export.errors import BundleError
from dash_export.exporting import export
from dash_export.models import open_checkpoint
from tests import victims
from tests.tiny import random_ids, save_model, tiny_policy

MOMENTS = 20
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.tiny", "tests.victims", "dash_export.building.calibrate", "dash_export.graphs.ort"])

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def run(target: Callable[..., None], *args: object) -> int:
    """The exit code of `target` in a process of its own: -9 when it was killed."""
    process = FORK.Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the victim hangs"
    return process.exitcode


def moments(target: Callable[..., None], counted: Path, *args: object) -> list[int]:
    """Seeded moments among all file operations of an undisturbed run, which is made here once. Always the last ones
    too.
    """
    assert run(target, *args, 0, str(counted)) == 0
    total = int(counted.read_text())
    assert total > MOMENTS
    drawn = random.Random(0).sample(range(1, total - 5), MOMENTS - 6)
    return [*sorted(drawn), *range(total - 5, total + 1)]


def state(root: Path) -> str:
    """`usable`, `unfinished`, or what another error says."""
    try:
        bundle = Bundle.open(root)
        bundle.verify(bundle.manifest.files)
    except BundleError as error:
        says_so = "no bundle" in str(error) or "not a finished bundle" in str(error)
        return "unfinished" if says_so else str(error)
    return "usable"


def records(files: tuple[FileRecord, ...]) -> dict[str, str]:
    return {record.name: record.sha256 for record in files}


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.name.startswith(".") or ".unfinished" in path.name}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("victim") / "model"
    save_model(folder, num_hidden_layers=5)
    return folder


@pytest.mark.parametrize("over", ["nothing", "a built bundle"])
def test_export(over: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old or the new one is there, with the same files in the end; engines are not lost for good."""
    monkeypatch.setattr(dial, "SHARES", (0.5,))
    checkpoint = open_checkpoint(model)
    form, before = "none", dict[str, str]()
    (tmp_path / "old").mkdir()
    if over == "a built bundle":
        first = export(checkpoint, tmp_path / "old" / "a.dash", tiny_policy(checkpoint))
        build(first, "cpu", weights="fp32")
        form, before = "linear", records(first.manifest.files)
    policy = tiny_policy(checkpoint, form)
    after = records(export(checkpoint, tmp_path / "new.dash", policy).manifest.files)

    def arguments(folder: Path) -> tuple[str, ...]:
        shutil.copytree(tmp_path / "old", folder)
        return str(model), str(folder / "a.dash"), form

    for moment in moments(victims.export_victim, tmp_path / "counted", *arguments(tmp_path / "count")):
        given = arguments(tmp_path / f"at-{moment}")
        output = Path(given[1])
        assert run(victims.export_victim, *given, moment, str(tmp_path / "no")) == -9
        assert state(output) in ("usable", "unfinished")
        if state(output) == "usable":
            assert records(Bundle.open(output).manifest.files) in (before, after)
        bundle = export(checkpoint, output, policy)
        bundle.verify(bundle.manifest.files)
        assert records(bundle.manifest.files) == after
        assert not leftovers(output.parent) - ({".journal.json"} if before else set()), f"killed at {moment}"
        if before and moment % 3 == 0:
            bundle.verify(build(bundle, "cpu", weights="fp32").files)
        shutil.rmtree(output.parent)


def test_build(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(model)
    export(checkpoint, tmp_path / "whole" / "a.dash", tiny_policy(checkpoint))
    shutil.copytree(tmp_path / "whole", tmp_path / "count")
    drawn = moments(victims.build_victim, tmp_path / "counted", str(tmp_path / "count" / "a.dash"))
    expected = records(Bundle.open(tmp_path / "count" / "a.dash").load_build("cpu-fp32").files)
    tokens = DashRuntime.load(tmp_path / "count" / "a.dash", "cpu-fp32").generate(random_ids(5), 8).tokens
    monkeypatch.setattr(dial, "WINDOWS", 1)
    monkeypatch.setattr(dial, "SHARES", (0.5,))
    for moment in drawn:
        output = tmp_path / f"at-{moment}" / "a.dash"
        shutil.copytree(tmp_path / "whole", output.parent)
        assert run(victims.build_victim, str(output), moment, str(tmp_path / "no")) == -9
        assert state(output) == "usable"
        bundle = Bundle.open(output)
        if bundle.targets():  # its writer was about to let its locks go
            bundle.verify(bundle.load_build("cpu-fp32").files)
        else:
            with pytest.raises(BundleError, match=r"is unfinished|does not exist"):
                bundle.load_build("cpu-fp32")
        made = build(bundle, "cpu", weights="fp32")
        assert records(made.files) == expected
        bundle.verify(made.files)
        np.testing.assert_array_equal(DashRuntime.load(output, "cpu-fp32").generate(random_ids(5), 8).tokens, tokens)
        shutil.rmtree(output.parent)
