"""`dash-export run --chat`: the conversation loop. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dash_export.commands.run_output import Shading, _console, _print_piece, figures
from dash_export.errors import DashError

if TYPE_CHECKING:
    from dash_export.commands.run import Asking
    from dash_export.runtime import Session

HINT = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."


def converse(asking: Asking, show_skips: bool, first: str | None) -> None:
    """Read, answer, repeat. A turn that fails (no room left in the context) is told and taken back."""
    click.echo(HINT, err=True)
    messages: list[dict[str, str]] = []
    said = first
    while True:
        said = said if said is not None else _read()
        if said is None or said.strip() == "/quit":
            return
        line, said = said.strip(), None
        if line == "/reset":
            asking.session.reset()
            messages = []
            click.echo("Forgotten.", err=True)
        elif line.startswith("/"):
            click.echo(f"There is no command {line.split()[0]!r}. {HINT}", err=True)
        elif line:
            turn = [*messages, {"role": "user", "content": line}] if messages else asking.messages(line)
            try:
                answer = _answer(asking, turn, show_skips)
            except DashError as error:
                click.echo(f"Error: {error}\nStart again with /reset.", err=True)
                continue
            messages = [*turn, {"role": "assistant", "content": answer}]


def _read() -> str | None:
    """One line, or None at the end of input."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            click.echo(f"\n{HINT}", err=True)


def _answer(asking: Asking, messages: list[dict[str, str]], show_skips: bool) -> str:
    session = asking.session
    model = session.engines.model
    prompt = len(session.text.chat(messages))
    console, shading = _console(), None
    if show_skips:
        shading = Shading(model.num_layers, sum(segment.gated for segment in session.engines.build.segments))
    pieces: list[str] = []
    with _stopping(session):
        for response in session.chat(messages, asking.room(prompt), asking.sampling):
            _print_piece(console, response, shading)
            pieces.append(response.text)
    console.print()
    click.echo(figures(response.statistics, model.num_layers, response.finish_reason), err=True)
    return "".join(pieces)


@contextmanager
def _stopping(session: Session) -> Iterator[None]:
    """Ctrl-C ends the stream at its next token."""
    before = signal.signal(signal.SIGINT, lambda *_: session.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
