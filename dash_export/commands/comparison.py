"""What `eval`, `frontier` and `profile` share: which policy kinds at which settings, and which other builds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dash_export.bundle import Bundle
from dash_export.commands.common import choose_target
from dash_export.decision import POLICY_KINDS
from dash_export.evaluate import LIMIT, PREFIX, WINDOW

if TYPE_CHECKING:
    from dash_export.decision import Setting
    from dash_export.evaluate.candidates import Candidate, Refusal
    from dash_export.evaluate.intervals import Interval
    from dash_export.runtime import DashRuntime

    _Numbers = click.ParamType[tuple[float, ...]]
    _Kinds = click.ParamType[tuple[str, ...]]
else:
    _Numbers = _Kinds = click.ParamType  # not generic before click 8.2


class NumberList(_Numbers):
    """`0.9,0.85` -> (0.9, 0.85), each above `low` and at most `high`."""

    name = "numbers"

    def __init__(self, low: float, high: float = float("inf")) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        numbers = []
        for part in str(value).split(","):
            try:
                number = float(part)
            except ValueError:
                self.fail(f"{part!r:.60} is not a number; expected numbers with commas between them", param, ctx)
            if not self.low < number <= self.high or number == float("inf"):
                limit = f" and at most {self.high:g}" if self.high != float("inf") else ""
                self.fail(f"{part:.60} is out of range: give numbers above {self.low:g}{limit}", param, ctx)
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))


class KindList(_Kinds):
    """`static,token` -> ("static", "token")."""

    name = "kinds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        kinds = value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))
        for kind in kinds:
            if kind not in POLICY_KINDS:
                self.fail(f"{kind!r:.60} is not a policy kind; known: {', '.join(POLICY_KINDS)}", param, ctx)
        return kinds


@dataclass(frozen=True)
class Comparison:
    """What was asked for: `kinds` (None: all there are) at each of `values` of `dial`, and the builds `also`."""

    bundle: Path
    target: str | None
    kinds: tuple[str, ...] | None
    also: tuple[str, ...]
    dial: str
    values: tuple[float, ...]

    def load(self) -> Loaded:
        """Raises UsageError for a build that is given twice."""
        from dash_export.evaluate.candidates import settings_at

        runtime = _load(self.bundle, self.target)
        others: list[tuple[str, DashRuntime]] = []
        for given in self.also:
            folder, colon, target = given.rpartition(":")
            other = _load(Path(folder), target) if colon and not Path(given).exists() else _load(Path(given), None)
            name = f"{other.bundle.root.stem}:{other.build.target}"
            if name in dict(others):
                raise click.UsageError(f"{name} is given twice.")
            others.append((name, other))
        settings, refused = settings_at(runtime, self.kinds, self.dial, self.values)
        return Loaded(runtime, settings, others, refused)


def _load(folder: Path, target: str | None) -> DashRuntime:
    from dash_export.runtime import DashRuntime

    return DashRuntime.load(folder, choose_target(Bundle.open(folder), target))


@dataclass(frozen=True)
class Loaded:
    """`settings` of `runtime` that can be measured, dense first; `others` by their names; and what this bundle cannot
    give.
    """

    runtime: DashRuntime
    settings: list[Setting]
    others: list[tuple[str, DashRuntime]]
    refused: list[Refusal]

    def candidates(self) -> list[Candidate]:
        from dash_export.evaluate.candidates import candidates

        return candidates(self.runtime, self.settings, self.others)

    def print_refused(self) -> None:
        """Settings that are not in the table, and why, on stderr."""
        from dash_export.evaluate.candidates import label

        for item in self.refused:
            click.echo(f"Not measured: {label(item.setting)}. {item.reason}", err=True)


def comparison_options(budgets: Sequence[float]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """BUNDLE, --target, --kinds, --also and one of --budget (`budgets` by default), --skipped and --max-kl; they arrive
    as one argument `comparison`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def packed(*args: Any, **options: Any) -> Any:
            amounts = {name: options.pop(name) for name in ("budget", "skipped", "max_kl")}
            given = [(name, values) for name, values in amounts.items() if values is not None]
            if len(given) > 1:
                raise click.UsageError(
                    "Give one of --budget, --skipped and --max-kl: kinds are compared at equal settings."
                )
            own = [options.pop(name) for name in ("bundle", "target", "kinds", "also")]
            chosen = given[0] if given else ("budget", tuple(budgets))
            return command(*args, comparison=Comparison(*own, *chosen), **options)

        for option in reversed(_OPTIONS):
            packed = option(packed)
        return packed

    return decorate


_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.argument("bundle", type=click.Path(path_type=Path)),
    click.option("--target", help="Which build: cpu, or the only one there is."),
    click.option("--kinds", type=KindList(), help="Policy kinds, like dense,static,token; by default all."),
    click.option("--budget", type=NumberList(0, 1), help="Compare at these decode times, as fractions of dense."),
    click.option("--skipped", type=NumberList(0), help="Compare at these mean numbers of skipped layers."),
    click.option("--max-kl", type=NumberList(0), help="Compare at these divergences on the calibration text."),
    click.option(
        "--also", multiple=True, metavar="BUNDLE[:TARGET]",
        help="Another build, run dense beside: at another precision, pruned, smaller; may be given again.",
    ),
)  # fmt: skip


def counted(name: str, default: int, text: str, least: int = 1) -> Callable[[Any], Any]:
    """An option that is a whole number."""
    return click.option(name, type=click.IntRange(min=least), default=default, show_default=True, help=text)


def window_options(command: Any) -> Any:
    """--limit, --window and --prefix: what texts are scored on."""
    for option in (
        counted("--prefix", PREFIX, "How many of them are dense.", least=2),
        counted("--window", WINDOW, "Tokens of a window.", least=4),
        counted("--limit", LIMIT, "Windows of a text, or items of a task file."),
    ):
        command = option(command)
    return command


def with_bounds(figure: Interval, digits: int) -> str:
    """`0.123 (0.101 to 0.140)`."""
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} to {figure.high:.{digits}f})"
