"""A Python of its own for what strangers wrote: lines of JSON in and out, each within its time."""

from __future__ import annotations

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
"""For a Python and its imports: a slow disk and a busy machine are no fault of what it is to do."""
MAX_BYTES = 10_000_000
"""Length of one answer, as JSON."""
NO_PYTHON = "Chat templates and grammars need a Python of their own: set sys.executable to one that starts"


class Child:
    """Each line is answered by one: [whether it went well, text]. One thread may ask at a time."""

    def __init__(self, script: Path, setup: Mapping[str, Any]) -> None:
        """Raises RequestError where it does not start. `path`, where modules are found, is added to the setup."""
        # A frozen program is no Python: it would start itself. -I -S: the path of here comes in the first message.
        python = "" if getattr(sys, "frozen", False) else sys.executable or ""
        try:  # in a session of its own: an interrupt from the terminal is not for it
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
        """Not where it is another process's: that of the one this one was forked from."""
        return self.process.poll() is None

    def ask(self, request: str, seconds: float, costly: str, instead: str = "") -> tuple[bool, str]:
        """A line of JSON -> (whether it went well, text). Anything else is the end of the process, and so is its time:
        that ends the pipes, and whoever reads them. Raises RequestError: `costly`, and what to do `instead`.
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
        except BaseException as error:  # an interrupt too: half an answer may be on its way
            self.end()
            if not isinstance(error, (OSError, ValueError, TypeError, RecursionError)):
                raise
            raise RequestError(f"{costly} ({error}). {instead}".rstrip()) from error
        finally:
            clock.cancel()
        return bool(good), str(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child and reap it. In a process that was forked from its owner Popen finds that it has no such child."""
    process.kill()
    with suppress(OSError), process:  # closes its pipes, in one of which may be what it has not read
        pass
