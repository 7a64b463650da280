"""`dash-export run --chat`: the conversation loop. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dash_export.commands.run_output import Shading, answer_console, figures, is_coloured, print_piece
from dash_export.errors import DashError, RequestError

if TYPE_CHECKING:
    from dash_export.commands.run_asking import Asking
    from dash_export.runtime import Session

HINT = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


def converse(asking: Asking, show_skips: bool, first: str | None) -> None:
    """Read, answer, repeat, until /quit or the end of input."""
    conversation = Conversation(asking, show_skips)
    said = first
    while True:
        try:
            line = said if said is not None else _read()
            said = None
            if line is None or line.strip() == "/quit":
                return
            conversation.hear(line.strip())
        except KeyboardInterrupt:  # nothing to stop: not answering
            click.echo(f"\n{HINT}", err=True)


def _read() -> str | None:
    """One line, or None at the end of input."""
    try:
        if sys.stdin.isatty():
            return input("> ")
        line = sys.stdin.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise RequestError(f"A line has over {LONGEST_LINE} letters: give less at a time.")
        return line.removesuffix("\n") if line else None
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise RequestError(f"What was typed is not UTF-8 text ({error.reason} at byte {error.start}).") from error


LONGEST_LINE = 1 << 20


class Conversation:
    """The messages so far, and how an answer is shown."""

    def __init__(self, asking: Asking, show_skips: bool) -> None:
        self._asking = asking
        self._messages: list[dict[str, str]] = []
        self._console = answer_console()
        self._num_layers = asking.session.engines.model.num_layers
        of_units = sum(len(unit.layers) for unit in asking.session.engines.units)
        self._shading = Shading(self._num_layers, of_units) if show_skips else None
        click.echo(HINT, err=True)
        if self._shading is not None:
            self._console.print(self._shading.legend(is_coloured(self._console)))

    def hear(self, line: str) -> None:
        """A command or a message. A turn that fails (no room left in the context) is told and taken back."""
        if line == "/reset":
            self._asking.session.reset()
            self._messages = []
            click.echo("Forgotten.", err=True)
        elif line.startswith("/"):
            click.echo(f"There is no command {line.split()[0]!r}. {HINT}", err=True)
        elif line:
            asked = (
                [*self._messages, {"role": "user", "content": line}] if self._messages else self._asking.messages(line)
            )
            try:
                answer = self._answer(asked)
            except DashError as error:
                click.echo(f"Error: {error}\nStart again with /reset.", err=True)
                return
            self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[dict[str, str]]) -> str:
        session = self._asking.session
        pieces: list[str] = []
        with _stopping(session):
            for response in session.chat(messages, self._asking.max_tokens, self._asking.sampling):
                print_piece(self._console, response, self._shading)
                pieces.append(response.text)
        self._console.print()
        click.echo(figures(response.statistics, self._num_layers, response.finish_reason), err=True)
        return "".join(pieces)


@contextmanager
def _stopping(session: Session) -> Iterator[None]:
    """Ctrl-C ends the stream at its next token."""
    before = signal.signal(signal.SIGINT, lambda *_: session.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
