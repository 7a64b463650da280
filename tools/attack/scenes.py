"""Commands that are killed, or lose their power, at a moment: what they begin with, and what must be there after."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from shared import (
    FORK,
    LAST_OPERATIONS,
    PATIENCE,
    PICTURE,
    Command,
    Fault,
    Stage,
    general,
    outcome,
    perform,
    start,
)
from states import build_state, bundle_state, leftovers, picture_state, policy_state, sha

CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def watch(folder: Path, before: Callable[[], None], synced: Callable[[int], None] = lambda _: None) -> None:
    """Call `before()` ahead of each operation of this process that changes what lies in `folder`, or makes it durable,
    and `synced(fd)` after each fsync. For the rest of the process: an audit hook cannot be taken away.

    A folder is removed by names that are relative to its descriptor: they count wherever they are.
    """
    inside = str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in CHANGING or (event == "open" and args[2] & _WRITING)
        if changes and isinstance(args[0], (str, os.PathLike)):
            path = os.fspath(args[0])
            if path.startswith(inside) or (event != "open" and not Path(path).is_absolute()):
                before()

    def wrapped(real: Callable[[Any], None]) -> Callable[[Any], None]:
        def sync(file: Any) -> None:
            before()
            real(file)
            synced(file if isinstance(file, int) else file.fileno())

        return sync

    vars(os).update(fsync=wrapped(os.fsync), fdatasync=wrapped(os.fdatasync))
    sys.addaudithook(hook)


@dataclass(frozen=True)
class Scene:
    """A command, and the commands that made what it finds."""

    command: Command
    before: tuple[Command, ...] = ()
    expected: dict[str, str] = field(default_factory=dict)
    """Hashes of the pictures."""
    operations: int = 0
    seconds: float = 0.0

    @classmethod
    def parse(cls, command: str, *before: str) -> Scene:
        return cls(Command.parse(command), tuple(map(Command.parse, before)))

    def rehearsed(self, stage: Stage, name: str, victim: Callable[..., None]) -> Scene:
        """The scene with what an undisturbed run of it takes: its start is kept, to be copied for each trial."""
        start_folder = self.start(stage, name)
        start_folder.mkdir(parents=True)
        for command in self.before:
            perform(command, stage, start_folder)
        folder = start_folder.with_name("rehearsal")
        shutil.copytree(start_folder, folder)
        ours, theirs = FORK.Pipe()
        process = start(victim, self.command, stage, folder, 0, theirs)
        theirs.close()
        ours.recv()
        began = perf_counter()
        count = ours.recv()
        seconds = perf_counter() - began
        process.join(PATIENCE)
        expected = {path.name: sha(path) for path in folder.glob(f"{PICTURE}.*")}
        scene = dataclasses.replace(self, expected=expected, operations=count, seconds=seconds)
        faults = scene.finished(stage, folder)
        if process.exitcode or faults:
            raise SystemExit(f"{name}: an undisturbed run is not whole: {process.exitcode}, {faults}")
        shutil.rmtree(folder)
        return scene

    def moment(self, random: Random) -> int:
        """The number of an operation, often one of the last: there an output takes its place."""
        first = 1 if random.random() < 0.5 else max(1, self.operations - LAST_OPERATIONS)
        return random.randint(first, self.operations)

    def start(self, stage: Stage, name: str) -> Path:
        return stage.folder / name / "start"

    def state(self, stage: Stage, folder: Path) -> str | Fault:
        """What the command's output is, as it says of itself and as it is found."""
        if self.command.kind == "build":
            bundle = bundle_state(stage, folder)
            if isinstance(bundle, Fault) or bundle == "unfinished":
                return Fault("a bundle that a build spoilt", str(bundle))
            return build_state(stage, folder, self.command.variant)
        if self.command.kind == "export":
            return bundle_state(stage, folder)
        return policy_state(stage, folder) if self.command.kind == "train" else picture_state(folder, self.expected)

    def survived(self, stage: Stage, folder: Path) -> list[Fault]:
        """What is wrong right after a kill or a crash: an output is whole, of before or of after, or says that it is
        not.
        """
        state = self.state(stage, folder)
        return [state] if isinstance(state, Fault) else []

    def completed(self, stage: Stage, folder: Path) -> list[Fault]:
        """What is wrong when the command is then run again, to its end."""
        again = outcome(self.command, stage, folder)
        if again.error:
            return [Fault(f"the next run fails: {general(again.error)}", again.error)]
        faults = self.finished(stage, folder)
        built = [command for command in self.before if command.kind == "build"]
        if self.command.kind == "export" and built and not faults:  # its engines are not lost for good
            again = outcome(built[-1], stage, folder)
            state = build_state(stage, folder, built[-1].variant)
            if again.error or state != "whole":
                faults.append(Fault("the next build fails", again.error or str(state)))
        return faults

    def finished(self, stage: Stage, folder: Path) -> list[Fault]:
        """What is wrong with what a whole run leaves."""
        return [*self.done(stage, folder), *leftovers(folder)]

    def done(self, stage: Stage, folder: Path) -> list[Fault]:
        """What is wrong with the output of a whole run."""
        state = self.state(stage, folder)
        if state == ("whole" if self.command.kind in ("build", "frontier") else self.command.variant):
            return []
        return [state if isinstance(state, Fault) else Fault("a whole run leaves what is not", state)]


def killable(command: Command, stage: Stage, folder: Path, moment: int, pipe: Connection) -> None:
    """A victim: kills itself before operation number `moment`. Says when it begins, and how many it made."""
    import signal

    count = 0

    def before() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, before)
    pipe.send("begins")
    perform(command, stage, folder)
    pipe.send(count)


SCENES = {
    "export": Scene.parse("export a"),
    "export over a bundle": Scene.parse("export b", "export a", "build fp32"),
    "build": Scene.parse("build fp32", "export a"),
    "build again": Scene.parse("build fp32", "export a", "build fp32", "export b"),
    "train": Scene.parse("train a"),
    "train over a policy": Scene.parse("train b", "train a"),
    "frontier": Scene.parse("frontier", "export a", "build fp32"),
}
