"""Feed damaged files to every parser: `python -m tests.fuzz`, or `make fuzz`. CONTRIBUTING.md says what it is for.

Each input is read or refused by a DashError: within LIMIT seconds of CPU time and a bounded memory, and nothing is
written outside the folder. Each parser runs in a process of its own, which notes the input it is about to read: one
that crashes or hangs leaves it. The corpus is read first. What fails is kept in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when the libraries load.
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True

import click  # noqa: E402

from dash_export.errors import DashError  # noqa: E402
from dash_export.runtime.chat_template import CHILD  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"
LIMIT = 5.0  # seconds of CPU time
HANG = 30.0  # seconds on a clock, of a machine that may be busy
MEMORY = 64 << 20  # bytes, beside four times the input
ADDRESSES = 2 << 30  # bytes more than at the start: what one input may ask for at most
ALIKE = 3  # failures of one place that are kept
FEWEST = 30  # inputs of each parser, however slow the machine
# What a worker and its watchdog share:
COUNT, REFUSED, ACCEPTED, SLOWEST, LARGEST, BEGAN = range(6)
CURRENT, FAILED = "current", "failed"
COLUMNS = ("inputs", "per_second", "refused", "accepted", "slowest_s", "memory_mib")


def _peak(first: bool = False) -> int:
    """The largest resident set since the call with `first`, in bytes."""
    if first:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10


def _watched(folder: Path, writes: list[str]) -> None:
    """List in `writes` what this process changes outside of `folder`."""
    allowed = (str(folder), "/dev/", "/proc/")
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & flags
        if opens or event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link"):
            path, beside = arguments[0], None if opens else arguments[-1]
            if isinstance(path, int):
                return
            path = os.path.join(f"/proc/self/fd/{beside}" if (beside or 0) > 0 else ".", os.fsdecode(path))  # noqa: PTH118
            if not os.path.realpath(path).startswith(allowed):
                writes.append(f"{event} {path!r}")
        elif event == "subprocess.Popen" and str(CHILD) in arguments[1]:
            pass  # a chat template's own
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect"):
            writes.append(f"{event} {arguments!r:.100}")

    sys.addaudithook(hook)


def _inputs(name: str, seeds: Path, corpus: Path, seed: int, first: int) -> Iterator[bytes | None]:
    """The corpus, then damaged seeds without end; None where the corpus ends."""
    from tests.fuzz.mutators import damaged
    from tests.fuzz.parsers import PARSERS

    kept = [path.read_bytes() for path in sorted((corpus / name).glob("*"))]
    yield from kept[first:]
    yield None
    sound = PARSERS[name].seeds(seeds)
    number = max(0, first - len(kept))
    while True:
        yield damaged(random.Random(f"{name} {seed} {number}"), sound, PARSERS[name].mutator)
        number += 1


def _work(name: str, folder: Path, seeds: Path, corpus: Path, seed: int, until: float, board: Any) -> None:
    """Read inputs until it is time; the number of the first is what the board has counted."""
    from tests.fuzz.parsers import PARSERS

    parser, scratch = PARSERS[name], folder / "scratch"
    if not scratch.exists():
        shutil.copytree(seeds, scratch)
    tempfile.tempdir = str(scratch)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    writes: list[str] = []
    _watched(folder, writes)
    addresses = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES, addresses + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replaying = True
    for data in _inputs(name, seeds, corpus, seed, int(board[COUNT])):
        if data is None:
            replaying = False
            continue
        if not replaying and time.monotonic() > until and board[COUNT] >= FEWEST:
            return
        (folder / CURRENT).write_bytes(data)
        board[BEGAN], cpu, before = time.monotonic(), time.process_time(), _peak(first=True)
        wrong = _tried(parser, scratch, data, replaying, board)
        seconds, memory = time.process_time() - cpu, _peak() - before
        board[BEGAN] = 0
        if seconds > LIMIT:
            wrong = wrong or f"{LIMIT:g} s: took {seconds:.1f} s"
        if memory > 4 * len(data) + MEMORY:
            wrong = wrong or f"memory: took {memory >> 20} MiB"
        if writes:
            wrong = f"outside: {writes[0]}"
            writes.clear()
        board[SLOWEST], board[LARGEST] = max(board[SLOWEST], seconds), max(board[LARGEST], memory)
        board[COUNT] += 1
        if wrong:
            with (folder / FAILED).open("a") as file:
                file.write(json.dumps([wrong, data.hex()]) + "\n")


def _tried(parser: Any, scratch: Path, data: bytes, always_deep: bool, board: Any) -> str:
    """Read one input; what was wrong, or nothing."""
    try:
        parser.run(scratch, data)
        if parser.deep is not None and (always_deep or zlib.crc32(data) % parser.every == 0):
            parser.deep(scratch)
        board[ACCEPTED] += 1
    except (DashError, click.UsageError):
        board[REFUSED] += 1
    except BaseException as error:  # a Rust library panics as one
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/dash_export/" in frame.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__}: {place} {error!s:.100}"
    return ""


class Run:
    """One parser's turn: when it ends, what its workers count, and the process at work."""

    def __init__(self, name: str, folder: Path, share: float, arguments: argparse.Namespace) -> None:
        self.name, self.folder, self.arguments = name, folder, arguments
        self.began = time.monotonic()
        self.until = self.began + share
        self.board = multiprocessing.get_context("fork").RawArray("d", 6)
        self.failures: list[str] = []
        folder.mkdir()
        self.start()

    def start(self) -> None:
        given = self.arguments
        values = (self.name, self.folder, given.seeds, given.corpus, given.seed, self.until, self.board)
        self.process = multiprocessing.get_context("fork").Process(target=_work, args=values)
        self.process.start()

    def goes_on(self) -> bool:
        """Look after the process: start another after a crash or a hang. Whether the run goes on."""
        input_began = self.board[BEGAN]  # 0 between two
        hangs = input_began and time.monotonic() - input_began > HANG
        if self.process.is_alive() and not hangs:
            return True
        if hangs:
            self.process.kill()
        self.process.join()
        if self.process.exitcode == 0:
            for line in (self.folder / FAILED).read_text().splitlines() if (self.folder / FAILED).exists() else []:
                wrong, data = json.loads(line)
                self.keep(wrong, bytes.fromhex(data))
            self.seconds = time.monotonic() - self.began
            shutil.rmtree(self.folder)
            return False
        current = self.folder / CURRENT
        what = f"hang: after {HANG:g} s" if hangs else f"crash: exit code {self.process.exitcode}"
        self.keep(what, current.read_bytes() if current.exists() else b"")
        self.board[COUNT] += 1
        self.board[BEGAN] = 0
        self.start()
        return True

    def keep(self, wrong: str, data: bytes) -> None:
        """Note a failure, and put its input into the corpus unless the like of it is there."""
        kind, digest = "".join(wrong.split(" ")[:2]), hashlib.sha256(data).hexdigest()[:12]
        alike = sum(kind in each for each in self.failures)
        self.failures.append(f"{kind} {digest} {wrong}")
        if alike >= ALIKE:
            return
        print(f"{self.name} {digest}: {wrong}", file=sys.stderr, flush=True)
        if not (self.arguments.corpus / self.name / digest).exists():
            (self.arguments.save / self.name).mkdir(parents=True, exist_ok=True)
            (self.arguments.save / self.name / digest).write_bytes(data)

    def row(self) -> dict[str, Any]:
        count, refused, accepted, slowest, largest = (self.board[index] for index in range(BEGAN))
        return {
            "inputs": int(count), "per_second": round(count / self.seconds, 1), "refused": int(refused),
            "accepted": int(accepted), "slowest_s": round(slowest, 3), "memory_mib": round(largest / (1 << 20), 1),
            "failures": self.failures,
        }  # fmt: skip


def main() -> None:
    """Fuzz for a time, print a table and one JSON line; exit code 1 where something failed."""
    parse = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parse.add_argument("--seconds", type=float, default=3600, help="for all parsers together")
    parse.add_argument("--seed", type=int, default=int(time.time()))
    parse.add_argument("--only", nargs="+", metavar="PARSER")
    parse.add_argument("--corpus", type=Path, default=CORPUS, help="inputs that failed once, read first")
    parse.add_argument("--save", type=Path, default=CORPUS, help="where inputs that fail are put")
    parse.add_argument("--seeds", type=Path, help="a folder that make_seeds wrote")
    arguments = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.seeds is None:  # in a process of its own: threads do not survive a fork
            arguments.seeds = Path(folder) / "seeds"
            make = "import sys, pathlib, tests.fuzz.parsers as p; p.make_seeds(pathlib.Path(sys.argv[1]))"
            subprocess.run([sys.executable, "-c", make, arguments.seeds], check=True, stderr=subprocess.DEVNULL)
        sys.exit(_fuzzed(arguments, Path(folder)))


def _fuzzed(arguments: argparse.Namespace, folder: Path) -> int:
    from tests.fuzz.parsers import PARSERS, preloaded

    preloaded(arguments.seeds)
    waiting, jobs = list(arguments.only or PARSERS), len(os.sched_getaffinity(0))
    share = arguments.seconds * jobs / len(waiting)
    running: list[Run] = []
    table: dict[str, dict[str, Any]] = {}
    print(f"{'parser':15}", *(f"{name:>10}" for name in COLUMNS))
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running.append(Run(name, folder / name, share, arguments))
        for run in [each for each in running if not each.goes_on()]:
            running.remove(run)
            table[run.name] = row = run.row()
            print(f"{run.name:15}", *(f"{row[name]:>10}" for name in COLUMNS), f"{len(row['failures'])} failed")
        time.sleep(0.05)
    total = sum(row["inputs"] for row in table.values())
    print(json.dumps({"seed": arguments.seed, "inputs": total, "parsers": table}))
    return int(any(row["failures"] for row in table.values()))


if __name__ == "__main__":
    main()
