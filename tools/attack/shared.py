"""What the attacks share: a tiny model with its policies and bundles, the commands that write them, each run in a
process of its own, and the report of what happened.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any

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
        "scenes",
        "onnxruntime",
        "dash_export.building.engine_graphs",
        "dash_export.graphs.lower.ort",
        "dash_export.commands.frontier",
        "dash_export.commands.reports",
        "dash_export.measure.pictures",
        "dash_export.train.training",
    ]
)
BUNDLE, POLICY, PICTURE = "m.dash", "p.safetensors", "picture"
SEEDS = {"a": 0, "b": 1}
"""The two policies, by the seed that trains them."""
TARGETS = {"fp32": "cpu-fp32", "int8": "cpu-int8"}
Process = subprocess.Popen[bytes]
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

    from dash_export.building import build, dial_table, pipeline
    from dash_export.building.exporting import export
    from dash_export.bundle.policy_file import load_policy
    from dash_export.core.policy import default_units
    from dash_export.models import open_checkpoint
    from dash_export.train import TrainingSettings
    from dash_export.train.training import train

    torch.set_num_threads(1)  # whose sums are the same everywhere
    vars(dial_table).update(WINDOWS=1, SHARES=(0.5,))
    pipeline.TRIALS = 1  # whatever else runs
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


@contextmanager
def serving(bundle: Path, target: str, *options: str, output: IO[str] | None = None) -> Iterator[tuple[str, Process]]:
    """A server's address, once it answers, and its process. What it prints goes to `output`."""
    import httpx

    from tests.commands.helpers import free_port

    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "dash_export", "serve", str(bundle), "--target", target, "--port", str(port)]
    process = subprocess.Popen([*command, *options], stdout=output, stderr=output)
    try:
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit("The server has ended.")
            time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()


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
        return Fault(f"{kind} ({self.command.kind}): {general(self.error)}", self.error)


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


def general(error: str) -> str:
    """An error without paths and numbers, so that equal ones are counted together; a traceback by its kind and where in
    this package it came from.
    """
    places = re.findall(r'dash_export/([\w/]+)\.py", line \d+, in (\w+)', error)
    if error.startswith("Traceback") and places:
        return f"{error.strip().splitlines()[-1].partition(':')[0]} in {places[-1][0]}.{places[-1][1]}"
    line = re.sub(r"(/[^\s:'\"]+)+", lambda match: Path(match[0]).name, error.partition("\n")[0])
    return re.sub(r"\d+", "N", line)[:110]


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
        from dash_export.commands.tables import print_table

        columns = list(dict.fromkeys(name for notes in self.notes.values() for name in notes))
        bad = {what: sorted({trial for trial, _ in faults}) for what, faults in self.faults.items()}
        rows = [
            (what, trials, f"{self.seconds[what] / trials:.2f}", *(self.notes[what][name] for name in columns),
             len(bad[what]))
            for what, trials in self.trials.items()
        ]  # fmt: skip
        print_table(self.name, ("",), ("trials", "s each", *columns, "with faults"), rows)
        kinds = {what: Counter(fault.kind for _, fault in faults) for what, faults in self.faults.items()}
        for what, faults in self.faults.items():
            for kind, count in kinds[what].most_common():
                trial, fault = next(item for item in faults if item[1].kind == kind)
                print(f"{what}: {count} x {kind}\n    trial {trial}: {fault.detail.strip()[-300:]}")
        tried = {
            what: {
                "trials": count,
                "seconds": round(self.seconds[what] / count, 3),
                **self.notes[what],
                "faults": dict(kinds[what]),
                "trials_with_faults": bad[what],
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
