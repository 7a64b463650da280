"""Conversations of `dash-export run --chat`: messages, and the commands that begin with a slash."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dash_export.bundle.layout import check_outside_bundles
from dash_export.cli import error_message, printable
from dash_export.commands.printing import AnswerPrinter, rates
from dash_export.commands.run import CHAT_HINT, RunOptions, with_system
from dash_export.core.kinds import Setting
from dash_export.errors import ContextLengthError, DashError, RequestError
from dash_export.files.artifacts import write_atomic
from dash_export.measure.candidates import label
from dash_export.text.chats import chats_text, read_prompts

if TYPE_CHECKING:
    from dash_export.runtime import Session

COMMANDS = {
    "help": "list these commands",
    "system": "TEXT: the system message from now on; without TEXT there is none",
    "budget": "NUMBER: decode time of the next answers, as a fraction of dense, like 0.85; 1 is dense",
    "save": "FILE.jsonl: write the conversation, which `eval --text` and `train --prompts` read, too",
    "load": "FILE.jsonl: go on with a conversation that was saved",
    "stats": "figures of all answers so far",
    "reset": "forget the conversation",
    "quit": "leave",
}
"""Command -> what it does. `Conversation.do_<command>` does it."""


class Conversation:
    """Conversation with a model: its messages, and what commands change of it. `options`: of the command line."""

    def __init__(self, options: RunOptions, show_skips: bool) -> None:
        self._options, self._session = options, options.session
        self.printer = AnswerPrinter(options.session, show_skips)
        self._system, self._setting = options.system, options.setting
        self.turns: list[dict[str, str]] = []
        """The user's and the model's messages, in turn."""
        self._file: Path | None = None
        """The file that was written with this conversation, and may be written again."""

    def take(self, said: str) -> None:
        """Obey a command or answer a message. Raises DashError; the conversation is then what it was."""
        found = re.fullmatch(r"/(\w+)(?:\s+(.*))?", said, re.DOTALL)
        command, rest = (found[1], found[2] or "") if found else ("", "")
        if command in COMMANDS:
            getattr(self, f"do_{command}")(rest)
        elif command and ((near := get_close_matches(command, COMMANDS)) or not rest):
            meant = f" Did you mean {' or '.join(f'/{name}' for name in near)}?" if near else ""
            click.echo(printable(f"There is no command '/{command}'.{meant} {CHAT_HINT}"), err=True)
        elif said:
            asked = [*self.turns, {"role": "user", "content": said}]
            with _stopping(self._session):
                messages = with_system(self._system, asked)
                stream = self._session.chat(messages, self._options.max_tokens, self._options.sampling)
                answer = self.printer.print(stream)
            self.turns = [*asked, {"role": "assistant", "content": answer}]

    def do_help(self, _: str) -> None:
        for command, text in COMMANDS.items():
            click.echo(f"/{command:8}{text}", err=True)

    def do_system(self, text: str) -> None:
        self._system = text or None
        click.echo("The system message holds from the next answer on." if text else "No system message.", err=True)

    def do_budget(self, given: str) -> None:
        budget = 0.0
        with suppress(ValueError):
            budget = float(given)
        if not 0 < budget <= 1:
            raise RequestError(f"/budget takes a number above 0 and up to 1, like 0.85, not {given!r:.40}.")
        setting = Setting("dense") if budget == 1 else Setting("token", budget=budget)
        self._session.rules = self._options.runtime.rules(setting)
        self._setting = setting
        click.echo(f"From the next answer on: {label(setting)}.", err=True)

    def do_save(self, given: str) -> None:
        path = _file("save", given)
        if not self.turns:
            raise RequestError("There is nothing to save yet: say something first.")
        if os.path.lexists(path) and (path != self._file or path.is_symlink()):
            raise RequestError(f"{path} exists: it will not be overwritten. Choose another name.")
        check_outside_bundles(path)
        *asked, answer = with_system(self._system, self.turns)
        try:
            write_atomic(path, chats_text([(asked, answer["content"])]))
        except OSError as error:
            raise RequestError(error_message(error, path) or str(error)) from error
        self._file = path
        click.echo(printable(f"Saved to {path}."), err=True)

    def do_load(self, given: str) -> None:
        path = _file("load", given)
        chats = read_prompts(path)
        messages, later, answer = chats[0]
        begins = int(messages[0]["role"] == "system")
        turns = [*messages[begins:], {"role": "assistant", "content": answer or ""}]
        in_turn = [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        if len(chats) > 1 or later or answer is None or not in_turn:
            raise RequestError(f"{path} is no conversation that /save wrote.")
        self._session.reset()
        self._system = messages[0]["content"] if begins else None
        self.turns, self._file = turns, path
        click.echo(f"Loaded: {len(turns) // 2} turns.", err=True)

    def do_stats(self, _: str) -> None:
        done, model = self.printer.statistics, self._session.engines.model
        used = f"{model.max_positions - self._session.context_left} of {model.max_positions} positions used"
        parts = [label(self._setting), *rates(done, model.num_layers), used]
        click.echo(f"[{len(done)} answers, {', '.join(parts)}]", err=True)

    def do_reset(self, _: str) -> None:
        self._session.reset()
        self.turns, self._file = [], None
        click.echo("Forgotten.", err=True)

    def do_quit(self, _: str) -> None:
        raise EOFError


def _file(command: str, given: str) -> Path:
    if not given:
        raise RequestError(f"/{command} takes the name of a file, like /{command} talk.jsonl.")
    path = Path(given)
    with suppress(RuntimeError):  # of a user who has no home
        path = path.expanduser()
    return path


def converse(options: RunOptions, show_skips: bool, line: str | None) -> None:
    """Read a message, answer it, repeat, until /quit or the end of input. `line`, if given, is the first message.
    Ctrl-C stops the answer, not the program. A turn that fails (no room left in the context) is reported, and its
    message is dropped; in a script the program then ends with exit code 1.
    """
    click.echo(CHAT_HINT, err=True)
    conversation, failed = Conversation(options, show_skips), False
    conversation.printer.print_legend()
    while True:
        try:
            said, line = _read() if line is None else line, None
            try:
                conversation.take(said.strip())
            except DashError as error:
                failed = not sys.stdin.isatty()
                full = isinstance(error, ContextLengthError) and conversation.turns
                click.echo(printable(f"Error: {error}{' Or start again with /reset.' if full else ''}"), err=True)
        except EOFError:
            if failed:
                raise SystemExit(1) from None
            return
        except KeyboardInterrupt:  # no answer is being streamed: nothing to stop
            click.echo(f"\n{CHAT_HINT}", err=True)


def _read() -> str:
    """Return a line of input, on a terminal an empty one where it is not UTF-8. Raises EOFError and RequestError."""
    terminal = sys.stdin.isatty()
    try:
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # for keys, and lines over the kernel's 4,095 bytes
        return input("> " if terminal else "")
    except UnicodeDecodeError as error:
        wrong = RequestError(f"What was typed is not UTF-8 text ({error.reason} at byte {error.start}).")
        if not terminal:
            raise wrong from error
        click.echo(f"Error: {wrong}", err=True)
        return ""


@contextmanager
def _stopping(session: Session) -> Iterator[None]:
    """Let Ctrl-C end the session's stream at its next token, and a second one a prompt, which has no tokens."""

    def stop(*_: object) -> None:
        session.cancel()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
