"""How an answer looks: streamed text, tokens coloured by the layers they ran, the line of figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from dash_export.cli import printable

if TYPE_CHECKING:
    from rich.console import Console

    from dash_export.runtime import DashRuntime, Response, Statistics

HEAT = ("blue", "cyan", "green", "yellow", "red")
"""Cold to hot: from the layers that always run to all of them."""


def print_stream(stream: Iterator[Response], runtime: DashRuntime, show_skips: bool) -> Response:
    """Print an answer as it comes, then the figures on stderr; returns the last response."""
    console = answer_console()
    shading = (
        Shading(runtime.engines.model.num_layers, len(runtime.bundle.manifest.policy.layers)) if show_skips else None
    )
    last = None
    for last in stream:
        print_piece(console, last, shading)
    assert last is not None
    console.print()
    if shading is not None:
        console.print(shading.legend(is_coloured(console)))
    click.echo(figures(last.statistics, runtime.engines.model.num_layers, last.finish_reason), err=True)
    return last


class Shading:
    """Layers run by a token -> a colour, or a mark where there are no colours."""

    def __init__(self, num_layers: int, of_units: int) -> None:
        self.num_layers = num_layers
        self.least = num_layers - of_units

    def colour(self, layers: int) -> str:
        span = max(1, self.num_layers - self.least)
        return HEAT[min(len(HEAT) - 1, (layers - self.least) * (len(HEAT) - 1) // span)]

    def legend(self, coloured: bool) -> str:
        if not coloured:
            return f"(‹n›: the token before ran n of {self.num_layers} layers)"
        parts = [f"[{name}]{low}[/]" for name, low in zip(HEAT, self._bounds(), strict=True)]
        return "[dim]layers run, from:[/] " + " ".join(parts)

    def _bounds(self) -> list[int]:
        span = self.num_layers - self.least
        return [self.least + -(-index * span // (len(HEAT) - 1)) for index in range(len(HEAT))]


def figures(statistics: Statistics, num_layers: int, finish_reason: str | None) -> str:
    """One line: speed, layers, prefill, why it ended."""
    parts = [f"{statistics.tokens} tokens"]
    if statistics.decode_steps:
        parts.append(f"{statistics.tokens_per_second:.1f} tokens/s")
        parts.append(f"{statistics.layers_per_token:.1f} of {num_layers} layers/token")
    parts.append(f"prefill {1000 * statistics.prefill_seconds:.0f} ms for {statistics.prompt_tokens} tokens")
    return f"[{', '.join(parts)}; ended by {finish_reason}]"


def answer_console() -> Console:
    """stdout as it is: no wrapping, no colours guessed into text."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def is_coloured(console: Console) -> bool:
    """A terminal, and NO_COLOR is not set."""
    return console.is_terminal and not console.no_color


def print_piece(console: Console, response: Response, shading: Shading | None) -> None:
    """One streamed piece of an answer, at once."""
    from rich.text import Text

    piece = printable(response.text) if console.is_terminal else response.text
    if shading is None:
        console.file.write(piece)
    else:
        layers = shading.num_layers - int(response.actions.sum())
        if is_coloured(console):
            console.print(Text(piece, shading.colour(layers)), end="")
        else:
            console.file.write(f"{piece}‹{layers}›")
    console.file.flush()
