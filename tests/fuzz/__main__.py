"""Feed damaged files to every parser: `python -m tests.fuzz`, or `make fuzz`. CONTRIBUTING.md says what it is for.

Each input is read or refused by a DashError: within LIMIT seconds of CPU time and a bounded memory, and nothing is
written outside the folder. Each parser runs in a process of its own, which tells the input that it is about to read: a
crash or a hang is known by it. The corpus is read first. What fails is kept in it.
"""

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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Read when the libraries load.
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True

import click  # noqa: E402

from dash_export.errors import DashError  # noqa: E402
from dash_export.text.chat_template import CHILD  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"
LIMIT = 5.0  # seconds of CPU time
HANG = 30.0  # seconds on a clock, of a machine that may be busy
MEMORY = 64 << 20  # bytes, beside four times the input
ADDRESSES = 2 << 30  # bytes more than at the start: what one input may ask for at most
ALIKE = 3  # failures of one place that are kept
FEWEST = 30  # inputs of each parser, however slow the machine
COLUMNS = ("inputs", "per_second", "refused", "accepted", "slowest_s", "memory_mib")
FORK = multiprocessing.get_context("fork")


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


def _inputs(name: str, given: argparse.Namespace, first: int) -> Iterator[tuple[bool, bytes]]:
    """(whether it is of the corpus, input): the corpus, then damaged seeds without end."""
    from tests.fuzz.mutators import damaged
    from tests.fuzz.parsers import PARSERS

    kept = [path.read_bytes() for path in sorted((given.corpus / name).glob("*"))]
    yield from ((True, data) for data in kept[first:])
    sound, number = PARSERS[name].seeds(given.seeds), max(0, first - len(kept))
    while True:
        yield False, damaged(random.Random(f"{name} {given.seed} {number}"), sound, PARSERS[name].mutator)
        number += 1


def _work(name: str, folder: Path, given: argparse.Namespace, until: float, first: int, told: Connection) -> None:
    """Read inputs until it is time. Tells each input, then (what was wrong, if it was accepted, seconds, bytes)."""
    from tests.fuzz.parsers import PARSERS

    scratch = folder / "scratch"
    if not scratch.exists():
        shutil.copytree(given.seeds, scratch)
    tempfile.tempdir = str(scratch)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    writes: list[str] = []
    _watched(folder, writes)
    addresses = int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (addresses + ADDRESSES, addresses + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, (known, data) in enumerate(_inputs(name, given, first), first):
        if not known and time.monotonic() > until and number >= FEWEST:
            return
        told.send(data)
        cpu, before = time.process_time(), _peak(first=True)
        wrong, accepted = _tried(PARSERS[name], scratch, data, known)
        seconds, memory = time.process_time() - cpu, _peak() - before
        if seconds > LIMIT:
            wrong = wrong or f"{LIMIT:g} s: took {seconds:.1f} s"
        if memory > 4 * len(data) + MEMORY:
            wrong = wrong or f"memory: took {memory >> 20} MiB"
        if writes:
            wrong = f"outside: {writes[0]}"
            writes.clear()
        told.send((wrong, accepted, seconds, memory))


def _tried(parser: Any, scratch: Path, data: bytes, always_deep: bool) -> tuple[str, bool]:
    """Read one input; what was wrong, or nothing, and whether it was accepted."""
    try:
        parser.run(scratch, data)
        if parser.deep is not None and (always_deep or zlib.crc32(data) % parser.every == 0):
            parser.deep(scratch)
        return "", True
    except (DashError, click.UsageError):
        return "", False
    except BaseException as error:  # a Rust library panics as one
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/dash_export/" in frame.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return f"{type(error).__name__}: {place} {error!s:.100}", False


def _fuzz(name: str, folder: Path, given: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One parser's turn: what its workers tell, another one after a crash or a hang."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, 0) | {"failures": []}
    began, data = time.monotonic(), b""
    folder.mkdir()
    while True:
        told, telling = FORK.Pipe(duplex=False)
        arguments = (name, folder, given, began + seconds, row["inputs"], telling)
        worker = FORK.Process(target=_work, args=arguments)
        worker.start()
        telling.close()
        wrong = f"hang: after {HANG:g} s"
        try:
            while told.poll(HANG):
                message = told.recv()
                if isinstance(message, bytes):
                    data = message
                else:
                    _note(name, data, row, given, *message)
            worker.kill()
        except EOFError:
            worker.join()
            wrong = f"crash: exit code {worker.exitcode}"
        worker.join()
        if worker.exitcode == 0:
            shutil.rmtree(folder)
            return row | {"per_second": round(row["inputs"] / (time.monotonic() - began), 1)}
        _note(name, data, row, given, wrong, False, 0.0, 0)


def _note(
    name: str, data: bytes, row: dict[str, Any], given: argparse.Namespace,
    wrong: str, accepted: bool, seconds: float, memory: int
) -> None:  # fmt: skip
    """Count an input, and put one that failed into the corpus unless its like is there."""
    row["inputs"] += 1
    row["accepted"] += bool(accepted)
    row["refused"] += not (accepted or wrong)
    row["slowest_s"] = max(row["slowest_s"], round(seconds, 3))
    row["memory_mib"] = max(row["memory_mib"], round(memory / (1 << 20), 1))
    if not wrong:
        return
    kind, digest = "".join(wrong.split(" ")[:2]), hashlib.sha256(data).hexdigest()[:12]
    alike = sum(kind in each for each in row["failures"])
    row["failures"].append(f"{kind} {digest} {wrong}")
    if alike < ALIKE:
        print(f"{name} {digest}: {wrong}", file=sys.stderr, flush=True)
        if not (given.corpus / name / digest).exists():
            (given.save / name).mkdir(parents=True, exist_ok=True)
            (given.save / name / digest).write_bytes(data)


def main() -> None:
    """Fuzz for a time, print a table and one JSON line; exit code 1 where something failed."""
    parse = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parse.add_argument("--seconds", type=float, default=3600, help="for all parsers together")
    parse.add_argument("--seed", type=int, default=int(time.time()))
    parse.add_argument("--only", nargs="+", metavar="PARSER")
    parse.add_argument("--corpus", type=Path, default=CORPUS, help="inputs that failed once, read first")
    parse.add_argument("--save", type=Path, default=CORPUS, help="where inputs that fail are put")
    parse.add_argument("--seeds", type=Path, help="a folder that make_seeds wrote")
    given = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.seeds is None:  # in a process of its own: threads do not survive a fork
            given.seeds = Path(folder) / "seeds"
            make = "import sys, pathlib, tests.fuzz.parsers as p; p.make_seeds(pathlib.Path(sys.argv[1]))"
            subprocess.run([sys.executable, "-c", make, given.seeds], check=True, stderr=subprocess.DEVNULL)
        sys.exit(_fuzzed(given, Path(folder)))


def _fuzzed(given: argparse.Namespace, folder: Path) -> int:
    from tests.fuzz.parsers import PARSERS, preloaded

    preloaded(given.seeds)
    names, table = given.only or list(PARSERS), dict[str, dict[str, Any]]()
    print(f"{'parser':15}", *(f"{column:>10}" for column in COLUMNS))
    for name in names:
        table[name] = row = _fuzz(name, folder / name, given, given.seconds / len(names))
        print(f"{name:15}", *(f"{row[column]:>10}" for column in COLUMNS), f"{len(row['failures'])} failed", flush=True)
    total = sum(row["inputs"] for row in table.values())
    print(json.dumps({"seed": given.seed, "inputs": total, "parsers": table}))
    return int(any(row["failures"] for row in table.values()))


if __name__ == "__main__":
    main()
