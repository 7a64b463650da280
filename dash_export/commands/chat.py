"""Answers of `dash-export run` on a terminal: streamed, coloured by the number of layers run; conversations."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console
from rich.text import Text

from dash_export.cli import printable
from dash_export.decision import Actions, unit_skips
from dash_export.errors import DashError, RequestError

if TYPE_CHECKING:
    from dash_export.commands.run import RunOptions
    from dash_export.runtime import Response, Session

HINT = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer."
SLOWER = 1.5
"""An answer's figures mention its slowdown from this ratio on: measured decode time over that of the cost table."""
HEAT = ("blue", "cyan", "green", "yellow", "red")
"""Colours from cold to hot: the first for a token that ran only the ungated layers, the last for all layers."""


class AnswerPrinter:
    """Printer of streamed pieces on stdout, as they are: without wrapping or highlighting. With `show_skips` each token
    is coloured by the layers it ran; without colours (no terminal, NO_COLOR) a mark follows the token instead.
    """

    def __init__(self, session: Session, show_skips: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._coloured = self._console.color_system is not None and not self._console.no_color
        self._show_skips = show_skips
        self._num_layers = session.engines.model.num_layers
        self._units, self._cost = session.engines.units, session.engines.build.cost
        self._asked = session.rules.calibrated.asks
        self._gated = sum(len(unit.layers) for unit in self._units)

    def print(self, stream: Iterator[Response]) -> str:
        """Print an answer on stdout and, on stderr, one line of its figures. Return the answer."""
        pieces, taken = [], []
        for response in stream:
            self._print_piece(response)
            pieces.append(response.text)
            taken.append(response.actions)
        self._console.print()
        click.echo(self._figures(response, np.array(taken[1:])), err=True)  # the first token's are the prefill's
        return "".join(pieces)

    def _print_piece(self, response: Response) -> None:
        piece = printable(response.text) if self._console.is_terminal else response.text
        skipped = int(response.actions.sum())
        if self._show_skips and self._coloured:
            heat = (self._gated - skipped) * (len(HEAT) - 1) // max(1, self._gated)
            self._console.print(Text(piece, HEAT[min(len(HEAT) - 1, heat)]), end="")
        else:
            mark = f"‹{self._num_layers - skipped}›" if self._show_skips else ""
            self._console.file.write(piece + mark)
        self._console.file.flush()

    def print_legend(self) -> None:
        """Print what the colours or marks mean; nothing without `show_skips`."""
        if self._show_skips and self._coloured:
            least, steps = self._num_layers - self._gated, len(HEAT) - 1
            parts = [f"[{name}]{least - (-place * self._gated // steps)}[/]" for place, name in enumerate(HEAT)]
            self._console.print("[dim]layers run, from:[/] " + " ".join(parts))
        elif self._show_skips:
            self._console.print(f"(‹n›: the token before ran n of {self._num_layers} layers)")

    def _figures(self, last: Response, actions: Actions) -> str:
        """Return one line: speed, layers and time of the decoded tokens (`actions`), prefill time, finish reason."""
        statistics = last.statistics
        parts = [f"{statistics.tokens} tokens"]
        if statistics.decode_steps:
            parts.append(f"{statistics.tokens_per_second:.1f} tokens/s")
            parts.append(f"{statistics.layers_per_token:.1f} of {self._num_layers} layers/token")
            if self._cost.segment_us:
                time = float(self._cost.token_time(unit_skips(actions, self._units), self._asked).mean())
                parts.append(f"{time:.3f} of dense time by the cost table")
                slower = 1e6 * statistics.decode_seconds / (statistics.decode_steps * self._cost.dense_us * time)
                if slower > SLOWER:
                    parts.append(f"{slower:.1f} times as long as when the build measured it")
        parts.append(f"prefill {1000 * statistics.prefill_seconds:.0f} ms for {statistics.prompt_tokens} tokens")
        return f"[{', '.join(parts)}; ended by {last.finish_reason}]"


def converse(options: RunOptions, show_skips: bool, line: str | None) -> None:
    """Read a message, answer it, repeat, until /quit or the end of input. `line`, if given, is the first message.
    Ctrl-C stops the answer, not the program. A turn that fails (no room left in the context) is reported, and its
    message is dropped; in a script the program then ends with exit code 1.
    """
    click.echo(HINT, err=True)
    printer, messages, failed = AnswerPrinter(options.session, show_skips), list[dict[str, str]](), False
    printer.print_legend()
    while True:
        try:
            said = _read() if line is None else line
            line = None
            if said is None or said.strip() == "/quit":
                if failed:
                    raise SystemExit(1)
                return
            try:
                messages = _turn(options, printer, messages, said.strip())
            except DashError as error:
                failed = not sys.stdin.isatty()
                again = "\nStart again with /reset." if messages else ""
                click.echo(printable(f"Error: {error}{again}"), err=True)
        except KeyboardInterrupt:  # no answer is being streamed: nothing to stop
            click.echo(f"\n{HINT}", err=True)


def _turn(
    options: RunOptions, printer: AnswerPrinter, messages: list[dict[str, str]], said: str
) -> list[dict[str, str]]:
    """Obey a command or answer a message, and return the messages so far."""
    session = options.session
    if said == "/reset":
        session.reset()
        click.echo("Forgotten.", err=True)
        return []
    if re.fullmatch(r"/\w+", said):
        click.echo(f"There is no command {said!r}. {HINT}", err=True)
    elif said:
        asked = [*messages, {"role": "user", "content": said}] if messages else options.messages(said)
        with _stopping(session):
            answer = printer.print(session.chat(asked, options.max_tokens, options.sampling))
        return [*asked, {"role": "assistant", "content": answer}]
    return messages


def _read() -> str | None:
    """Return a line of input, None at the end. Raises RequestError where it is not UTF-8 text; on a terminal that is
    told, and the line is empty.
    """
    terminal = sys.stdin.isatty()
    try:
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # for keys, and lines over the kernel's 4,095 bytes
        return input("> " if terminal else "")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        wrong = RequestError(f"What was typed is not UTF-8 text ({error.reason} at byte {error.start}).")
        if not terminal:
            raise wrong from error
        click.echo(f"Error: {wrong}", err=True)
        return ""


@contextmanager
def _stopping(session: Session) -> Iterator[None]:
    """Let Ctrl-C end the session's stream at its next token, and restore the signal handler in the end. A second one
    stops a prompt, too, which has no tokens.
    """

    def stop(*_: object) -> None:
        session.cancel()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
