"""Asking files and programs about the machine. Whatever they answer, or if they never do, `doctor` goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where the machine's files are."""
SECONDS = 10.0
LIMIT = 1 << 16
"""Bytes read of any answer."""
LINE = 200
"""Characters shown of any answer."""


@dataclass(frozen=True)
class Answer:
    """`code` 0 is success, None says that the program is not there or does not start; `text` has stderr in it."""

    code: int | None
    text: str

    @property
    def last_line(self) -> str:
        return self.text.rpartition("\n")[2].strip()


def ask(program: str, *arguments: str) -> Answer:
    """Run a program without input, for SECONDS at most, and read the first LIMIT bytes it prints."""
    path = shutil.which(program)
    if path is None:
        return Answer(None, "")
    try:
        # A session of its own: what the program starts ends with it.
        process = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, str(error))
    timer = threading.Timer(SECONDS, _end, [process])
    timer.start()
    try:
        with process:
            assert process.stdout is not None
            printed = process.stdout.read(LIMIT)
            if len(printed) == LIMIT:
                _end(process)
    finally:
        timer.cancel()
    return Answer(process.returncode, printable(printed))


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except OSError:
        pass  # it has just ended by itself


def read(path: str | Path) -> str:
    """The first LIMIT bytes of a file under ROOT as text; "" when it cannot be read."""
    try:
        with (ROOT / path).open("rb") as file:
            return printable(file.read(LIMIT))
    except OSError:
        return ""


def printable(data: bytes) -> str:
    """As text without what could move a terminal's cursor."""
    text = data.decode("utf-8", errors="replace")
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text).strip()
