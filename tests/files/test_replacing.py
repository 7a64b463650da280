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
from dash_export.files.outputs import MARK, REPLACED, locked, remove_own, removed_on_error, unmark, work_folder
from dash_export.files.replacing import put_in_place, recover, recover_missing
from dash_export.models import Checkpoint
from tests.forged import folder_of, tree
from tests.tiny import tiny_policy

OURS = ("graphs", "old", "record", "inner/graphs")
OLD = ("graphs/1", "old", "record", "notes", "engines/cpu/1", "inner/graphs/1", "inner/notes")
NEW = ("graphs/2", "record", "inner/graphs/2")
KILLS = 20
STAYS = {"notes", "engines/cpu/1", "inner/notes"}


@pytest.mark.parametrize("operation", range(KILLS + 1))
def test_a_kill_at_any_moment(operation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old or the new output is there, whole and with all that is not ours; if neither is, whoever opens or writes
    it next puts the new one there.
    """
    output, old = folder_of(tmp_path / "a", *OLD), {name: f"a {name}".encode() for name in OLD}
    new = {name: f"a.unfinished {name}".encode() for name in NEW} | {name: old[name] for name in STAYS}
    work, steps = folder_of(work_folder(output, "export"), *NEW), iter(range(operation))
    output.chmod(0o750)

    def dying(sound: Callable[..., object]) -> Callable[..., object]:
        def step(*given: object, **named: object) -> object:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return sound(*given, **named)

        return step

    with monkeypatch.context() as patch:
        for where, name in ((Path, "replace"), (Path, "mkdir"), (Path, "unlink"), (os, "rmdir"), (os, "unlink")):
            patch.setattr(where, name, dying(getattr(where, name)))
        with suppress(KeyboardInterrupt), removed_on_error(work):
            put_in_place(work, output, OURS)
    left = tree(tmp_path)
    recover(output, OURS, "train")  # another command's: it is not that one's to go on from
    assert tree(tmp_path) == left
    missing = not output.exists()
    with locked(output, "export"):
        assert not recover_missing(output, OURS, "export"), "somebody writes it"
    assert recover_missing(output, OURS, "export") == missing
    assert whole(output) in (old, new)
    recover(output, OURS, "export")
    if work.exists():
        remove_own(work)
    unmark(output)  # as an export does with a whole one
    assert tree(output) in (old, new)
    assert output.stat().st_mode & 0o777 == 0o750
    assert operation < KILLS or next(steps, None) is not None, "more operations than are tried"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def whole(output: Path) -> dict[str, bytes]:
    """What a reader sees of an output: all but what is about to be removed."""
    return {name: text for name, text in tree(output).items() if not name.startswith((".replaced/", MARK))}


def test_a_folder_of_a_stranger_is_not_put_in_place(tmp_path: Path) -> None:
    """With a link where the old output would lie: what that leads to stays where it is."""
    docs, output = folder_of(tmp_path / "docs", "cv.txt"), tmp_path / "a"
    (work_folder(output, "export") / REPLACED).symlink_to(docs)
    recover_missing(output, OURS, "export")
    assert tree(docs) == {"cv.txt": b"docs cv.txt"}
    assert not output.exists()


@pytest.mark.parametrize("locked_folder", ["a", "graphs", "locked"])
def test_a_read_only_part_is_told_before(locked_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth: not by the removal that it would end."""
    output = folder_of(tmp_path / "a", "graphs/1", "graphs/locked/2", "record")
    before = tree(output)
    monkeypatch.setattr(replacing.os, "access", lambda path, _: path.name != locked_folder)
    with pytest.raises(OutputError, match=f"{locked_folder} may not be written: nothing of"):
        put_in_place(folder_of(work_folder(output, "export"), "graphs/2", "record"), output, OURS)
    assert tree(output) == before


@pytest.mark.parametrize("mounted", [".", "graphs/deep", "mine"])
def test_a_mount_point_is_not_replaced(mounted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder_of(tmp_path / "a", "graphs/1", "graphs/deep/2", "record", "mine/4")
    before, work = tree(output), folder_of(work_folder(output, "export"), "graphs/2", "record")
    monkeypatch.setattr(replacing, "_mount_points", lambda: {output.resolve() / mounted, Path("/"), Path("/proc")})
    with pytest.raises(OutputError, match=r"is a mount point: nothing of .* was replaced"):
        put_in_place(work, output, OURS)
    assert tree(output) == before
    monkeypatch.undo()
    put_in_place(work, output, OURS)
    assert tree(output).keys() == {"graphs/2", "record", "mine/4"}
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


@pytest.mark.parametrize("what", ["a folder", "a link to a bundle", "a link to nowhere"])
def test_what_appears_at_the_output_is_kept(
    what: str, tiny_model: Checkpoint, own_bundle: Path, tmp_path: Path
) -> None:
    """And so is the work."""
    output, bundle = tmp_path / "a.dash", tree(own_bundle)

    def appear(name: str, *_: object) -> None:
        if name == "head" and what == "a folder":
            folder_of(output, "manifest.json", "config.json", "onnx/mine")
        elif name == "head":
            output.symlink_to(own_bundle if what.endswith("bundle") else "nowhere")

    with pytest.raises((BundleError, OutputError), match=r"is not a bundle: it will not be|has become a link"):
        export(tiny_model, output, progress=appear)
    if what == "a folder":
        assert tree(output).keys() == {"manifest.json", "config.json", "onnx/mine"}
    output.rename(tmp_path / "mine")
    assert (tmp_path / "a.dash.unfinished").is_dir()
    made = export(tiny_model, output)
    made.verify(made.manifest.files)
    assert tree(own_bundle) == bundle


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


@pytest.mark.parametrize("ended", ["sync", "remove"])
def test_an_export_ended_while_it_replaces_a_bundle(ended: str, tiny_model: Checkpoint, tmp_path: Path) -> None:
    """Whoever opens it finds the new one, and the next export cleans up. What is not the bundle's stays."""
    output = tmp_path / "a.dash"
    build(export(tiny_model, output), "portable")
    folder_of(output, "notes/a.txt")
    kept = tree(output / "notes"), tree(output / "engines")
    with pytest.MonkeyPatch.context() as patch:
        effects = iter([None, KeyboardInterrupt] if ended == "sync" else [KeyboardInterrupt])
        patch.setattr(replacing, ended, Mock(side_effect=effects))
        with pytest.raises(KeyboardInterrupt):
            export(tiny_model, output, tiny_policy(tiny_model))
    assert output.exists() == (ended == "remove")
    made = Bundle.open(output)
    made.verify(made.manifest.files)
    assert made.manifest.policy.has_network
    assert made.targets() == ["portable"]
    assert export(tiny_model, output, tiny_policy(tiny_model)).manifest == made.manifest
    assert {path.name for path in tmp_path.iterdir()} == {"a.dash"}
    assert not {*output.glob(".*")}
    assert (tree(output / "notes"), tree(output / "engines")) == kept


def test_folders_of_others_are_no_bundles(tmp_path: Path) -> None:
    """A web application may have a manifest, and models in a folder called onnx."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    check_outside_bundles(tmp_path / "public" / "my.dash")
    (tmp_path / "onnx" / "layer_00.onnx").write_text("")
    with pytest.raises(OutputError, match="would lie inside the bundle"):
        check_outside_bundles(tmp_path / "public" / "my.dash")
