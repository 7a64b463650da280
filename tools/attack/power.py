"""Loss of power at random moments of export, build and train: after a crash what a manifest, a build record or a policy
file says is whole is whole, or it says that it is unfinished; the next run completes it.

    python tools/attack/power.py --trials 50

Simulated inside the victim, so that no file system, mount or privilege is needed. Before each operation that changes
what lies in the folder (open for writing, rename, unlink, mkdir, rmdir: an audit hook sees them, and what native code
did between two of them is found then too) all names there are read and the changes noted; each file is kept open, so
that an unlinked one can come back; at each fsync or fdatasync the file's content is copied, as what is durable of it.
Before one of these operations, or after the command is done, the victim copies what is in all files and kills itself,
and of the notes several disks are made that the crash may have left:

- content: what was written after a file's last fsync is there, cut somewhere, pages of zeros in parts, or not at all
  (the content at the last fsync, or a file of zero length), for each file by itself.
- names `in order`: as ext4 and XFS journal them: all changes up to some moment, which is not before the last fsync of
  anything, are there, and none after it. Names may be there before the content.
- names `by folder`: no more than POSIX says: a change of a folder is certain once that folder was synced afterwards;
  each other one is there or not, by itself. A rename is whole or not at all, also between two folders, and certain when
  either was synced.

Not simulated: torn directories and metadata beside names and lengths (times, modes), a device that lies about its
flushes, an fsync that fails, `sync`, `O_SYNC`, and an fsync that native code makes (none counts as durable that did not
go through `os`). What was there at the beginning is durable. Crashes come before operations, never within a write; the
loss of content stands for that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import click
from scenes import SCENES, Scene, watch
from shared import FORK, PATIENCE, Command, Report, Stage, chosen, perform, staged, start

POWERED = {name: scene for name, scene in SCENES.items() if name != "frontier"}
ORDERS = ("in order", "by folder")
PAGE = 4096
AFTER = 1 << 30
"""The number of an operation that does not come: the command ends, and then the power."""
NOTES, LAST = "notes.jsonl", ".last"

Names = dict[int, dict[str, int]]
"""Inode of a folder -> name -> inode."""


class Disk:
    """What a victim notes of `folder` in `store`. Inodes stand for files and folders: none is used twice, for each is
    kept open.
    """

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
        """All names there, and where each inode is."""
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
        """Of a file what is in it now; nothing of a folder."""
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
        """Copy the last contents and end."""
        for inode in self._held:
            self._copy(inode, LAST)
        os.kill(os.getpid(), signal.SIGKILL)


def powered(command: Command, stage: Stage, folder: Path, moment: int, pipe: Connection) -> None:
    """A victim: notes what it does, and kills itself before operation number `moment`, or when it is done. Says when it
    begins, and, where `moment` is 0, how many it made.
    """
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
    pipe.send("begins")
    perform(command, stage, folder)
    if moment:
        within.hook = True
        disk.look()
        disk.crash()
    pipe.send(count)


def crashed(store: Path, into: Path, order: str, random: Random) -> None:
    """Write a folder as a crash may have left it."""
    notes = [json.loads(line) for line in (store / NOTES).read_text().splitlines()]
    began = next(index for index, note in enumerate(notes) if "began" in note)
    syncs = {index: note["synced"] for index, note in enumerate(notes) if "synced" in note}
    end = random.randint(max([began, *syncs]), len(notes))

    def is_there(index: int) -> bool:
        if index < began:
            return True
        if order == "in order":
            return index < end
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
    """What may be there of a file, given what was in it at the crash and at its last fsync."""
    last = kept.read_bytes()
    durable = synced.read_bytes() if synced.exists() else b""
    if durable == last:
        return last
    pages = [last[start : start + PAGE] for start in range(0, len(last), PAGE)]
    zeroed = b"".join(page if random.random() < 0.5 else bytes(len(page)) for page in pages)
    return random.choice((durable, last, last[: random.randint(0, len(last))], zeroed))


@click.command()
@click.option("--trials", default=50, show_default=True, help="Crashes, of all commands together.")
@click.option("--disks", default=4, show_default=True, help="Made of each crash, half of them of either order.")
@click.option("--first", default=0, show_default=True, help="The number of the first crash.")
@click.option("--seconds", type=float, help="Begin no further crash after so long.")
@click.option("--only", multiple=True, help="A command; repeatable.")
def main(trials: int, disks: int, first: int, seconds: float | None, only: tuple[str, ...]) -> None:
    """Crash the commands in turn."""
    report = Report("power")
    with staged() as stage:
        scenes: dict[str, Scene] = {}
        for name in chosen(only, POWERED):
            scenes[name] = POWERED[name].rehearsed(stage, name, powered)
            shutil.rmtree(stage.folder / name / "store")
        until = time.monotonic() + (seconds or float("inf"))
        for number in range(first, first + trials):
            if time.monotonic() < until:
                name = list(scenes)[number % len(scenes)]
                attempt(name, scenes[name], number, disks, stage, report)
    report.finish()


def attempt(name: str, scene: Scene, number: int, disks: int, stage: Stage, report: Report) -> None:
    random = Random(f"{name} {number}")
    root = stage.folder / "crash"
    root.mkdir()
    folder, after = root / "trial", root / "after"
    shutil.copytree(scene.start(stage, name), folder)
    _ours, theirs = FORK.Pipe()
    moment = scene.moment(random) if random.random() < 0.7 else AFTER
    process = start(powered, scene.command, stage, folder, moment, theirs)
    process.join(PATIENCE)
    if process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"{name}, trial {number}: the victim ended by itself ({process.exitcode}).")
    for disk in range(disks):
        began = time.perf_counter()
        order = ORDERS[disk % 2]
        crashed(root / "store", after, order, random)
        faults = scene.survived(stage, after)
        if moment == AFTER and not faults:
            faults = [replace(fault, kind="reported as done, then lost") for fault in scene.done(stage, after)]
        faults += scene.completed(stage, after)
        shutil.rmtree(after)
        report.add(f"{name}, names {order}", number, time.perf_counter() - began, faults, disks=1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
