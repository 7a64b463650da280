"""Chat templates, each rendered in a process of its own (template_child.py) that is kept for the next turn.

A template is a program of whoever made the model. jinja2's sandbox keeps it from Python's own attributes, the operating
system bounds its memory and a clock its time; where it breaks something, that is a process with nothing to lose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from dash_export.errors import BundleError, RequestError
from dash_export.typed_json import shown

SECONDS = 2.0
START_SECONDS = 60.0
"""For a Python and its jinja2: a slow disk and a busy machine are no fault of the template."""
MEGABYTES = 512
MAX_BYTES = 10_000_000
"""Of one answer, as JSON."""
CHILD = Path(__file__).with_name("template_child.py")
INSTEAD = "Do not use it: replace chat_template.jinja of the model and export again."
_RENDERS = Lock()
os.register_at_fork(before=_RENDERS.acquire, after_in_parent=_RENDERS.release, after_in_child=_RENDERS.release)
NO_PYTHON = "Chat templates need a Python of their own: set sys.executable to one that starts and has jinja2"


class ChatTemplate:
    """A model's `chat_template.jinja`, and its special tokens by name. Threads may share it. Its child starts with the
    first render and ends with it.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self._source, self._special = source, dict(special)
        self._child: _Child | None = None

    def takes_tools(self) -> bool:
        """Whether it tells the model of tools, and of `<tool_call>` as the way to call them."""
        return "tools" in self._source and "<tool_call>" in self._source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Messages {role, content} -> the prompt text. Raises RequestError when the template refuses or misbehaves, and
        BundleError when it is none.
        """
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise RequestError(f"A chat message needs a 'role' and a 'content', both text; got {shown(message)}.")
        given = {"messages": [*map(dict, messages)], "add_generation_prompt": add_generation_prompt, **self._special}
        given |= {"tools": [*tools]} if tools else {}
        try:
            request = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"Chat messages must be text, numbers, lists and mappings ({error}).") from error
        with _RENDERS:
            if self._child is None or self._child.process.poll() is not None:  # or it is not this process's: a fork's
                self._child = _Child(self._source)
            good, text = self._child.ask(request)
        if not good:
            raise RequestError(f"The chat template refuses these messages ({text}).")
        return text


class _Child:
    """A process that has compiled a template. Raises RequestError where it or the template does not come to that, and
    BundleError where the template is none.
    """

    def __init__(self, source: str) -> None:
        # A frozen program is no Python: it would start itself. -I -S: the path of here comes in the first message.
        python = "" if getattr(sys, "frozen", False) else sys.executable or ""
        try:  # in a session of its own: an interrupt from the terminal is not for it
            self.process = subprocess.Popen(
                [python, "-I", "-S", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise RequestError(f"{NO_PYTHON} ({error}).") from error
        assert self.process.stdin and self.process.stdout  # noqa: PT018
        self._to, self._from = self.process.stdin, self.process.stdout
        self._end = weakref.finalize(self, _end, self.process)
        path = [entry for entry in sys.path if isinstance(entry, str)]
        self.ask(json.dumps({"path": path, "memory": MEGABYTES << 20}), starting=True)
        good, text = self.ask(json.dumps({"source": source}))
        if not good:
            self._end()
            raise BundleError(f"The bundle's chat template is not valid ({text}). {INSTEAD}")

    def ask(self, request: str, starting: bool = False) -> tuple[bool, str]:
        """A line of JSON -> (whether it went well, text). Anything else is the end of the process, and so is its time:
        that ends the pipes, and whoever reads them.
        """
        clock = Timer(START_SECONDS if starting else SECONDS, self.process.kill)
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
            self._end()
            if not isinstance(error, (OSError, ValueError, TypeError, RecursionError)):
                raise
            costly = f"The chat template takes over {SECONDS:g} s or {MEGABYTES} MB for these messages, or breaks"
            raise RequestError(f"{NO_PYTHON} ({error})." if starting else f"{costly} ({error}). {INSTEAD}") from error
        finally:
            clock.cancel()
        return bool(good), str(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child and reap it. In a process that was forked from its owner Popen finds that it has no such child."""
    process.kill()
    with suppress(OSError), process:  # closes its pipes, in one of which may be what it has not read
        pass
