"""What `eval`, `frontier` and `profile` share: which policy kinds at which settings, and which other builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dash_export.bundle import Bundle
from dash_export.commands.common import choose_target
from dash_export.decision import POLICY_KINDS

if TYPE_CHECKING:
    from dash_export.decision import Setting
    from dash_export.evaluation.settings import Refusal
    from dash_export.runtime import DashRuntime

    _Numbers = click.ParamType[tuple[float, ...]]
    _Kinds = click.ParamType[tuple[str, ...]]
else:
    _Numbers = _Kinds = click.ParamType  # not generic before click 8.2

_Command = TypeVar("_Command", bound=Callable[..., Any])


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


def comparison_options(command: _Command) -> _Command:
    """--target, --kinds, --budget, --skipped, --max-kl and --also."""
    options = (
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
    for option in reversed(options):
        command = option(command)
    return command


def dial_of(options: Mapping[str, Any], default: tuple[str, tuple[float, ...]]) -> tuple[str, tuple[float, ...]]:
    """The one setting that was given and its values."""
    given = [(name, options[name]) for name in ("budget", "skipped", "max_kl") if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError("Give one of --budget, --skipped and --max-kl: kinds are compared at equal settings.")
    return given[0] if given else default


def settings_for(
    runtime: DashRuntime, kinds: Iterable[str] | None, dial: tuple[str, tuple[float, ...]]
) -> tuple[list[Setting], list[Refusal]]:
    """What can be measured, dense first, and what this bundle cannot give."""
    from dash_export.evaluation.settings import kinds_of, plan

    return plan(runtime, kinds_of(runtime.bundle.manifest.policy) if kinds is None else kinds, *dial)


def load(folder: Path, target: str | None) -> DashRuntime:
    """The build."""
    from dash_export.runtime import DashRuntime

    return DashRuntime.load(folder, choose_target(Bundle.open(folder), target))


def load_also(builds: Sequence[str]) -> list[tuple[str, DashRuntime]]:
    """Each BUNDLE[:TARGET] as (name, build). Raises UsageError for one that is given twice."""
    loaded = []
    for given in builds:
        folder, colon, target = given.rpartition(":")
        runtime = load(Path(folder), target) if colon and not Path(given).exists() else load(Path(given), None)
        loaded.append((f"{runtime.bundle.root.stem}:{runtime.build.target}", runtime))
    names = [name for name, _ in loaded]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise click.UsageError(f"{twice} is given twice.")
    return loaded


def print_refused(refused: Iterable[Refusal]) -> None:
    """Settings that are not in the table, and why, on stderr."""
    from dash_export.evaluation.settings import label

    for item in refused:
        click.echo(f"Not measured: {label(item.setting)}. {item.reason}", err=True)
