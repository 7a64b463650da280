"""Files that are made once per key and survive a kill: written under a temporary name, renamed when whole, noted in a
journal.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import hmac
import json
import math
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from dash_export.errors import OutputError

JOURNAL = ".journal.json"
TEMPORARY = ".tmp-"
"""Names of what is not whole yet begin with this; the next run sweeps it away."""
_LONGEST_JOURNAL = 64 << 20
_ARTIFACT = re.compile(r"\w[\w.-]{0,200}\.(?:onnx|data|engine|npz)", re.ASCII)
"""Names of files that are made here."""


@dataclass(frozen=True)
class FileRecord:
    """A file's name inside its folder, its SHA-256 and its size in bytes."""

    name: str
    sha256: str
    bytes: int


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read. Raises OSError for anything else: a FIFO hangs its reader, a device never ends."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115  a FIFO without a writer opens
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def sha256_file(path: Path) -> str:
    """Of a regular file. Raises OSError for anything else."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes. Raises OSError for anything else: a sparse file of
    terabytes fills the memory.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {limit} are read", str(path))
        return file.read(limit)


def identity(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def content_key(*parts: object) -> str:
    """A short, stable hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write whole or not at all, and so that a loss of power leaves the old or the new content; text as UTF-8. Raises
    OutputError for a link, which may lead anywhere.
    """
    if path.is_symlink():
        raise OutputError(f"{path} is a link, which is not replaced: name the file itself, or remove the link.")
    with _temporary(path) as file:
        temporary = Path(file.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _temporary(path: Path) -> BinaryIO:
    """Open a new file beside `path`, locked while its writer lives. Those of writers that have died are removed."""
    for stale in path.parent.glob(f"{TEMPORARY}*-{glob.escape(path.name)}"):
        with suppress(OSError), os.fdopen(os.open(stale, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink()
    while True:
        temporary = path.with_name(f"{TEMPORARY}{uuid4().hex}-{path.name}")
        file = temporary.open("xb")  # new: a folder from a stranger may have links in it
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # nobody took it for a dead one's meanwhile
            return file
        file.close()


Progress = Callable[[str, int, int], None]
"""progress(name, done, total): called after each piece of long work; total 0 is a step of unknown length."""


def no_progress(name: str, done: int, total: int) -> None:
    """Say nothing."""


def _is_ours(entry: Any) -> bool:
    """Whether a journal's entry is one that `make` wrote. What it lists is deleted some day, and a journal comes with
    the folder, maybe from a stranger: nothing is believed but names inside the folder, as artifacts have them.
    """
    files = entry.get("files") if isinstance(entry, dict) else None
    listed = files if isinstance(files, list) and files else [None]
    return all(isinstance(record, dict) and _is_record(record) for record in listed)


def _is_record(record: dict[str, Any]) -> bool:
    name, size = record.get("name"), record.get("bytes")
    return isinstance(name, str) and _ARTIFACT.fullmatch(name) is not None and type(size) is int


class ArtifactStore:
    """Artifacts (one or more files each) of one folder, keyed by what they were made from."""

    def __init__(self, folder: Path, secret: bytes = b"") -> None:
        """With a `secret` only what was made under it is known: a journal comes with the folder, whose ever that is."""
        self.folder, self._secret = folder, secret
        folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        self._lock = threading.Lock()
        self._journal: dict[str, dict[str, Any]] = {}
        try:
            noted = json.loads(read_bounded(folder / JOURNAL, _LONGEST_JOURNAL))
            self._journal = {name: entry for name, entry in noted.items() if self._known(name, entry)}
        except (OSError, ValueError, AttributeError, RecursionError):
            pass  # no journal, or one cut short: everything is made anew

    def sweep(self) -> None:
        """Remove what an interrupted run left under temporary names."""
        for path in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    def current(self, name: str, key: str) -> list[FileRecord] | None:
        """The records of an artifact made earlier under the same key and unchanged on disk, or None."""
        entry = self._journal.get(name)
        if entry is None or entry.get("key") != key:
            return None
        try:
            records = [FileRecord(**record) for record in entry["files"]]
            if all(map(self._unchanged, records)):
                return records
        except (KeyError, TypeError, OSError):
            pass
        return None

    def _unchanged(self, record: FileRecord) -> bool:
        path = self.folder / record.name
        same = not path.is_symlink() and path.stat().st_size == record.bytes
        return same and sha256_file(path) == record.sha256

    def make(
        self, name: str, key: str, write: Callable[[Path], list[Path]], check: Callable[[], None] = lambda: None
    ) -> list[FileRecord]:
        """`write(temporary folder)` returns the files it wrote there; they are hashed, renamed into place and noted.
        `check` raises where what they were made from has changed meanwhile.
        """
        temporary = self.folder / f"{TEMPORARY}{os.getpid()}-{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        began = time.perf_counter()
        try:
            paths = write(temporary)
            check()
            for path in paths:
                sync(path)
            records = [FileRecord(path.name, sha256_file(path), path.stat().st_size) for path in paths]
            for stale in self._journal.get(name, {}).get("files", ()):
                self._delete(stale["name"])
            for path in paths:
                path.replace(self.folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        with self._lock:
            seconds = round(time.perf_counter() - began, 3)
            entry = {"key": key, "files": [asdict(record) for record in records], "seconds": seconds}
            self._journal[name] = entry | ({"signed": self._signature(name, entry)} if self._secret else {})
            write_atomic(self.folder / JOURNAL, json.dumps(self._journal))
        return records

    def _signature(self, name: str, entry: dict[str, Any]) -> str:
        signed = json.dumps([name, entry.get("key"), entry["files"]], sort_keys=True)
        return hmac.new(self._secret, signed.encode(), "sha256").hexdigest()

    def _known(self, name: str, entry: Any) -> bool:
        if not _is_ours(entry):
            return False
        signed = str(entry.get("signed")).encode(errors="replace")
        return not self._secret or hmac.compare_digest(self._signature(name, entry).encode(), signed)

    def seconds(self, name: str) -> float:
        """How long it took to make an artifact, whenever that was; 0 where it is not known."""
        noted = self._journal.get(name, {}).get("seconds")
        return noted if isinstance(noted, float) and math.isfinite(noted) else 0.0

    def _delete(self, name: str) -> None:
        with suppress(OSError):  # a folder of that name, which no artifact is
            (self.folder / name).unlink()

    def keep_only(self, names: set[str]) -> None:
        """Forget and delete artifacts that no longer belong."""
        if not set(self._journal) - names:
            return
        kept = {record["name"] for name in names if name in self._journal for record in self._journal[name]["files"]}
        for name in set(self._journal) - names:
            for record in self._journal.pop(name)["files"]:
                if record["name"] not in kept:
                    self._delete(record["name"])
        write_atomic(self.folder / JOURNAL, json.dumps(self._journal))
