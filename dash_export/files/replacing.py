"""Replacement of an output by a finished work folder: entries that this program makes are replaced, all others stay.
After a kill in between the next run finishes the replacement.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dash_export.errors import OutputError
from dash_export.files.artifacts import read_bounded, sync, write_atomic
from dash_export.files.outputs import MARK, PLAN, bears_mark, mark, remove, remove_own, unmark, work_of

_LONGEST_PLAN = 1 << 16


def put_in_place(work: Path, output: Path, ours: Sequence[str], last: str, command: str) -> None:
    """Rename the finished work folder of a command to `output`. Where `output` exists, replace only the entries `ours`
    in it (paths below it). `last`, one of `ours`, is removed first and put in place last: while it is missing the
    output is unfinished, and `recover` goes on. Raises OutputError where `ours` may not be replaced (`check_movable`).
    """
    sync(work)
    if not output.exists():
        work.replace(output)
        sync(output.parent)
        unmark(output)
        return
    check_movable(output, ours)
    mark(output, command)
    write_atomic(work / PLAN, "\n".join(name for name in ours if os.path.lexists(work / name)))
    recover(output, ours, last, command)


def recover(output: Path, ours: Sequence[str], last: str, command: str) -> None:
    """Finish a replacement that `put_in_place` planned, as after a kill. Do nothing for none, or another command's."""
    work = work_of(output)
    if (output / MARK).exists() and not bears_mark(output, command):
        return
    if work.is_dir() and not work.is_symlink():
        left = os.path.lexists(work / last)  # it is renamed last
        begun = (work / PLAN).is_file() and (work / MARK).is_file() and ((output / MARK).is_file() or not left)
        planned = read_bounded(work / PLAN, _LONGEST_PLAN).decode().split("\n") if begun else []
        if begun and left and {*planned} <= {*ours}:  # else another version's plan: all is made anew
            _replace(work, output, ours, last, planned)
        if begun or {path.name for path in work.iterdir()} <= {MARK}:
            remove_own(work)
    if (output / last).exists():
        unmark(output)


def _replace(work: Path, output: Path, ours: Sequence[str], last: str, planned: Sequence[str]) -> None:
    """Replace the planned entries of `ours` and remove the others. An entry replaced before is no more in `work`."""
    (output / last).unlink(missing_ok=True)
    sync(output)
    for name in ours:
        old, new = output / name, work / name
        if name != last and (name not in planned or os.path.lexists(new)):
            remove(old)
            if name in planned:
                old.parent.mkdir(parents=True, exist_ok=True)
                new.replace(old)
                sync(old.parent)
    (work / last).replace(output / last)
    sync(output)


def check_movable(output: Path, ours: Sequence[str] = ("",)) -> None:
    """Raise OutputError where `put_in_place` would fail halfway or touch what is not the output's: for a link on the
    way to `ours` (by default the output itself), a mount point (which can neither be renamed across nor removed), a
    folder that may not be written.
    """
    if not os.path.lexists(output):
        return
    untouched = f"nothing of {output} was replaced"
    root = output.parent.resolve() / output.name
    mounts = {path for path in _mount_points() if path.is_relative_to(root)}
    for name in ours:
        way = [root / name, *(root / part for part in Path(name).parents if part.name)]
        if link := next(filter(Path.is_symlink, way), None):
            raise OutputError(f"{link} is a link, which is not replaced: {untouched}. Remove the link.")
        if mounted := [path for path in mounts if path.is_relative_to(way[0]) or way[0].is_relative_to(path)]:
            raise OutputError(f"{mounted[0]} is a mount point: {untouched}. Unmount it, or choose another output.")
        inside = (path for path in way[0].rglob("*") if not path.is_symlink())
        for path in filter(Path.is_dir, (root, *way, *inside)):
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
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
