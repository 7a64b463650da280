"""Files made once per key, safe from kills: written under a temporary name, renamed when whole, noted in a journal."""

import errno
import hashlib
import hmac
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from dash_export.errors import OutputError
from dash_export.files.typed_json import Bytes, WrongFieldError, typed

JOURNAL = ".journal.json"
TEMPORARY = ".tmp-"
"""Prefix of the names of unfinished files and folders; the next run removes these."""
_LONGEST_JOURNAL = 64 << 20
_ARTIFACT = re.compile(r"\w[\w.-]{0,200}\.(?:onnx|data|engine|npz)", re.ASCII)
"""Names that the files of an artifact can have."""


@dataclass(frozen=True)
class FileRecord:
    """A file's name inside its folder, its SHA-256 and its size in bytes."""

    name: str
    sha256: str
    bytes: Bytes

    def matches(self, path: Path, hashes: bool = True) -> bool:
        """Return whether the file at `path` has the recorded size and, with `hashes`, SHA-256. Raises OSError."""
        return path.stat().st_size == self.bytes and (not hashes or sha256_file(path) == self.sha256)


_OWN_FOLDER = re.compile(f"{re.escape(TEMPORARY)}[0-9]+-")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read. Raises OSError for anything else: a FIFO hangs its reader, a device never ends."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")  # noqa: PTH123, SIM115  a FIFO without a writer opens
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def sha256_file(path: Path) -> str:
    """Hash a regular file. Raises OSError for anything else."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def record_of(folder: Path, name: str) -> FileRecord:
    """Return the record of a file as it is now. Raises OSError."""
    path = folder / name
    return FileRecord(name, sha256_file(path), path.stat().st_size)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return a regular file's bytes, `limit` at most. Raises OSError for anything else: a sparse file fills memory."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {limit} are read", str(path))
        return file.read(limit)


def identity(path: Path) -> tuple[int, ...]:
    """Return device, inode, size, mtime and ctime (ns): replacing or writing the file changes some of them."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def content_key(*parts: object) -> str:
    """Return a short, stable hash of JSON-able parts: 32 hexadecimal digits of SHA-256."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and shared folders can do it for files only
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file by an atomic rename: after a kill or a loss of power it has either the old or the new content.
    Text is written as UTF-8. Raises OutputError for a link, which may lead anywhere.
    """
    if path.is_symlink():
        raise OutputError(f"{path} is a link, which is not replaced: name the file itself, or remove the link.")
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.unlink(missing_ok=True)  # a writer that died left it; one at a time writes a file
    try:
        with temporary.open("xb") as file:  # "x" follows no link: the folder may be a stranger's
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


Progress = Callable[[str, int, int], None]
"""progress(name, done, total): called after each piece of long work; total 0 is a step of unknown length."""


def no_progress(name: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class _Entry:
    """Journal entry of an artifact. `key`: HMAC, by the store's secret, of its name, its inputs' key and its files."""

    key: str
    files: tuple[FileRecord, ...]
    seconds: float


@dataclass(frozen=True)
class Artifact:
    """One engine to make, a `file` beside engines, or files that engines are made from (`aside`). `write(temporary
    folder)` returns the files it wrote, the engine's own first. `extends`: engines whose weights this one maps too.
    """

    name: str
    key: str
    write: Callable[[Path], list[Path]]
    extends: tuple[str, ...] = ()
    role: Literal["engine", "file", "aside"] = "engine"


class ArtifactStore:
    """Artifacts (one or more files each) of one folder, keyed by their inputs."""

    def __init__(self, folder: Path, secret: bytes = b"") -> None:
        """Open the store. With a `secret` only artifacts made with it count: the journal may come from a stranger."""
        self.folder, self._secret = folder, secret
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{TEMPORARY}*"):  # what an interrupted run left
            if _OWN_FOLDER.match(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        self._journal: dict[str, _Entry] = {}
        with suppress(OSError, ValueError, AttributeError, RecursionError):  # none, or cut short: all is made anew
            for name, item in json.loads(read_bounded(folder / JOURNAL, _LONGEST_JOURNAL)).items():
                with suppress(WrongFieldError):
                    entry = typed(_Entry, item, name)
                    # Listed files are deleted some day: a stranger's journal must name nothing but artifacts.
                    if all(_ARTIFACT.fullmatch(record.name) for record in entry.files):
                        self._journal[name] = entry

    def current(self, name: str, key: str) -> list[FileRecord] | None:
        """Return the records of an artifact made earlier with the same key and unchanged on disk, else None."""
        entry = self._journal.get(name)
        if entry is None or not hmac.compare_digest(entry.key.encode(), self._sealed(name, key, entry.files).encode()):
            return None
        with suppress(OSError):
            if all(not (path := self.folder / one.name).is_symlink() and one.matches(path) for one in entry.files):
                return list(entry.files)
        return None

    def make(
        self, name: str, key: str, write: Callable[[Path], list[Path]], check: Callable[[], None] = lambda: None
    ) -> list[FileRecord]:
        """Call `write(temporary folder)`, rename the files it returns into place, note them in the journal and return
        their records. `check` runs right after `write`: it raises where the inputs have changed.
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
            records = [record_of(temporary, path.name) for path in paths]
            if name in self._journal:
                self._delete(self._journal[name].files)
            for path in paths:
                path.replace(self.folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        seconds = round(time.perf_counter() - began, 3)
        self._journal[name] = _Entry(self._sealed(name, key, records), tuple(records), seconds)
        self._write_journal()
        return records

    def keep_only(self, names: set[str]) -> None:
        """Delete all artifacts but `names`, and forget them."""
        dropped = [self._journal.pop(name) for name in set(self._journal) - names]
        if dropped:
            kept = {record.name for entry in self._journal.values() for record in entry.files}
            self._delete(record for entry in dropped for record in entry.files if record.name not in kept)
            self._write_journal()

    def seconds(self, name: str) -> float:
        """Return the seconds that it took to make an artifact, in this run or an earlier one; 0 where unknown."""
        return self._journal[name].seconds if name in self._journal else 0.0

    def _sealed(self, name: str, key: str, records: Iterable[FileRecord]) -> str:
        contents = json.dumps([name, key, [asdict(record) for record in records]])
        return hmac.new(self._secret, contents.encode(errors="replace"), "sha256").hexdigest()

    def _delete(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            with suppress(OSError):  # missing, or a folder has that name: it is no artifact
                (self.folder / record.name).unlink()

    def _write_journal(self) -> None:
        write_atomic(self.folder / JOURNAL, json.dumps({name: asdict(entry) for name, entry in self._journal.items()}))
