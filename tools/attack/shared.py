"""What the attacks share: a tiny model with its policies and bundles, the commands that write them, each run in a
process of its own, and the check of what lies there afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
_PATHS = [str(ROOT), str(Path(__file__).parent)]
sys.path[:0] = [path for path in _PATHS if path not in sys.path]
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "agg")
FORK = multiprocessing.get_context("forkserver")
# Nothing that a command imports is left to the processes: they would take seconds, and start writing one by one.
FORK.set_forkserver_preload(
    [
        "tests.tiny",
        "shared",
        "onnxruntime",
        "dash_export.building.engine_graphs",
        "dash_export.graphs.ort",
        "dash_export.commands.frontier",
        "dash_export.commands.reports",
        "dash_export.evaluate.pictures",
        "dash_export.train.training",
    ]
)
BUNDLE, POLICY, PICTURE = "m.dash", "p.safetensors", "picture"
SEEDS = {"a": 0, "b": 1}
"""The two policies, by the seed that trains them."""
TARGETS = {"fp32": "cpu-fp32", "int8": "cpu-int8"}
LAYERS = 5
LAST_OPERATIONS = 12
PATIENCE = 120
"""Seconds after which a process hangs."""


@dataclass(frozen=True)
class Fault:
    """A thing that must not be: what kind, and what was seen."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Command:
    """`export a` (or `b`, or the policy file that lies there), `build fp32`, `train a`, `frontier`."""

    kind: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Command:
        return cls(*text.split())

    def __str__(self) -> str:
        return f"{self.kind} {self.variant}".strip()


@dataclass(frozen=True)
class Stage:
    """The folder of everything that attacks begin from: the model, a text, policies, and bundles of both policies with
    all builds, each made without disturbance.
    """

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def policy(self, name: str) -> Path:
        return self.folder / name / POLICY

    def bundle(self, name: str) -> Path:
        return self.folder / name / BUNDLE


@contextmanager
def staged() -> Iterator[Stage]:
    """A stage while the attack goes on."""
    from tests.tiny import save_model

    with tempfile.TemporaryDirectory(prefix="dash-export-attack-") as name:
        stage = Stage(Path(name))
        with redirect_stderr(io.StringIO()):  # transformers' progress
            save_model(stage.model, num_hidden_layers=LAYERS)
        sentences = (f"The {index} ships sailed to port {index * 7 % 31}." for index in range(100))
        (stage.folder / "prose.txt").write_text(" ".join(sentences))
        for policy in SEEDS:
            (stage.folder / policy).mkdir()
            for command in (f"train {policy}", "export trained", *(f"build {weights}" for weights in TARGETS)):
                perform(Command.parse(command), stage, stage.folder / policy)
        yield stage


def perform(command: Command, stage: Stage, folder: Path) -> str:
    """Run a command, as small as it gets, on what lies in `folder`. Returns the key of the bundle that it read or
    wrote, where there is one.
    """
    import torch

    from dash_export.building import build, dial
    from dash_export.exporting import export
    from dash_export.models import open_checkpoint
    from dash_export.policy import default_units, load_policy
    from dash_export.train.defaults import TrainingSettings
    from dash_export.train.training import train

    torch.set_num_threads(1)  # whose sums are the same everywhere
    vars(dial).update(WINDOWS=1, SHARES=(0.5,))
    if command.kind == "export":
        checkpoint = open_checkpoint(stage.model)
        path = folder / POLICY if command.variant == "trained" else stage.policy(command.variant)
        return export(checkpoint, folder / BUNDLE, load_policy(path, checkpoint.spec)).manifest.key
    if command.kind == "build":
        return build(folder / BUNDLE, "cpu", weights=command.variant).bundle_key
    if command.kind == "train":
        settings = TrainingSettings(
            seed=SEEDS[command.variant],
            window=16,
            windows=2,
            search_steps=1,
            fit_steps=1,
            warm_up_steps=1,
            regression_steps=1,
            tuning_steps=1,
            precision="float32",
        )
        texts = [stage.folder / "prose.txt"]
        train(stage.model, folder / POLICY, texts, units=default_units(LAYERS), settings=settings)
        return ""
    return _frontier(folder)


def _frontier(folder: Path) -> str:
    from dash_export.cli import cli

    few = ["--rounds", "0", "--limit", "1", "--window", "16", "--prefix", "4", "--skipped", "1", "--target", "cpu-fp32"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.main(["frontier", str(folder / BUNDLE), *few, "-o", str(folder / PICTURE)], standalone_mode=False)
    return ""


def start(target: Callable[..., None], *args: object) -> ForkServerProcess:
    process = FORK.Process(target=target, args=args, daemon=True)
    process.start()
    return process


@dataclass(frozen=True)
class Outcome:
    """How a command ended: with the key of a bundle, or with an error."""

    command: Command
    key: str = ""
    error: str = ""
    known: bool = True
    """Whether the error is one that this package raises on purpose."""
    busy: bool = False

    def fault(self) -> Fault:
        kind = "error that is not clear" if self.known else "traceback"
        return Fault(f"{kind} ({self.command.kind}): {_general(self.error)}", self.error)


def outcome(command: Command, stage: Stage, folder: Path) -> Outcome:
    """Run a command; no error leaves it."""
    from click import ClickException

    from dash_export.errors import DashError

    try:
        return Outcome(command, perform(command, stage, folder))
    except (DashError, ClickException) as error:
        busy = type(error).__name__ == "BusyError" or "is being written by" in str(error)
        return Outcome(command, error=f"{type(error).__name__}: {error}", busy=busy)
    except Exception:
        return Outcome(command, error=traceback.format_exc(), known=False)


def _general(error: str) -> str:
    """An error without paths and numbers, so that equal ones are counted together; a traceback by its kind and where in
    this package it came from.
    """
    places = re.findall(r'dash_export/([\w/]+)\.py", line \d+, in (\w+)', error)
    if error.startswith("Traceback") and places:
        return f"{error.strip().splitlines()[-1].partition(':')[0]} in {places[-1][0]}.{places[-1][1]}"
    line = re.sub(r"(/[^\s:'\"]+)+", lambda match: Path(match[0]).name, error.partition("\n")[0])
    return re.sub(r"\d+", "N", line)[:110]


# What lies there ------------------------------------------------------------------------------------------------------


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bundle_state(stage: Stage, folder: Path) -> str | Fault:
    """The name of the policy of a whole bundle, `unfinished` where the bundle says so, or a fault."""
    from dash_export.bundle import Bundle
    from dash_export.errors import BundleError

    try:
        bundle = Bundle.open(folder / BUNDLE)
        bundle.verify(bundle.manifest.files)
    except BundleError as error:
        if "no bundle" in str(error) or "not a finished bundle" in str(error):
            return "unfinished"
        return Fault("a bundle that is damaged", str(error))
    except Exception:
        return Fault("traceback where a bundle is opened", traceback.format_exc())
    for name in SEEDS:
        if Bundle.open(stage.bundle(name)).manifest.files == bundle.manifest.files:
            return name
    return Fault("a bundle of no policy that was exported", bundle.manifest.policy.origin)


def build_state(stage: Stage, folder: Path, weights: str) -> str | Fault:
    """`whole` where a target's engines give the tokens they should, `stale`, `unfinished`, or a fault."""
    from dash_export import DashRuntime
    from dash_export.bundle import Bundle
    from dash_export.errors import DashError, StaleBuildError

    target = TARGETS[weights]
    try:
        runtime = DashRuntime.load(folder / BUNDLE, target)
    except StaleBuildError:
        return "stale"
    except DashError as error:
        if "is unfinished" in str(error) or "does not exist" in str(error):
            return "unfinished"
        return Fault("a build that is damaged", str(error))
    except Exception:
        return Fault("traceback where a build is loaded", traceback.format_exc())
    policy = bundle_state(stage, folder)
    if isinstance(policy, Fault):
        return policy
    if runtime.build.files != Bundle.open(stage.bundle(policy)).load_build(target).files:
        return Fault("a build of other bytes than an undisturbed one")
    if _tokens(runtime) != _tokens(DashRuntime.load(stage.bundle(policy), target)):
        return Fault("a build that gives other tokens")
    return "whole"


def _tokens(runtime: Any) -> list[int]:
    layers = runtime.bundle.manifest.policy.layers
    return list(map(int, runtime.generate([5, 9, 250, 31, 7], 2, skip=layers).tokens))


def policy_state(stage: Stage, folder: Path) -> str | Fault:
    """The name of a whole policy file whose card is its own, `unfinished` (also where only the folder beside it says
    so), or a fault.
    """
    from dash_export.errors import DashError
    from dash_export.models import open_checkpoint
    from dash_export.policy import card_path, load_policy

    path = folder / POLICY
    unfinished = path.with_name(f"{POLICY}.unfinished").exists()
    if not path.exists():
        return "unfinished"
    try:
        load_policy(path, open_checkpoint(stage.model).spec)
    except DashError as error:
        return Fault("a policy file that is damaged", str(error))
    name = next((name for name in SEEDS if sha(stage.policy(name)) == sha(path)), None)
    if name is None:
        return Fault("a policy file of other bytes than an undisturbed one")
    try:
        card = _card(path)
    except (OSError, ValueError) as error:
        return "unfinished" if unfinished else Fault("a policy without its card", repr(error))
    if card != _card(card_path(stage.policy(name)).with_suffix(".safetensors")):
        return "unfinished" if unfinished else Fault("a policy with the card of another", f"of {name}")
    return name


def _card(policy: Path) -> dict[str, Any]:
    from dash_export.policy import card_path

    card: dict[str, Any] = json.loads(card_path(policy).read_text())
    return {name: value for name, value in card.items() if name != "seconds"}


def picture_state(folder: Path, expected: dict[str, str]) -> str | Fault:
    """`whole`, `unfinished` where files are missing, or a fault."""
    files = {path.name: sha(path) for path in folder.glob(f"{PICTURE}.*")}
    wrong = [name for name, digest in files.items() if expected.get(name, digest) != digest]
    if wrong:
        return Fault("a picture or report that is cut short", ", ".join(wrong))
    return "whole" if expected.keys() <= files.keys() else "unfinished"


def leftovers(folder: Path) -> list[Fault]:
    """What no run should leave: temporary names, locks, unfinished folders, files that no record lists."""
    from dash_export.bundle import BUILD, MANIFEST, Bundle
    from dash_export.errors import DashError

    known = {MANIFEST}
    bundle = folder / BUNDLE
    try:
        opened = Bundle.open(bundle)
        known |= {record.name for record in opened.manifest.files}
    except DashError:
        pass
    for path in bundle.glob("engines/*"):
        known |= {f"engines/{path.name}/{name}" for name in (BUILD, ".journal.json")}
        try:
            record = json.loads((path / BUILD).read_text())
            known |= {item["name"] for item in record["files"]}
        except (OSError, ValueError, KeyError):
            pass
    own = {POLICY, Path(POLICY).with_suffix(".json").name, *(f"{PICTURE}.{kind}" for kind in ("png", "svg", "json"))}
    names = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.suffix == ".lock"
    } | {path.name for path in folder.iterdir() if path.name != BUNDLE and path.is_dir()}
    strays = sorted(names - {f"{BUNDLE}/{name}" for name in known} - own)
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in strays:
        part = next((part for part in name.split("/") if part.startswith(".") or ".unfinished" in part), "")
        kind = (
            "a lock"
            if part.endswith(".lock")
            else "a previous bundle"
            if part.endswith(".previous")
            else "a temporary name"
            if part.startswith(".tmp-")
            else "an unfinished folder"
            if ".unfinished" in part
            else "a file that no record lists"
        )
        kinds[kind].append(name)
    return [Fault(f"left behind: {kind}", ", ".join(given[:4])) for kind, given in kinds.items()]


# Killing --------------------------------------------------------------------------------------------------------------

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
            return [Fault(f"the next run fails: {_general(again.error)}", again.error)]
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


# Reports --------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """Faults of many trials, by what was tried."""

    name: str
    trials: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    faults: defaultdict[str, list[tuple[int, Fault]]] = field(default_factory=lambda: defaultdict(list))
    notes: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Further counts, per what was tried: columns of the table."""

    def add(self, what: str, trial: int, seconds: float, faults: list[Fault], **notes: int) -> None:
        self.trials[what] += 1
        self.seconds[what] += seconds
        self.faults[what] += [(trial, fault) for fault in faults]
        self.notes[what].update(notes)

    def finish(self) -> None:
        """Print the table, each kind of fault with its first trial, and one JSON line. Exits with 1 on faults."""
        columns = list(dict.fromkeys(name for notes in self.notes.values() for name in notes))
        console = Console(highlight=False)
        console.width = max(console.width, 120)
        table = Table(self.name, "trials", "s each", *columns, "with faults")
        for what, trials in self.trials.items():
            bad = len({trial for trial, _ in self.faults[what]})
            table.add_row(
                what,
                str(trials),
                f"{self.seconds[what] / trials:.2f}",
                *(str(self.notes[what][name]) for name in columns),
                str(bad),
            )
        console.print(table)
        kinds = {what: Counter(fault.kind for _, fault in faults) for what, faults in self.faults.items()}
        for what, faults in self.faults.items():
            for kind, count in kinds[what].most_common():
                trial, fault = next(item for item in faults if item[1].kind == kind)
                console.print(f"{what}: {count} x {kind}", markup=False)
                console.print(f"    trial {trial}: {fault.detail.strip()[-300:]}", markup=False)
        tried = {
            what: {
                "trials": count,
                "seconds": round(self.seconds[what] / count, 3),
                **self.notes[what],
                "faults": dict(kinds.get(what, {})),
                "trials_with_faults": sorted({trial for trial, _ in self.faults[what]}),
            }
            for what, count in self.trials.items()
        }
        print(json.dumps({"attack": self.name, "tried": tried}))
        if any(self.faults.values()):
            raise SystemExit(1)


def chosen(names: tuple[str, ...], known: dict[str, Any]) -> list[str]:
    """The known names among those asked for, all where none is. Raises SystemExit for one that is not known."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"There is no {unknown[0]!r}. Known: {'; '.join(known)}.")
    return list(names or known)
