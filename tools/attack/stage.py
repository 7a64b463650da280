"""Stage of the attacks on what writes: a tiny model, the commands, what each begins with, what must be there."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import shared  # noqa: F401  makes the tests' helpers importable

FORK = multiprocessing.get_context("forkserver")
# Nothing that a command imports is left to the processes: they would take seconds.
FORK.set_forkserver_preload(
    ["tests.tiny", "stage", "onnxruntime", "dash_export.building.engine_graphs", "dash_export.graphs.lower.ort"]
)
BUNDLE, TARGET = "m.dash", "cpu-fp32"
POLICIES = {"a": "linear", "b": "none"}
"""The two policies that are exported, by the form of their bypasses."""
SCENES = {
    "export": ("export a",),
    "export over a bundle": ("export b", "export a", "build"),
    "build": ("build", "export a"),
    "build again": ("build", "export a", "build", "export b"),
}
"""A command, and the commands that made what it finds."""
LAST, PATIENCE = 12, 120
_CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class FaultError(Exception):
    """Something lies there that must not."""


@contextmanager
def staged() -> Iterator[Path]:
    """A folder while the attack goes on: the model, and for each policy what undisturbed commands make."""
    from tests.tiny import save_model

    with tempfile.TemporaryDirectory(prefix="dash-export-attack-") as name:
        stage = Path(name)
        with redirect_stderr(io.StringIO()):  # transformers' progress
            save_model(stage / "model")
        for policy in POLICIES:
            (stage / policy).mkdir()
            for command in (f"export {policy}", "build"):
                perform(command, stage, stage / policy)
        yield stage


def perform(command: str, stage: Path, folder: Path) -> None:
    from dash_export.building import build, dial_table, pipeline
    from dash_export.building.exporting import export
    from dash_export.models import open_checkpoint
    from tests.tiny import tiny_policy

    vars(dial_table).update(WINDOWS=1, SHARES=(0.5,))
    pipeline.TRIALS = 1  # whatever else runs
    kind, _, policy = command.partition(" ")
    if kind == "export":
        checkpoint = open_checkpoint(stage / "model")
        export(checkpoint, folder / BUNDLE, tiny_policy(checkpoint, POLICIES[policy]))
    else:
        build(folder / BUNDLE, "cpu", weights="fp32")


def exported(stage: Path, folder: Path) -> str:
    """The policy of a whole bundle; nothing where the bundle says that it is unfinished. Raises FaultError."""
    from dash_export.bundle.bundle import Bundle
    from dash_export.errors import BundleError

    try:
        bundle = Bundle.open(folder / BUNDLE)
        bundle.verify(bundle.manifest.files)
    except BundleError as error:
        if "no bundle" in str(error):
            return ""
        raise FaultError(f"a bundle that is damaged: {error}") from error
    for name in POLICIES:
        if Bundle.open(stage / name / BUNDLE).manifest.files == bundle.manifest.files:
            return name
    raise FaultError("a bundle of no policy that was exported")


def built(stage: Path, folder: Path) -> str:
    from dash_export import DashRuntime
    from dash_export.errors import BundleError, StaleBuildError

    if not (policy := exported(stage, folder)):
        raise FaultError("a build spoilt its bundle")
    try:
        runtime = DashRuntime.load(folder / BUNDLE, TARGET)
    except BundleError as error:
        if isinstance(error, StaleBuildError) or "is unfinished" in str(error) or "does not exist" in str(error):
            return ""
        raise FaultError(f"a build that is damaged: {error}") from error
    sound = DashRuntime.load(stage / policy / BUNDLE, TARGET)
    if runtime.build.files != sound.build.files:
        raise FaultError("a build of other bytes than an undisturbed one")
    layers = runtime.bundle.manifest.policy.layers
    one, other = (each.generate([5, 9, 250, 31, 7], 2, skip=layers).tokens.tolist() for each in (runtime, sound))
    if one != other:
        raise FaultError("a build that gives other tokens")
    return policy


@dataclass(frozen=True)
class Scene:
    """A command, and what an undisturbed run of it takes and leaves. `start` is copied for each trial."""

    stage: Path
    command: str
    before: tuple[str, ...]
    start: Path
    operations: int
    names: frozenset[str]

    @classmethod
    def rehearsed(cls, stage: Path, name: str, victim: Callable[..., None]) -> Scene:
        (command, *before), start = SCENES[name], stage / name / "start"
        start.mkdir(parents=True)
        for each in before:
            perform(each, stage, start)
        folder = start.with_name("rehearsal")
        shutil.copytree(start, folder)
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=victim, args=(command, stage, folder, 0, theirs), daemon=True)
        process.start()
        theirs.close()
        count = ours.recv()
        process.join(PATIENCE)
        scene = cls(stage, command, tuple(before), start, count, frozenset(_names(folder)))
        if process.exitcode or (faults := scene.finished(folder)):
            raise SystemExit(f"{name}: an undisturbed run is not whole: {process.exitcode}, {faults}")
        return scene

    def moment(self, random: Random) -> int:
        """The number of an operation, often one of the last: there an output takes its place."""
        return random.randint(1 if random.random() < 0.5 else max(1, self.operations - LAST), self.operations)

    def state(self, folder: Path) -> str:
        return (built if self.command == "build" else exported)(self.stage, folder)

    def survived(self, folder: Path) -> list[str]:
        try:
            self.state(folder)
        except Exception:
            return [traceback.format_exc()]
        return []

    def completed(self, folder: Path, rebuild: bool) -> list[str]:
        try:
            perform(self.command, self.stage, folder)
            faults = self.finished(folder)
            if (
                rebuild and "build" in self.before and self.command != "build" and not faults
            ):  # the engines are not lost for good
                perform("build", self.stage, folder)
                faults = [] if built(self.stage, folder) else ["the next build is not whole"]
        except Exception:
            return [traceback.format_exc()]
        return faults

    def finished(self, folder: Path) -> list[str]:
        state, (kind, _, policy) = self.state(folder), self.command.partition(" ")
        faults = [] if state and (kind == "build" or state == policy) else [f"a whole run leaves {state!r}"]
        return faults + [f"left behind: {name}" for name in sorted(_names(folder) - self.names)]


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def watch(folder: Path, before: Callable[[], None], synced: Callable[[int], None]) -> None:
    """Call `before()` ahead of each operation of this process that changes what lies in `folder`, or makes it durable,
    and `synced(fd)` after each fsync. For the rest of the process: an audit hook cannot be taken away.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changes = event in _CHANGING or (event == "open" and args[2] & _WRITING)
        if changes and isinstance(args[0], (str, os.PathLike)):
            path = os.fspath(args[0])
            if path.startswith(str(folder)) or (event != "open" and not Path(path).is_absolute()):
                before()

    def sync(file: int, real: Callable[[int], None] = os.fsync) -> None:
        before()
        real(file)
        synced(file)

    vars(os).update(fsync=sync)
    sys.addaudithook(hook)
