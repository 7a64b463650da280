"""Replacement of an output by a finished work folder: the old folder moves into the new one, which then takes its name.

    a.dash -> a.dash.unfinished/.replaced      the old one is set aside; what is not this program's moves to the new one
    a.dash.unfinished -> a.dash                whole, with all that stays
    a.dash/.replaced                           is removed

After a kill at any moment the old or the new folder has the name, or none has: then the next command that opens or
writes the output finishes the replacement.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from dash_export.errors import BusyError, OutputError
from dash_export.files.artifacts import sync
from dash_export.files.outputs import MARK, REPLACED, bears_mark, locked, remove, unmark, work_of


def put_in_place(work: Path, output: Path, ours: Sequence[str]) -> None:
    """Rename the finished work folder of a command to `output`. What exists there stays, except for the entries `ours`
    (paths below it), all of which the new folder has or goes without. Raises OutputError where they may not be replaced
    (`check_movable`). The caller holds the lock of `output`.
    """
    check_movable(output, ours)
    sync(work)
    if output.exists():
        shutil.copymode(output, work)
        output.replace(work / REPLACED)
        sync(work)
    _finish(work, output, ours)


def recover(output: Path, ours: Sequence[str], command: str) -> None:
    """Finish a replacement that was killed in `put_in_place`. The caller holds the lock of `output`."""
    folder = output if os.path.lexists(output) else work_of(output)
    if (folder / REPLACED).is_dir() and not (folder / REPLACED).is_symlink() and bears_mark(folder, command):
        _finish(folder, output, ours)


def recover_missing(output: Path, ours: Sequence[str], command: str) -> bool:
    """Call `recover` where nothing has the output's name and nobody writes it; return whether it is there again."""
    if os.path.lexists(output) or not (work_of(output) / REPLACED).is_dir():
        return False
    with suppress(BusyError), locked(output, command):
        recover(output, ours, command)
    return output.exists()


def _finish(folder: Path, output: Path, ours: Sequence[str]) -> None:
    """Do what is left of a replacement: `folder` is the new one, at its final place or not yet."""
    if (folder / REPLACED).exists():
        _move_others(folder / REPLACED, folder, ours)
    if folder != output:
        folder.replace(output)
        sync(output.parent)
    remove(output / REPLACED)
    unmark(output)


def _move_others(old: Path, new: Path, ours: Iterable[str]) -> None:
    """Move everything from the folder `old` to `new`, except the entries `ours` and this program's own."""
    for path in old.iterdir():
        inside = [name.partition("/")[2] for name in ours if name.startswith(f"{path.name}/")]
        if inside and path.is_dir() and not path.is_symlink():
            (new / path.name).mkdir(exist_ok=True)
            _move_others(path, new / path.name, inside)
        elif path.name not in (*ours, MARK, REPLACED):
            path.replace(new / path.name)
    sync(new)


def check_movable(output: Path, ours: Sequence[str] = ("",)) -> None:
    """Raise OutputError where `put_in_place` would fail halfway or touch what is not the output's: for a link on the
    way to `ours` (by default the output itself), and at or below the output for a mount point (which can neither be
    renamed across nor removed) and a folder that may not be written.
    """
    if not os.path.lexists(output):
        return
    untouched = f"nothing of {output} was replaced"
    root = output.parent.resolve() / output.name
    for name in ours:
        way = [root / name, *(root / part for part in Path(name).parents if part.name)]
        if link := next(filter(Path.is_symlink, way), None):
            raise OutputError(f"{link} is a link, which is not replaced: {untouched}. Remove the link.")
    if mounted := [path for path in _mount_points() if path.is_relative_to(root)]:
        raise OutputError(f"{mounted[0]} is a mount point: {untouched}. Unmount it, or choose another output.")
    for path in (root, *root.rglob("*")):
        if path.is_dir() and not path.is_symlink() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise OutputError(f"{path} may not be written: {untouched}. Check its permissions.")


def _mount_points() -> set[Path]:
    """Return this machine's mount points, as listed: a bind mount of the same disk cannot be told by its device."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    names = (re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), line.split()[4]) for line in lines)
    return {Path(os.fsdecode(name)) for name in names}


def refuse_inputs(inputs: Iterable[Path], replaced: Iterable[Path]) -> None:
    """Raise OutputError where an input lies in what is replaced or removed in the end."""
    places = [place.resolve() for place in replaced]
    for path in inputs:
        if any(path.resolve().is_relative_to(place) for place in places):
            raise OutputError(f"{path} is read, and lies in what is replaced: move it away, or choose another output.")
