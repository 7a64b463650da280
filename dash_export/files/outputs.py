"""Outputs while they are written: who may write one (file locks), where it lies until it is whole (a work folder).

Locks are advisory (`flock`): the death of a writer releases them. A lock file says who holds it, for the error message
that others get. A folder is emptied or replaced only where it bears this program's mark.
"""

import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from dash_export.errors import BusyError, OutputError
from dash_export.files.artifacts import read_bounded, sync

MARK = ".dash-export"
"""A file in every folder that this program may empty: written first, removed last."""
REPLACED = ".replaced"
"""Folder in a finished work folder that takes the name of an output: the old one, until it is removed."""
_OURS = b"dash-export "
_LONGEST = 4096
_TRIALS, _PAUSE = 3, 0.005

logger = logging.getLogger(__name__)


def lock_file(output: Path) -> Path:
    """Return the lock file of an output, beside it: `a.dash` -> `.a.dash.lock`."""
    return output.parent / f".{output.name}.lock"


@contextmanager
def locked(output: Path, command: str) -> Iterator[None]:
    """Hold the lock of `output` for `command` until the end of the block or process. Raises BusyError, which names the
    holder, OutputError where the lock's name is taken by something else.
    """
    path = lock_file(output)
    new = [folder for folder in path.parents if not folder.exists()]
    descriptor = _acquired(path, output)
    try:
        if descriptor is not None:
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            said = f"{command} (process {os.getpid()} on {socket.gethostname()}, since {since})"
            with suppress(OSError):  # another user's file, opened to read, or a full disk
                os.fchmod(descriptor, 0o644)  # others may read who holds it
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _OURS + said.encode(errors="replace"))
        yield
    finally:
        if descriptor is not None:
            with suppress(PermissionError):
                path.unlink(missing_ok=True)  # before the release: who opened it then sees that it is gone
            os.close(descriptor)
        with suppress(OSError):  # not empty: the output is there
            for folder in new:
                folder.rmdir()


@contextmanager
def folder_locked(folder: Path, holders: Iterable[Path], *, shared: bool, wait: bool = False) -> Iterator[None]:
    """Lock the folder itself, alone or `shared` with others. Raises BusyError, with what the lock files `holders` say,
    where it is locked; or, with `wait`, waits until it is free.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:  # it existed: another is just taking its place
        raise _busy(folder, holders) from error
    try:
        if not _flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, wait) or not _is_at(folder, descriptor):
            raise _busy(folder, holders)
        yield
    finally:
        os.close(descriptor)


def lock_while_alive(folder: Path, owner: object) -> None:
    """Lock a folder, shared with others, for as long as `owner` lives."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _flock(descriptor, fcntl.LOCK_SH)
    weakref.finalize(owner, os.close, descriptor)


def _acquired(path: Path, output: Path) -> int | None:
    """Open and lock the lock file and return its descriptor; None where no file may be written."""
    while True:
        descriptor = _opened(path, output)
        if descriptor is None:
            return None
        try:
            begins = os.pread(descriptor, 4097, 0) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b"?"
            zeros = not any(begins) and len(begins) <= 4096  # a loss of power leaves zeros, or no bytes
            if not zeros and not _OURS.startswith(begins[: len(_OURS)]):
                raise _taken(path)
            if not _flock(descriptor, fcntl.LOCK_EX):
                raise _busy(output, [path])
            if _is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file meanwhile: try again


def _opened(path: Path, output: Path) -> int | None:
    careful = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | careful, 0o644)
    except OSError as error:
        with suppress(OSError):  # another user's file, left by a kill: reading it is enough to lock it
            if error.errno in (errno.EACCES, errno.EPERM) and path.is_file():
                return os.open(path, os.O_RDONLY | careful)
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise OutputError(f"{path.parent} is no folder to write in: choose another output.") from error
        if os.path.lexists(path):  # another user's, or a link, a folder, a pipe
            raise (_busy(output, [path]) if holder(path) else _taken(path)) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return None
        raise OSError(error.errno, error.strerror, str(output)) from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int, operation: int, wait: bool = False) -> bool:
    """Return whether the lock is held. On a file system without locks: True, with a warning."""
    for trial in range(_TRIALS):
        try:
            fcntl.flock(descriptor, operation | (0 if wait else fcntl.LOCK_NB))
            return True
        except BlockingIOError:  # held by another, or probed by `holder`
            time.sleep(_PAUSE if trial + 1 < _TRIALS else 0)
        except OSError as error:
            logger.warning("this file system has no locks (%s): let nothing else write the same output", error.strerror)
            return True
    return False


def _taken(path: Path) -> OutputError:
    return OutputError(f"{path} is no lock that this program can read: remove it, or choose another output.")


def _busy(output: Path, holders: Iterable[Path]) -> BusyError:
    found = [said for said in map(holder, holders) if said]
    writer = ", ".join(found) or "another dash-export"
    return BusyError(f"{output} is being written by {writer}. Wait for that to end, or end it, and run this again.")


def holder(path: Path) -> str:
    """Return what a lock file says of its holder; nothing where nobody holds the lock any more."""
    with suppress(OSError):
        text = read_bounded(path, _LONGEST).decode(errors="replace")
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return "".join(filter(str.isprintable, text))
        finally:
            os.close(descriptor)
    return ""


def own_secret() -> bytes:
    """Return 32 bytes that only this user has, always the same; new random bytes where they cannot be stored."""
    try:
        path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dash-export" / "key"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # noqa: PTH123
            file.write(os.urandom(32))
            file.flush()
            os.fsync(file.fileno())
        status, kept = path.lstat(), read_bounded(path, 32)
        own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077
        if own and len(kept) == 32 and any(kept):
            return kept
        raise OSError(errno.EINVAL, f"remove {path}, which is no key of yours")
    except (OSError, RuntimeError) as error:  # no home
        logger.warning("no key is kept in ~/.local/state (%s): engines for GPUs are compiled at every build", error)
        return os.urandom(32)


def output_path(output: str | Path) -> Path:
    """Return the path to write, resolved so that it has a name: the target of a link, the current folder for `.`.
    Raises OutputError for `/`, a link that points nowhere and a name that is not UTF-8.
    """
    path = Path(output)
    try:
        path = path.resolve(strict=True) if path.is_symlink() or path.name in ("", "..") else path
    except (OSError, RuntimeError) as error:  # a loop of links is either
        raise OutputError(f"{output} is a link that points nowhere: remove it, or choose another output.") from error
    if not path.name:
        raise OutputError(f"{output} is a whole file system: choose another output.")
    try:
        str(path.absolute()).encode()  # ONNX Runtime takes no other names
    except UnicodeEncodeError as error:
        raise OutputError(f"{str(path)!r} is no UTF-8 name: choose another output, or rename its folder.") from error
    return path


def check_writable(folder: Path) -> None:
    """Raise OutputError, before the work, where nothing could be written into `folder` in the end."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder} may not be written in. Check permissions and the disk, or choose another output.")


def is_free(output: Path) -> bool:
    """Return whether nothing would be lost at an output: nothing is there, or an empty folder."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def refuse_link(output: Path) -> None:
    """Raise OutputError for a link that has appeared since `output_path` resolved the output."""
    if output.is_symlink():
        raise OutputError(f"{output} has become a link: it will not be replaced. Remove it, or choose another output.")


def own_folder(path: Path) -> Path:
    """Return the folder, made where it is missing. Raises OutputError where a link or a file lies in its place."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} is not a folder but a link or a file: nothing is written there. Remove it.")
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)
    return path


def work_of(output: Path) -> Path:
    """Return the work folder of an output: `a.dash` -> `a.dash.unfinished`."""
    return output.with_name(f"{output.name}.unfinished")


def work_folder(output: Path, command: str) -> Path:
    """Return `<output>.unfinished`, where an output lies until it is whole: new, or as a killed run of `command` left
    the folder. Raises OutputError for a folder that is not this program's, or that is another command's.
    """
    folder = own_folder(work_of(output))
    _check_ours(folder)
    with open(os.open(folder / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b") as file:  # noqa: PTH123
        begun = _command(file.read(_LONGEST))
        if command.startswith(begun):  # new, or a loss of power has left a part of it, or zeros
            file.seek(0)
            file.write(command.encode())
            begun = command
    sync(folder)
    if begun != command:
        advice = "run that again, remove it, or choose another output."
        raise OutputError(f"{folder} is the work of a killed dash-export {begun!r:.40}, and is kept: {advice}")
    return folder


def _command(mark: bytes) -> str:
    return mark.decode(errors="replace").strip("\0")


def bears_mark(folder: Path, command: str) -> bool:
    """Return whether a folder bears the mark of `command`, or a mark that a loss of power left empty or cut short."""
    try:
        return command.startswith(_command(read_bounded(folder / MARK, _LONGEST)))
    except OSError:
        return False


def unmark(output: Path) -> None:
    """Remove the mark from a folder, where it bears one."""
    if os.path.lexists(output / MARK):  # a read-only file system refuses even to remove a missing file
        (output / MARK).unlink()


def _check_ours(folder: Path) -> None:
    mark = folder / MARK
    if any(folder.iterdir()) and (mark.is_symlink() or not mark.is_file()):
        raise OutputError(f"{folder} is not this program's: it has no {MARK}. Move it away, or choose another output.")


def remove_own(folder: Path) -> None:
    """Remove a folder that bears the mark, the mark last: after a kill the next run may then remove the rest. Raises
    OutputError for a folder without the mark that is not empty.
    """
    _check_ours(folder)
    for path in folder.iterdir():
        if path.name != MARK:
            remove(path)
    sync(folder)
    unmark(folder)
    folder.rmdir()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the work folder on an error or Ctrl-C, unless the old output lies in it already: the next run finishes
    the replacement, as it does after a kill.
    """
    try:
        yield
    except BaseException:
        if folder.exists() and not (folder / REPLACED).exists():
            remove_own(folder)
        raise
