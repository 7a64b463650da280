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
from dash_export.outputs import work_folder
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


def test_export(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    expected = records(export(checkpoint, tmp_path / "whole.dash", tiny_policy(checkpoint)).manifest.files)
    (tmp_path / "count").mkdir()
    for moment in moments(
        victims.export_victim, tmp_path / "counted", str(model), str(tmp_path / "count" / "a.dash"), "none"
    ):
        output = tmp_path / f"at-{moment}" / "a.dash"
        output.parent.mkdir()
        assert run(victims.export_victim, str(model), str(output), "none", moment, str(tmp_path / "no")) == -9
        assert state(output) in ("usable", "unfinished")
        bundle = export(checkpoint, output, tiny_policy(checkpoint))
        bundle.verify(bundle.manifest.files)
        assert records(bundle.manifest.files) == expected
        assert not leftovers(output.parent), f"killed at {moment}"


def test_export_over_a_bundle(model: Path, tmp_path: Path) -> None:
    """Another policy over a built bundle: the old or the new one is there, and its engines are not lost for good."""
    checkpoint = open_checkpoint(model)
    policy, other = tiny_policy(checkpoint), tiny_policy(checkpoint, "linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "SHARES", (0.5,))
        first = export(checkpoint, tmp_path / "old" / "a.dash", policy)
        build(first, "cpu", weights="fp32")
        before = records(first.manifest.files)
        shutil.copytree(tmp_path / "old", tmp_path / "count")
        after = records(export(checkpoint, tmp_path / "new.dash", other).manifest.files)
        for moment in moments(
            victims.export_victim, tmp_path / "counted", str(model), str(tmp_path / "count" / "a.dash"), "linear"
        ):
            output = tmp_path / f"at-{moment}" / "a.dash"
            shutil.copytree(tmp_path / "old", output.parent)
            assert run(victims.export_victim, str(model), str(output), "linear", moment, str(tmp_path / "no")) == -9
            assert state(output) in ("usable", "unfinished")
            if state(output) == "usable":
                assert records(Bundle.open(output).manifest.files) in (before, after)
            bundle = export(checkpoint, output, other)
            bundle.verify(bundle.manifest.files)
            assert records(bundle.manifest.files) == after
            assert not leftovers(output.parent) - {".journal.json"}, f"killed at {moment}"
            if moment % 3 == 0:
                made = build(bundle, "cpu", weights="fp32")
                bundle.verify(made.files)
            shutil.rmtree(output.parent)


def test_going_back_after_a_kill(model: Path, tmp_path: Path) -> None:
    """Killed while the engines were on their way into the new bundle, then the old policy again, a build, and the new
    one.
    """
    checkpoint = open_checkpoint(model)
    policy, other = tiny_policy(checkpoint), tiny_policy(checkpoint, "linear")
    output = tmp_path / "a.dash"
    build(export(checkpoint, output, policy), "cpu", weights="fp32")
    shutil.copytree(output / "engines", work_folder(output, "export") / "engines")
    build(export(checkpoint, output, policy), "cpu", weights="fp32")
    bundle = export(checkpoint, output, other)
    bundle.verify(build(bundle, "cpu", weights="fp32").files)


def test_build(model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    export(checkpoint, tmp_path / "whole" / "a.dash", tiny_policy(checkpoint))
    shutil.copytree(tmp_path / "whole", tmp_path / "count")
    drawn = moments(victims.build_victim, tmp_path / "counted", str(tmp_path / "count" / "a.dash"))
    expected = records(Bundle.open(tmp_path / "count" / "a.dash").load_build("cpu-fp32").files)
    tokens = DashRuntime.load(tmp_path / "count" / "a.dash", "cpu-fp32").generate(random_ids(5), 8).tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dial, "WINDOWS", 1)
        patch.setattr(dial, "SHARES", (0.5,))
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
            np.testing.assert_array_equal(
                DashRuntime.load(output, "cpu-fp32").generate(random_ids(5), 8).tokens, tokens
            )
            shutil.rmtree(output.parent)
