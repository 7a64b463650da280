"""Kills and loss of power at random moments of export and build: after it what a record says is whole is whole, or it
says that it is unfinished; the next run completes it.

    python tools/attack/power.py --trials 50

The victim kills itself before an operation that changes what lies in the folder (an audit hook sees them), or when it
is done: everything that was written is there. Loss of power is simulated: before each operation all names are noted, at
each fsync the file's content is copied. Of that several disks are made that the crash may have left, by no more than
POSIX says: what was written after a file's last fsync is there, cut, zero in some pages, or not at all; a change of a
folder is certain once that folder was synced afterwards, each other one is there or not, by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import click
from shared import finish
from stage import FORK, PATIENCE, SCENES, Scene, perform, staged, watch

PAGE = 4096
AFTER = 1 << 30
"""The number of an operation that does not come: the command ends, and then the power."""
NOTES, LAST = "notes.jsonl", ".last"

Names = dict[int, dict[str, int]]
"""Inode of a folder -> name -> inode."""


class Disk:
    """Notes of a victim about `folder` in `store`. Each file is kept open, so that no inode is used twice."""

    def __init__(self, folder: Path, store: Path) -> None:
        store.mkdir()
        self._folder, self._store = folder, store
        self._notes = os.open(store / NOTES, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._held: dict[int, int] = {}
        self._copies: defaultdict[int, int] = defaultdict(int)
        self._names: Names = {}
        self.look()
        for inode in self._held:
            self._copy(inode)
        self._note(began=folder.stat().st_ino)

    def _note(self, **what: Any) -> None:
        os.write(self._notes, (json.dumps(what) + "\n").encode())

    def _found(self) -> tuple[Names, dict[int, Path]]:
        names: Names = {}
        paths: dict[int, Path] = {}
        folders = [(self._folder.stat().st_ino, self._folder)]
        while folders:
            inode, folder = folders.pop()
            names[inode], paths[inode] = {}, folder
            try:
                for entry in os.scandir(folder):
                    names[inode][entry.name] = entry.inode()
                    paths[entry.inode()] = Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((entry.inode(), Path(entry.path)))
            except FileNotFoundError:  # another thread removed it
                pass
        return names, paths

    def look(self) -> None:
        """Note what changed since the last look. Read until two readings agree: another thread may rename meanwhile."""
        names, paths = self._found()
        while (again := self._found())[0] != names:
            names, paths = again
        for inode, path in paths.items():
            if inode not in self._held:
                self._hold(inode, path)
        before = {inode: (folder, name) for folder, own in self._names.items() for name, inode in own.items()}
        after = {inode: (folder, name) for folder, own in names.items() for name, inode in own.items()}
        for inode, place in after.items():
            if inode in self._held and before.get(inode) != place:
                self._note(put=inode, at=place, was=before.get(inode))
        for inode, (folder, name) in before.items():
            if inode not in after and name not in names.get(folder, {}):
                self._note(put=None, at=(folder, name), was=None)
        self._names = names

    def _hold(self, inode: int, path: Path) -> None:
        with suppress(FileNotFoundError):  # gone already, before anybody could sync it
            self._held[inode] = os.open(path, os.O_RDONLY)

    def _copy(self, inode: int, suffix: str = "") -> None:
        """Keep what is in a file now; nothing of a folder."""
        file = self._held[inode]
        status = os.fstat(file)
        if not stat.S_ISDIR(status.st_mode):
            suffix = suffix or f".{self._copies[inode]}"
            (self._store / f"{inode}{suffix}").write_bytes(os.pread(file, status.st_size, 0))

    def synced(self, file: int) -> None:
        inode = os.fstat(file).st_ino
        self.look()
        if inode in self._held:
            self._copies[inode] += 1
            self._copy(inode)
            self._note(synced=inode, copy=self._copies[inode])

    def crash(self) -> None:
        for inode in self._held:
            self._copy(inode, LAST)
        os.kill(os.getpid(), signal.SIGKILL)


def powered(command: str, stage: Path, folder: Path, moment: int, pipe: Connection) -> None:
    """A victim: it dies before operation `moment`, or at the end; with 0 it lives, and tells their number."""
    count, within, lock = 0, threading.local(), threading.Lock()
    disk = Disk(folder, folder.with_name("store"))

    def before() -> None:
        nonlocal count
        if getattr(within, "hook", False):
            return
        within.hook = True
        with lock:
            disk.look()
            count += 1
            if count == moment:
                disk.crash()
        within.hook = False

    def synced(file: int) -> None:
        within.hook = True
        with lock:
            disk.synced(file)
        within.hook = False

    watch(folder, before, synced)
    perform(command, stage, folder)
    if moment:
        within.hook = True
        disk.look()
        disk.crash()
    pipe.send(count)


def crashed(store: Path, into: Path, random: Random) -> None:
    """Write a folder as a crash may have left it."""
    notes = [json.loads(line) for line in (store / NOTES).read_text().splitlines()]
    began = next(index for index, note in enumerate(notes) if "began" in note)
    syncs = {index: note["synced"] for index, note in enumerate(notes) if "synced" in note}

    def is_there(index: int) -> bool:
        if index < began:
            return True
        note = notes[index]
        folders = {place[0] for place in (note["at"], note["was"]) if place}
        return any(later > index and inode in folders for later, inode in syncs.items()) or random.random() < 0.5

    names: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for index, note in enumerate(notes):
        if "put" in note and is_there(index):
            folder, name = note["at"]
            if note["was"] is not None and names[note["was"][0]].get(note["was"][1]) == note["put"]:
                del names[note["was"][0]][note["was"][1]]
            names[folder].pop(name, None)
            if note["put"] is not None:
                names[folder][name] = note["put"]
    copies = {note["synced"]: note["copy"] for note in notes if "synced" in note}
    _write(notes[began]["began"], into, names, copies, store, random)


def _write(
    inode: int, path: Path, names: dict[int, dict[str, int]], copies: dict[int, int], store: Path, random: Random
) -> None:
    kept = store / f"{inode}{LAST}"
    if kept.exists():
        path.write_bytes(_content(kept, store / f"{inode}.{copies.get(inode, 0)}", random))
        return
    path.mkdir()
    for name, child in names.get(inode, {}).items():
        _write(child, path / name, names, copies, store, random)


def _content(kept: Path, synced: Path, random: Random) -> bytes:
    """Return what may be there of a file, given what was in it at the crash and at its last fsync."""
    last = kept.read_bytes()
    durable = synced.read_bytes() if synced.exists() else b""
    if durable == last:
        return last
    pages = [last[start : start + PAGE] for start in range(0, len(last), PAGE)]
    zeroed = b"".join(page if random.random() < 0.5 else bytes(len(page)) for page in pages)
    return random.choice((durable, last, last[: random.randint(0, len(last))], zeroed))


def attempt(
    name: str, scene: Scene, number: int, disks: int, moment: int | None = None, rebuild: bool = True
) -> list[str]:
    random = Random(f"{name} {number}")
    root = scene.stage / "crash"
    root.mkdir()
    folder, after = root / "trial", root / "after"
    shutil.copytree(scene.start, folder)
    _ours, theirs = FORK.Pipe()
    moment = moment or (scene.moment(random) if random.random() < 0.7 else AFTER)
    process = FORK.Process(target=powered, args=(scene.command, scene.stage, folder, moment, theirs), daemon=True)
    process.start()
    process.join(PATIENCE)
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"{name}, trial {number}: the victim ended by itself ({process.exitcode}).")
    faults = []
    for lost in (False, *[True] * disks):
        if lost:
            crashed(root / "store", after, random)
        else:
            folder.rename(after)
        wrong = scene.survived(after)
        if moment == AFTER and not wrong and not scene.state(after):
            wrong = ["reported as done, then lost"]
        told = f"{name} {number}, {'loss of power' if lost else 'kill'}, before operation {moment}"
        faults += [f"{told}: {each}" for each in (*wrong, *scene.completed(after, rebuild))]
        shutil.rmtree(after)
    shutil.rmtree(root)
    return faults


@click.command()
@click.option("--trials", default=50, show_default=True, help="Kills, of all commands together.")
@click.option("--disks", default=4, show_default=True, help="Made of each, as a loss of power may leave them.")
def main(trials: int, disks: int) -> None:
    """Kill the commands in turn."""
    done, faults = Counter[str](), list[str]()
    with staged() as stage:
        scenes = {name: Scene.rehearsed(stage, name, powered) for name in SCENES}
        for number in range(trials):
            name = list(scenes)[number % len(scenes)]
            faults += attempt(name, scenes[name], number, disks)
            done[name] += 1
    finish("power", faults, kills=done, disks=disks * trials)


if __name__ == "__main__":
    main()
