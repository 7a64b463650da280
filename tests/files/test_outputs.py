"""Who may write an output, and what of somebody else's has the name of a work folder."""

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

from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.bundle.bundle import Bundle
from dash_export.errors import BundleError, BusyError, OutputError
from dash_export.files import outputs
from dash_export.files.outputs import (
    MARK,
    folder_locked,
    lock_file,
    locked,
    output_path,
    own_secret,
    remove_own,
    work_folder,
)
from dash_export.models import Checkpoint
from tests.forged import folder_of, tree
from tests.tiny import tiny_policy

HOLD = """
import sys, time
from pathlib import Path
from dash_export.files.outputs import locked
with locked(Path(sys.argv[1]), "export"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_holds_it(tmp_path: Path) -> None:
    output = tmp_path / "new" / "a.dash"
    with locked(output, "export"):
        said = rf"a\.dash is being written by dash-export export \(process {os.getpid()} on .*, since 20.*\)\. Wait"
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


def test_a_lock_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts; one that nobody holds, left by a kill, may be read, and so held."""
    sound, path = os.open, lock_file(tmp_path / "a")

    def without_permission(path: Path, how: int, *mode: int) -> int:
        if how & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return sound(path, how, *mode)

    with monkeypatch.context() as patch, locked(tmp_path / "a", "export"):
        patch.setattr(outputs.os, "open", without_permission)
        with pytest.raises(BusyError, match="dash-export export"), locked(tmp_path / "a", "export"):
            pass
    path.write_text("dash-export export (process 1 on here, since yesterday)")
    monkeypatch.setattr(outputs.os, "open", without_permission)
    with locked(tmp_path / "a", "export"), pytest.raises(BusyError), locked(tmp_path / "a", "export"):
        pass
    assert not path.exists()


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
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: path.symlink_to("x"),
        lambda path: path.write_text("my notes"),
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: path.write_bytes(bytes(12) + b"my notes"),
    ],
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


def test_what_is_not_ours_is_kept(tiny_model: Checkpoint, tmp_path: Path) -> None:
    """A link, a folder or another command's hours of work that happen to have the name of the work folder."""
    output = tmp_path / "a.safetensors"
    docs = folder_of(tmp_path / "docs", "cv.txt", "onnx/1")
    work = tmp_path / "a.safetensors.unfinished"
    work.symlink_to(docs)
    with pytest.raises(OutputError, match=r"\.unfinished is not a folder but a link"):
        export(tiny_model, output)
    work.unlink()
    docs.rename(work)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"is not this program's: it has no \.dash-export.*Move it away"):
        export(tiny_model, output)
    assert tree(tmp_path) == before
    shutil.rmtree(work)
    folder_of(work_folder(output, "train"), "tuning-state.pt")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"is the work of a killed dash-export 'train', and is kept: run that again"):
        export(tiny_model, output)
    assert tree(tmp_path) == before
    assert work_folder(output, "train") == work
    for left in (bytes(5), b"exp", b""):  # a loss of power leaves zeros, or a part of the name
        (work / MARK).write_bytes(left)
        assert work_folder(output, "export") == work
        assert (work / MARK).read_bytes() == b"export"
    export(tiny_model, output)
    assert not work.exists()


def test_an_own_folder_is_removed_whole(tmp_path: Path) -> None:
    work = work_folder(tmp_path / "a.dash", "export")
    (work / "onnx").mkdir()
    remove_own(work)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("link", ["onnx", MARK, "config.json"])
def test_a_link_inside_the_work_folder(link: str, tiny_model: Checkpoint, tmp_path: Path) -> None:
    """One that came with the work folder of a stranger: nothing is written or deleted behind it."""
    docs = folder_of(tmp_path / "docs", "cv.txt")
    work = work_folder(tmp_path / "a.dash", "export")
    (work / link).unlink(missing_ok=True)
    (work / link).symlink_to(docs if link == "onnx" else docs / "cv.txt")
    with suppress(OutputError):
        export(tiny_model, tmp_path / "a.dash")
    assert tree(docs) == {"cv.txt": b"docs cv.txt"}


def test_an_output_that_is_a_link(tiny_model: Checkpoint, tmp_path: Path) -> None:
    """The bundle that it points to is replaced, and it stays a link."""
    export(tiny_model, tmp_path / "v1.dash")
    link = tmp_path / "current.dash"
    link.symlink_to("v1.dash")
    made = export(tiny_model, link, tiny_policy(tiny_model))
    assert made.manifest.policy.has_network
    assert Bundle.open(tmp_path / "v1.dash").manifest == made.manifest
    assert link.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"v1.dash", "current.dash"}
    build(link, "portable")
    link.unlink()
    link.symlink_to("nowhere")
    with pytest.raises(OutputError, match="a link that points nowhere"):
        export(tiny_model, link)
    link.unlink()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    link.symlink_to("photos")
    with pytest.raises(BundleError, match="photos exists and is not a bundle"):
        export(tiny_model, link)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert output_path("a.dash") == Path("a.dash")
    assert output_path(".") == tmp_path
    assert output_path("..") == tmp_path.parent
    with pytest.raises(OutputError, match="is a whole file system"):
        output_path("/")


def test_a_secret_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert own_secret() == own_secret()
    (kept,) = (tmp_path / "state").rglob("key")
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_bytes(b"short")
    assert own_secret() != own_secret()
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert own_secret() != own_secret()
