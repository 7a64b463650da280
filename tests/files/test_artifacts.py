"""Files made once per key."""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from dash_export.files.artifacts import JOURNAL, ArtifactStore, content_key, read_bounded, sha256_file, write_atomic


def writer(text: str) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        (folder / "a.data").write_text(text)
        return [folder / "a.data"]

    return write


def test_only_small_regular_files_are_read(tmp_path: Path) -> None:
    """A FIFO would hang, a sparse file would fill the memory."""
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "small").write_bytes(b"12345")
    assert read_bounded(tmp_path / "small", 5) == b"12345"
    for name, limit in (("small", 4), ("sparse", 1 << 20)):
        with pytest.raises(OSError, match=f"at most {limit} are read"):
            read_bounded(tmp_path / name, limit)
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            sha256_file(path)
    with pytest.raises(IsADirectoryError):
        read_bounded(tmp_path, 100)


def test_made_once_per_key_and_again_where_it_changed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    records = store.make("a", "key", writer("one"))
    assert ArtifactStore(tmp_path).current("a", "key") == records
    assert store.current("a", "other key") is None
    assert store.current("b", "key") is None
    (tmp_path / "a.data").write_text("two")
    assert store.current("a", "key") is None
    (tmp_path / "a.data").unlink()
    assert store.current("a", "key") is None
    store.make("a", "key", writer("one"))
    assert (tmp_path / "a.data").read_text() == "one"


ODD_NAMES = ["thesis.txt", "\ud800.onnx", "folder.data", ".journal.json", "a b.onnx", "x" * 300, "a\0"]


@pytest.mark.parametrize("name", [*ODD_NAMES, "..", "../mine.data", "{outside}/mine.data", 7])
def test_a_journal_that_lists_what_no_artifact_is(name: object, tmp_path: Path) -> None:
    """What a build no longer needs is deleted: nothing that a stranger's journal only says is there."""
    folder = tmp_path / "store"
    ArtifactStore(folder).make("a", "key", writer("one"))
    for mine in (folder / "thesis.txt", tmp_path / "mine.data"):
        mine.write_text("mine")
    (folder / "folder.data").mkdir()
    journal = json.loads((folder / JOURNAL).read_text())
    listed = str(name).format(outside=tmp_path) if isinstance(name, str) else name
    for forged in ("a", "b"):
        journal[forged] = {"key": "", "files": [{"name": listed, "bytes": 4, "sha256": ""}], "seconds": 0.0}
    (folder / JOURNAL).write_text(json.dumps(journal))
    store = ArtifactStore(folder)
    store.make("a", "key", writer("two"))
    store.keep_only({"a"})
    assert (folder / "thesis.txt").read_text() == (tmp_path / "mine.data").read_text() == "mine"
    assert (folder / "folder.data").is_dir()
    assert json.loads((folder / JOURNAL).read_text()).keys() == {"a"}


def test_only_what_was_made_under_the_secret_is_known(tmp_path: Path) -> None:
    """A stranger's compiled engine comes with a journal, and with every hash right."""
    records = ArtifactStore(tmp_path, b"mine").make("a", "key", writer("one"))
    assert ArtifactStore(tmp_path, b"mine").current("a", "key") == records
    assert ArtifactStore(tmp_path, b"other").current("a", "key") is None
    (tmp_path / "a.data").write_text("two")
    journal = json.loads((tmp_path / JOURNAL).read_text())
    journal["a"]["files"][0]["sha256"] = hashlib.sha256(b"two").hexdigest()
    (tmp_path / JOURNAL).write_text(json.dumps(journal))
    assert ArtifactStore(tmp_path, b"mine").current("a", "key") is None


ENTRY = {"key": "key", "files": [{"name": "a.data", "bytes": 3, "sha256": "0"}], "seconds": 1.0}
WRONG: list[object] = [[], {"a": 1}, None, {"a": {"key": "key", "files": [{"name": "x"}]}}, {"a": ENTRY}]
WRONG += [{"a": ENTRY | {"seconds": float("nan")}}, {"a": ENTRY | {"files": [{"name": "a.data", "bytes": "3"}]}}]


@pytest.mark.parametrize("text", ["", "{", *map(json.dumps, WRONG)])
def test_a_damaged_journal_makes_anew(text: str, tmp_path: Path) -> None:
    """A figure of it that was believed would be written into a build that nobody can open."""
    ArtifactStore(tmp_path).make("a", "key", writer("one"))
    (tmp_path / JOURNAL).write_text(text)
    store = ArtifactStore(tmp_path)
    assert store.current("a", "key") is None
    store.make("a", "key", writer("one"))
    assert ArtifactStore(tmp_path).current("a", "key")


def test_an_error_or_a_kill_leaves_nothing(tmp_path: Path) -> None:
    def fails(folder: Path) -> list[Path]:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / ".tmp-1-a").mkdir()
    (tmp_path / ".tmp-1-a" / "half").write_text("half")
    (tmp_path / ".tmp-mine").mkdir()  # who else names a thing so keeps it
    store = ArtifactStore(tmp_path)
    with pytest.raises(OSError, match="No space"):
        store.make("a", "key", fails)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-mine"]


def test_a_killed_process_of_the_same_number(tmp_path: Path) -> None:
    """Numbers of processes come again, soon in a container: what the killed one left is no part of the new artifact."""
    store = ArtifactStore(tmp_path)
    left = tmp_path / f".tmp-{os.getpid()}-a"
    left.mkdir()
    (left / "a.data").write_text("half")
    store.make("a", "key", lambda folder: [] if any(folder.iterdir()) else writer("whole")(folder))
    assert (tmp_path / "a.data").read_text() == "whole"


def test_what_a_dead_writer_left_goes(tmp_path: Path) -> None:
    """A link in the way is not followed."""
    for left in ("touch", "symlink_to"):
        (tmp_path / "mine").write_text("mine")
        temporary = tmp_path / ".tmp-a.json"
        temporary.touch() if left == "touch" else temporary.symlink_to("mine")
        write_atomic(tmp_path / "a.json", left)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": left, "mine": "mine"}


def test_content_key_tells_parts_apart() -> None:
    keys = {content_key("a", "b"), content_key("ab"), content_key("b", "a"), content_key(["a", "b"]), content_key()}
    assert len(keys) == 5
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_disk_that_syncs_files_only(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network and shared folders do."""
    sound = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "odd")
        sound(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if code == errno.EINVAL else pytest.raises(OSError, match="odd"):
        write_atomic(tmp_path / "a", "text")
