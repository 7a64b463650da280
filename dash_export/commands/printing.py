"""Answers of `dash-export run` on a terminal: streamed, coloured by the number of layers run, with their figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console
from rich.text import Text

from dash_export.cli import printable
from dash_export.core.units import Actions, unit_skips

if TYPE_CHECKING:
    from dash_export.runtime import Response, Session
    from dash_export.runtime.results import Statistics

SLOWER = 1.5
"""A hint tells of a slow machine from this ratio on: measured decode time over that of the cost table."""
HEAT = ("blue", "cyan", "green", "yellow", "red")
"""Colours from cold to hot: the first for a token that ran only the ungated layers, the last for all layers."""


class AnswerPrinter:
    """Printer of streamed pieces on stdout, as they are: without wrapping or highlighting. With `show_skips` each token
    is coloured by the layers it ran, and underlined if it was an accepted draft; without colours (no terminal,
    NO_COLOR) a mark follows the token instead.
    """

    def __init__(self, session: Session, show_skips: bool) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._coloured = self._console.color_system is not None and not self._console.no_color
        self._show_skips = show_skips
        self._session = session
        self._num_layers = session.engines.model.num_layers
        self._units, self._cost = session.engines.units, session.engines.build.cost
        self._gated = sum(len(unit.layers) for unit in self._units)
        self._hinted = False
        self.statistics: list[Statistics] = []
        """Figures of each answer so far."""

    def print(self, stream: Iterator[Response]) -> str:
        """Print an answer on stdout and, on stderr, one line of its figures. Return the answer."""
        pieces, taken = [], []
        for response in stream:
            self._print_piece(response)
            pieces.append(response.text)
            taken.append(response.actions)
        self._console.print()
        self.statistics.append(response.statistics)
        self._print_figures(response, np.array(taken[1:]))  # the first token's actions are the prefill's
        return "".join(pieces)

    def _print_piece(self, response: Response) -> None:
        piece = printable(response.text) if self._console.is_terminal else response.text
        skipped = int(response.actions.sum())
        if self._show_skips and self._coloured:
            heat = (self._gated - skipped) * (len(HEAT) - 1) // max(1, self._gated)
            style = f"{HEAT[min(len(HEAT) - 1, heat)]}{' underline' * response.drafted}"
            self._console.print(Text(piece, style), end="")
        else:
            mark = f"‹{self._num_layers - skipped}{'+' * response.drafted}›" if self._show_skips else ""
            self._console.file.write(piece + mark)
        self._console.file.flush()

    def print_legend(self) -> None:
        """Print what the colours or marks mean; nothing without `show_skips`."""
        if self._show_skips and self._coloured:
            least, steps = self._num_layers - self._gated, len(HEAT) - 1
            parts = [f"[{name}]{least - (-place * self._gated // steps)}[/]" for place, name in enumerate(HEAT)]
            self._console.print(f"[dim]layers run, from:[/] {' '.join(parts)} [dim](underlined: accepted drafts)[/]")
        elif self._show_skips:
            layers = self._num_layers
            self._console.print(f"(‹n›: the token before ran n of {layers} layers; ‹n+›: it was an accepted draft)")

    def _print_figures(self, last: Response, actions: Actions) -> None:
        """Print a line of figures of the decoded tokens (`actions`), and once a hint, where the machine is slow."""
        statistics, slower = last.statistics, 0.0
        parts = rates([statistics], self._num_layers)
        if statistics.decode_steps and self._cost.segment_us:
            asked = self._session.rules.calibrated.asks
            time = float(self._cost.token_time(unit_skips(actions, self._units), asked).mean())
            parts.append(f"{time:.3f} of dense time by the cost table")
            slower = 1e6 * statistics.decode_seconds / (statistics.decode_steps * self._cost.dense_us * time)
        ends = {"length": f"cut at {statistics.tokens} tokens, see --max-tokens", "cancelled": "stopped by Ctrl-C"}
        click.echo(f"[{', '.join(parts)}; {ends.get(str(last.finish_reason), 'complete')}]", err=True)
        if slower > SLOWER and not self._hinted:
            self._hinted = True
            click.echo(
                f"[hint: these tokens took {slower:.1f} times as long as when the build was measured. Other programs "
                "may be using the processor. This is told once.]",
                err=True,
            )


def rates(answers: Sequence[Statistics], num_layers: int) -> list[str]:
    """Return figures of some answers together: tokens, their speed and layers where any was decoded, prefill."""
    steps, parts = sum(one.decode_steps for one in answers), [f"{sum(one.tokens for one in answers)} tokens"]
    if steps:
        layers = sum(one.layers for one in answers) / steps
        parts.append(f"{steps / sum(one.decode_seconds for one in answers):.1f} tokens/s")
        parts.append(f"{layers:.1f} of {num_layers} layers/token")
        if sum(one.drafts for one in answers):
            parts.append(f"{steps / sum(one.passes for one in answers):.2f} tokens/pass")
    milliseconds = 1000 * sum(one.prefill_seconds for one in answers)
    return [*parts, f"prefill {milliseconds:.0f} ms for {sum(one.prompt_tokens for one in answers)} tokens"]
