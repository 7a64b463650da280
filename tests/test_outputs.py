"""Who may write an output, and what of somebody else's lies in the way."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dash_export import outputs, replacing
from dash_export.artifacts import write_atomic
from dash_export.building import build
from dash_export.bundle import Bundle
from dash_export.errors import BundleError, BusyError, CheckpointError, OutputError, PolicyError
from dash_export.exporting import export
from dash_export.models import Checkpoint
from dash_export.outputs import (
    MARK,
    folder_locked,
    lock_file,
    locked,
    named,
    own_secret,
    remove_own,
    work_folder,
)
from dash_export.policy import check_replaceable, save_policy
from dash_export.replacing import put_in_place, recover
from tests.tiny import tiny_checkpoint, tiny_policy

HOLD = """
import sys, time
from pathlib import Path
from dash_export.outputs import locked
with locked(Path(sys.argv[1]), "export"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("outputs") / "model")


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{root.name} {name}")
    return root


def test_a_second_writer_is_told_who_holds_it(tmp_path: Path) -> None:
    output = tmp_path / "new" / "a.dash"
    with locked(output, "export"):
        said = (
            rf"a\.dash is being written by dash-export export \(process {os.getpid()} on .*, since 20\d\d-.*\)\. Wait"
        )
        with pytest.raises(BusyError, match=said), locked(output, "train"):
            pass
        with pytest.raises(BundleError, match="is being written by dash-export export"):
            Bundle.open(output)
        with locked(output.with_name("b.dash"), "export"):
            pass
    assert not list(tmp_path.iterdir())
    with locked(output, "export"):
        pass


def test_a_writer_that_dies_locks_nobody_out(tmp_path: Path) -> None:
    output = tmp_path / "a.dash"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"process {holder.pid} on"), locked(output, "export"):
            pass
        holder.send_signal(signal.SIGKILL)
    with pytest.raises(BundleError, match="There is no bundle"):
        Bundle.open(output)
    for left in (lock_file(output).read_bytes(), bytes(100)):  # zeros: as a loss of power leaves it
        lock_file(output).write_bytes(left)
        with locked(output, "export"):
            pass
        assert not list(tmp_path.iterdir())


def test_another_user_s_lock_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = os.open

    def without_permission(path: Path, how: int, *mode: int) -> int:
        if how & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sound(path, how, *mode)

    with locked(tmp_path / "a", "export"):
        monkeypatch.setattr(outputs.os, "open", without_permission)
        with pytest.raises(BusyError, match="dash-export export"), locked(tmp_path / "a", "export"):
            pass


def _count(output: Path, counter: Path, rounds: int) -> None:
    while rounds:
        with suppress(BusyError), locked(output, "count"):
            counter.write_text(str(int(counter.read_text()) + 1))
            rounds -= 1


def test_one_at_a_time(tmp_path: Path) -> None:
    """The lock file goes with every release, and still no two hold it."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_count, args=(tmp_path / "a", counter, 200)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert counter.read_text() == "800"
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_builds_share_a_bundle_and_exports_do_not(tmp_path: Path) -> None:
    target = tmp_path / "cpu"
    with (
        folder_locked(tmp_path, [], shared=True),
        folder_locked(tmp_path, [], shared=True),
        locked(target, "build for cpu"),
        pytest.raises(BusyError, match="dash-export build for cpu"),
        folder_locked(tmp_path, [lock_file(target)], shared=False),
    ):
        pass
    with (
        folder_locked(tmp_path, [], shared=False),
        pytest.raises(BusyError, match="another dash-export"),
        folder_locked(tmp_path, [], shared=True),
    ):
        pass


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("x"), lambda path: path.write_text("my notes")]
)
def test_what_is_no_lock_is_kept(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = lock_file(tmp_path / "a.dash")
    make(path)
    with pytest.raises(OutputError, match="is no lock that this program can"), locked(tmp_path / "a.dash", "export"):
        pass
    assert os.path.lexists(path)
    (tmp_path / "plain").write_text("mine")
    with pytest.raises(OutputError, match="is no folder to write in"), locked(tmp_path / "plain/x.dash", "export"):
        pass


def test_what_is_not_ours_is_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A link, a folder or another command's hours of work that happen to have the name of the work folder."""
    output = tmp_path / "a.safetensors"
    docs = folder_of(tmp_path / "docs", "cv.txt", "onnx/1")
    work = tmp_path / "a.safetensors.unfinished"
    work.symlink_to(docs)
    with pytest.raises(OutputError, match=r"\.unfinished is not a folder but a link"):
        export(checkpoint, output)
    work.unlink()
    docs.rename(work)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"is not this program's: it has no \.dash-export.*Move it away"):
        export(checkpoint, output)
    assert tree(tmp_path) == before
    shutil.rmtree(work)
    folder_of(work_folder(output, "train"), "tuning-state.pt")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"is the work of a killed dash-export 'train', and is kept: run that again"):
        export(checkpoint, output)
    assert tree(tmp_path) == before
    assert work_folder(output, "train") == work
    for left in (bytes(5), b"exp", b""):  # a loss of power leaves zeros, or a part of the name
        (work / MARK).write_bytes(left)
        assert work_folder(output, "export") == work
        assert (work / MARK).read_bytes() == b"export"
    export(checkpoint, output)
    assert not work.exists()


@pytest.mark.parametrize("link", ["onnx", "engines", MARK, "config.json"])
def test_a_link_inside_the_work_folder(link: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One that came with the work folder of a stranger: nothing is written or deleted behind it."""
    docs = folder_of(tmp_path / "docs", "cv.txt")
    work = work_folder(tmp_path / "a.dash", "export")
    (work / MARK).unlink()
    (work / link).symlink_to(docs if link in ("onnx", "engines") else docs / "cv.txt")
    if link != MARK:
        (work / MARK).touch()
    try:
        export(checkpoint, tmp_path / "a.dash")
    except OutputError:
        assert link != "engines"
    assert tree(docs) == {"cv.txt": b"docs cv.txt"}


def test_an_output_that_is_a_link(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The bundle that it points to is replaced, and it stays a link."""
    export(checkpoint, tmp_path / "v1.dash")
    link = tmp_path / "current.dash"
    link.symlink_to("v1.dash")
    made = export(checkpoint, link, tiny_policy(checkpoint))
    assert made.manifest.policy.has_network
    assert Bundle.open(tmp_path / "v1.dash").manifest == made.manifest
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"v1.dash", "current.dash"}
    build(link, "portable")
    link.unlink()
    link.symlink_to("nowhere")
    with pytest.raises(OutputError, match="a link that points nowhere"):
        export(checkpoint, link)
    link.unlink()
    (tmp_path / "photos").mkdir()
    link.symlink_to("photos")
    with pytest.raises(BundleError, match="photos exists and is not a bundle"):
        export(checkpoint, link)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named("a.dash") == Path("a.dash")
    assert named(".") == tmp_path
    assert named("..") == tmp_path.parent
    with pytest.raises(OutputError, match="is a whole file system"):
        named("/")


OURS = ("graphs", "old", "record")


@pytest.mark.parametrize("killed_before", range(14))
def test_recovery(killed_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever operation is the last one, the old or the new output is there in the end, and all that is not ours."""
    output = folder_of(tmp_path / "a", "graphs/1", "old", "record", "notes", "engines/cpu/1")
    new, mine = {"graphs/2", "record"}, {"notes": b"a notes", "engines/cpu/1": b"a engines/cpu/1"}
    work = folder_of(work_folder(output, "export"), *new)
    steps = iter(range(killed_before))

    class KilledError(BaseException):
        pass

    def dying(sound: Callable[..., object]) -> Callable[..., object]:
        def step(*given: object, **named: object) -> object:
            if next(steps, None) is None:
                raise KilledError
            return sound(*given, **named)

        return step

    with monkeypatch.context() as patch:
        for where, name in ((Path, "replace"), (Path, "unlink"), (Path, "rmdir"), (os, "rmdir"), (os, "unlink")):
            patch.setattr(where, name, dying(getattr(where, name)))
        with suppress(KilledError):
            put_in_place(work, output, OURS, "record")
    recover(output, OURS, "record")
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
def test_what_may_not_be_written_is_told_before(
    locked_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any depth: not by the removal that it would end."""
    output = folder_of(tmp_path / "a", "graphs/1", "graphs/locked/2", "record")
    before = tree(output)
    monkeypatch.setattr(replacing.os, "access", lambda path, _: path.name != locked_folder)
    with pytest.raises(OutputError, match=f"{locked_folder} may not be written: nothing of"):
        put_in_place(folder_of(work_folder(output, "export"), "graphs/2", "record"), output, OURS, "record")
    assert tree(output) == before


@pytest.mark.parametrize("mounted", [".", "graphs", "graphs/deep", "record", "a kit's", "a kit's/graphs"])
def test_a_mount_point_is_not_replaced(mounted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = folder_of(tmp_path / "a", "graphs/1", "graphs/deep/2", "record", "a kit's/graphs/3", "mine/4")
    before, ours = tree(output), ("graphs", "a kit's/graphs", "record")
    monkeypatch.setattr(replacing, "_mount_points", lambda: {output.resolve() / mounted, Path("/"), Path("/proc")})
    with pytest.raises(OutputError, match=r"is a mount point: nothing of .* was replaced"):
        put_in_place(folder_of(work_folder(output, "export"), "graphs/2", "record"), output, ours, "record")
    assert tree(output) == before
    monkeypatch.setattr(replacing, "_mount_points", lambda: {output.resolve() / "mine", Path("/")})
    put_in_place(work_folder(output, "export"), output, ours, "record")
    assert tree(output).keys() == {"graphs/2", "record", "mine/4"}
    monkeypatch.undo()
    assert Path("/proc") in replacing._mount_points()


@pytest.mark.parametrize("name", ["onnx", "config.json"])
def test_a_link_among_what_an_export_replaces(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What a user keeps elsewhere is not turned into a copy; told before the work."""
    output = export(checkpoint, tmp_path / "a.dash").root
    (output / name).rename(tmp_path / "elsewhere")
    (output / name).symlink_to(tmp_path / "elsewhere")
    before, calls = tree(tmp_path), []
    with pytest.raises(OutputError, match=f"{name} is a link, which is not replaced"):
        export(checkpoint, output, tiny_policy(checkpoint), progress=lambda *call: calls.append(call))
    assert (tree(tmp_path), calls) == (before, [])


def test_what_appears_at_the_output_during_an_export_is_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output, calls = tmp_path / "a.dash", []

    def appear(name: str, *_: object) -> None:
        calls.append(name)
        if name == "head":
            folder_of(output, "manifest.json", "config.json", "onnx/mine")

    with pytest.raises(BundleError, match="is not a bundle: it will not be overwritten"):
        export(checkpoint, output, progress=appear)
    assert tree(output).keys() == {"manifest.json", "config.json", "onnx/mine"}
    output.rename(tmp_path / "mine")
    made = export(checkpoint, output)  # of the work that was kept
    made.verify(made.manifest.files)
    assert {path.name for path in tmp_path.iterdir()} == {"a.dash", "mine"}


@pytest.mark.parametrize("where", ["a.dash/onnx/model", "a.dash.unfinished/model"])
def test_a_model_inside_its_output(where: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It would be gone with what is replaced, before or after it is read."""
    export(checkpoint, tmp_path / "a.dash")
    work_folder(tmp_path / "a.dash", "export")
    model = shutil.copytree(checkpoint.source, tmp_path / where)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="is read, and lies in what is replaced: move it away"):
        export(model, tmp_path / "a.dash")
    assert tree(tmp_path) == before


def test_a_policy_replaces_policies_only(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Told before hours of training, and before the policy beside a card is written."""
    path, beside = tmp_path / "p.safetensors", tmp_path / "p.json"
    policy, card = tiny_policy(checkpoint), {"kind": "token", "units": [], "settings": {}}
    beside.symlink_to("real.json")
    writings = (
        lambda: write_atomic(beside, "theirs"),
        lambda: check_replaceable(path),
        lambda: save_policy(path, policy, checkpoint.spec, card),
    )
    for writing in writings:
        with pytest.raises(OutputError, match=r"p\.json is a link, which is not replaced"):
            writing()
    assert not path.exists()
    beside.unlink()
    check_replaceable(path)
    save_policy(path, policy, checkpoint.spec, card)
    check_replaceable(path)
    beside.write_text('{"model_type": "llama"}')
    with pytest.raises(PolicyError, match=r"p\.json beside it exists and is no skip policy"):
        check_replaceable(path)
    beside.unlink()
    path.write_bytes(b"weights of hours")
    with pytest.raises(PolicyError, match="will not be overwritten"):
        check_replaceable(path)


def test_a_model_that_changes_while_it_is_exported(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"

    def change(name: str, *_: object) -> None:
        if name == "layer_02":
            other = bytearray(weights.read_bytes())
            other[-1] ^= 1
            weights.write_bytes(other)

    with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
        export(checkpoint, tmp_path / "a.dash", progress=change)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_graphs_that_change_while_they_are_built(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Nothing that was made of them is taken for an engine of the sound ones later."""
    bundle = export(checkpoint, tmp_path / "a.dash")
    path, sound = bundle.path("onnx/layer_04.data"), bundle.path("onnx/layer_04.data").read_bytes()
    expected = {record.name: record.sha256 for record in build(bundle, "cpu", weights="fp32").files}
    shutil.rmtree(bundle.root / "engines")

    def change(name: str, *_: object) -> None:
        if name == "layers_00-01":
            path.write_bytes(bytes(reversed(sound)))

    with pytest.raises(BundleError, match=r"layer_04\.data was replaced while it was read"):
        build(bundle, "cpu", weights="fp32", progress=change)
    path.write_bytes(sound)
    assert {record.name: record.sha256 for record in build(bundle, "cpu", weights="fp32").files} == expected


def test_a_secret_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert own_secret() == own_secret()
    (kept,) = (tmp_path / "state").rglob("key")
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_bytes(b"short")
    assert len(own_secret()) == 32
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert own_secret() != own_secret()


def test_an_export_that_was_ended_while_it_replaced_a_bundle(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It says so, and the next one goes on from there. What is not the bundle's stays: engines, a user's notes."""
    output = tmp_path / "a.dash"
    build(export(checkpoint, output), "portable")
    folder_of(output, "notes/a.txt")
    kept = tree(output / "notes"), tree(output / "engines")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacing, "remove", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(checkpoint, output, tiny_policy(checkpoint))
    with pytest.raises(BundleError, match="not a finished bundle"):
        Bundle.open(output)
    made = export(checkpoint, output, tiny_policy(checkpoint))
    assert made.manifest.policy.has_network
    assert made.manifest.builds.keys() == {"portable"}
    assert {path.name for path in tmp_path.iterdir()} == {"a.dash"}
    assert (tree(output / "notes"), tree(output / "engines")) == kept
