"""A Python process of its own for code and data from strangers: JSON lines in and out, each answer within its time."""

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

from dash_export.errors import RequestError

START_SECONDS = 60.0
"""To start Python and its imports: a slow disk or a busy machine must not count against the request."""
MAX_BYTES = 10_000_000
"""Longest answer, as JSON."""
NO_PYTHON = "Chat templates and grammars need a Python of their own: set sys.executable to one that starts"


class Child:
    """A child process that answers each line by one: [whether it went well, text]. One thread may ask at a time."""

    def __init__(self, script: Path, setup: Mapping[str, Any]) -> None:
        """Start `script` and send it `setup`, with `sys.path` as its `path`. Raises RequestError where that fails."""
        # The executable of a frozen program is no Python: it would start the program again. -I -S: the child takes
        # its sys.path from the first message.
        python = "" if getattr(sys, "frozen", False) else sys.executable or ""
        try:  # in its own session: an interrupt from the terminal must not reach the child
            self.process = subprocess.Popen(
                [python, "-I", "-S", str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise RequestError(f"{NO_PYTHON} ({error}).") from error
        assert self.process.stdin and self.process.stdout  # noqa: PT018
        self._to, self._from = self.process.stdin, self.process.stdout
        self.end = weakref.finalize(self, _end, self.process)
        path = [entry for entry in sys.path if isinstance(entry, str)]
        self.ask(json.dumps({"path": path, **setup}), START_SECONDS, NO_PYTHON)

    @property
    def alive(self) -> bool:
        """Whether the child runs and is this process's own: in a process forked from its owner this is False."""
        return self.process.poll() is None

    def ask(self, request: str, seconds: float, costly: str, instead: str = "") -> tuple[bool, str]:
        """Send a line of JSON and return (whether it went well, text). Kill the child after `seconds`, which closes the
        pipes and so ends the read, and on any other answer. Raises RequestError: `costly`, and what to do `instead`.
        """
        clock = Timer(seconds, self.process.kill)
        clock.daemon = True
        clock.start()
        try:
            self._to.write(request.encode() + b"\n")
            self._to.flush()
            answer = self._from.readline(MAX_BYTES)
            if not answer.endswith(b"\n"):
                over = len(answer) == MAX_BYTES
                raise ValueError(f"it writes over {MAX_BYTES} bytes" if over else "its process has ended")
            good, text = json.loads(answer)
        except BaseException as error:  # on an interrupt too: half an answer may be in the pipe
            self.end()
            if not isinstance(error, (OSError, ValueError, TypeError, RecursionError)):
                raise
            raise RequestError(f"{costly} ({error}). {instead}".rstrip()) from error
        finally:
            clock.cancel()
        return bool(good), str(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and reap it. In a process forked from its owner, Popen finds no such child and kills nothing."""
    process.kill()
    with suppress(OSError), process:  # closing a pipe flushes what the child has not read: that may fail
        pass
