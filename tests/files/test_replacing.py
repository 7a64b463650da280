"""How an output takes its place, and what of somebody else's lies in the way."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import check_outside_bundles
from dash_export.bundle.policy_file import check_replaceable, save_policy
from dash_export.errors import BundleError, OutputError, PolicyError
from dash_export.files import replacing
from dash_export.files.artifacts import write_atomic
from dash_export.files.outputs import MARK, PLAN, mark, remove_own, work_folder
from dash_export.files.replacing import put_in_place, recover
from dash_export.models import Checkpoint
from tests.forged import folder_of, tree
from tests.tiny import tiny_policy

OURS = ("graphs", "old", "record")


@pytest.mark.parametrize("killed_before", range(14))
def test_recovery(killed_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever operation is the last one, the old or the new output is there in the end, and all that is not ours."""
    output = folder_of(tmp_path / "a", "graphs/1", "old", "record", "notes", "engines/cpu/1")
    new, mine = {"graphs/2", "record"}, {"notes": b"a notes", "engines/cpu/1": b"a engines/cpu/1"}
    work = folder_of(work_folder(output, "export"), *new)
    steps = iter(range(killed_before))

    def dying(sound: Callable[..., object]) -> Callable[..., object]:
        def step(*given: object, **named: object) -> object:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return sound(*given, **named)

        return step

    with monkeypatch.context() as patch:
        for where, name in ((Path, "replace"), (Path, "unlink"), (Path, "rmdir"), (os, "rmdir"), (os, "unlink")):
            patch.setattr(where, name, dying(getattr(where, name)))
        with suppress(KeyboardInterrupt):
            put_in_place(work, output, OURS, "record", "export")
    left = tree(tmp_path)
    recover(output, OURS, "record", "train")  # another command's: it is not that one's to go on from
    assert tree(tmp_path) == left
    recover(output, OURS, "record", "export")
    if work.exists():
        remove_own(work)
        (output / MARK).unlink(missing_ok=True)
    changed = {name: text for name, text in tree(output).items() if name not in mine}
    assert changed in (
        {name: f"a.unfinished {name}".encode() for name in new},
        {name: f"a {name}".encode() for name in ("graphs/1", "old", "record")},
    )
    assert {name: text for name, text in tree(output).items() if name in mine} == mine
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("locked_folder", ["graphs", "locked"])
def test_a_read_only_part_is_told_before(locked_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth: not by the removal that it would end."""
    output = folder_of(tmp_path / "a", "graphs/1", "graphs/locked/2", "record")
    before = tree(output)
    monkeypatch.setattr(replacing.os, "access", lambda path, _: path.name != locked_folder)
    with pytest.raises(OutputError, match=f"{locked_folder} may not be written: nothing of"):
        put_in_place(folder_of(work_folder(output, "export"), "graphs/2", "record"), output, OURS, "record", "export")
    assert tree(output) == before


@pytest.mark.parametrize("mounted", [".", "graphs", "graphs/deep", "record", "another", "another/graphs"])
def test_a_mount_point_is_not_replaced(mounted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder_of(tmp_path / "a", "graphs/1", "graphs/deep/2", "record", "another/graphs/3", "mine/4")
    before, ours = tree(output), ("graphs", "another/graphs", "record")
    monkeypatch.setattr(replacing, "_mount_points", lambda: {output.resolve() / mounted, Path("/"), Path("/proc")})
    with pytest.raises(OutputError, match=r"is a mount point: nothing of .* was replaced"):
        put_in_place(folder_of(work_folder(output, "export"), "graphs/2", "record"), output, ours, "record", "export")
    assert tree(output) == before
    monkeypatch.setattr(replacing, "_mount_points", lambda: {output.resolve() / "mine", Path("/")})
    put_in_place(work_folder(output, "export"), output, ours, "record", "export")
    assert tree(output).keys() == {"graphs/2", "record", "mine/4"}
    monkeypatch.undo()
    assert Path("/proc") in replacing._mount_points()


@pytest.mark.parametrize("name", ["onnx", "config.json"])
def test_a_link_among_what_an_export_replaces(name: str, tiny_model: Checkpoint, tmp_path: Path) -> None:
    """What a user keeps elsewhere is not turned into a copy; told before the work."""
    output = export(tiny_model, tmp_path / "a.dash").root
    (output / name).rename(tmp_path / "elsewhere")
    (output / name).symlink_to(tmp_path / "elsewhere")
    before, calls = tree(tmp_path), []
    with pytest.raises(OutputError, match=f"{name} is a link, which is not replaced"):
        export(tiny_model, output, tiny_policy(tiny_model), progress=lambda *call: calls.append(call))
    assert (tree(tmp_path), calls) == (before, [])


def test_what_appears_at_the_output_during_an_export_is_kept(tiny_model: Checkpoint, tmp_path: Path) -> None:
    output, calls = tmp_path / "a.dash", []

    def appear(name: str, *_: object) -> None:
        calls.append(name)
        if name == "head":
            folder_of(output, "manifest.json", "config.json", "onnx/mine")

    with pytest.raises(BundleError, match="is not a bundle: it will not be overwritten"):
        export(tiny_model, output, progress=appear)
    assert tree(output).keys() == {"manifest.json", "config.json", "onnx/mine"}
    output.rename(tmp_path / "mine")
    made = export(tiny_model, output)  # of the work that was kept
    made.verify(made.manifest.files)
    assert {path.name for path in tmp_path.iterdir()} == {"a.dash", "mine"}


@pytest.mark.parametrize("where", ["a.dash/onnx/model", "a.dash.unfinished/model"])
def test_a_model_inside_its_output(where: str, tiny_model: Checkpoint, tmp_path: Path) -> None:
    """It would be gone with what is replaced, before or after it is read."""
    export(tiny_model, tmp_path / "a.dash")
    work_folder(tmp_path / "a.dash", "export")
    model = shutil.copytree(tiny_model.source, tmp_path / where)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="is read, and lies in what is replaced: move it away"):
        export(model, tmp_path / "a.dash")
    assert tree(tmp_path) == before


def test_a_policy_replaces_policies_only(tiny_model: Checkpoint, tmp_path: Path) -> None:
    """Told before hours of training, and before the policy beside a card is written."""
    path, beside = tmp_path / "p.safetensors", tmp_path / "p.json"
    policy, card = tiny_policy(tiny_model), {"kind": "token", "units": [], "settings": {}}
    beside.symlink_to("real.json")
    writings = (
        lambda: write_atomic(beside, "theirs"),
        lambda: check_replaceable(path),
        lambda: save_policy(path, policy, tiny_model.spec, card),
    )
    for writing in writings:
        with pytest.raises(OutputError, match=r"p\.json is a link, which is not replaced"):
            writing()
    assert not path.exists()
    beside.unlink()
    check_replaceable(path)
    save_policy(path, policy, tiny_model.spec, card)
    check_replaceable(path)
    beside.write_text('{"model_type": "llama"}')
    with pytest.raises(PolicyError, match=r"p\.json beside it exists and is no skip policy"):
        check_replaceable(path)


def test_an_export_that_was_ended_while_it_replaced_a_bundle(tiny_model: Checkpoint, tmp_path: Path) -> None:
    """It says so, and the next one goes on from there. What is not the bundle's stays: engines, a user's notes."""
    output = tmp_path / "a.dash"
    build(export(tiny_model, output), "portable")
    folder_of(output, "notes/a.txt")
    kept = tree(output / "notes"), tree(output / "engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacing, "remove", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export(tiny_model, output, tiny_policy(tiny_model))
    with pytest.raises(BundleError, match="not a finished bundle"):
        Bundle.open(output)
    made = export(tiny_model, output, tiny_policy(tiny_model))
    assert made.manifest.policy.has_network
    assert made.manifest.builds.keys() == {"portable"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.dash"}
    assert (tree(output / "notes"), tree(output / "engines")) == kept


def test_folders_of_others_are_no_bundles(tmp_path: Path) -> None:
    """A web application may have a manifest, and models in a folder called onnx."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    check_outside_bundles(tmp_path / "public" / "my.dash")
    (tmp_path / "onnx" / "layer_00.onnx").write_text("")
    with pytest.raises(OutputError, match="would lie inside the bundle"):
        check_outside_bundles(tmp_path / "public" / "my.dash")


def test_a_plan_of_another_version(tmp_path: Path) -> None:
    """Of what is not today's nothing is replaced: the command makes it anew."""
    output = folder_of(tmp_path / "a", "lib/one", "record")
    work = folder_of(work_folder(output, "export"), "lib/two", "record")
    mark(output, "export")
    (work / PLAN).write_text("lib\nrecord")
    before = tree(output)
    recover(output, ("lib/one", "record"), "record", "export")
    assert tree(output) | {MARK: before[MARK]} == before
    assert not work.exists()
