"""Options that several commands share: lists, policy settings, which build, what is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from dash_export.core.kinds import KINDS as POLICY_KINDS
from dash_export.core.kinds import Setting
from dash_export.core.units import parse_layers, parse_units
from dash_export.errors import PolicyError
from dash_export.measure import LIMIT, PREFIX, WINDOW

if TYPE_CHECKING:
    from dash_export.measure.candidates import Candidate
    from dash_export.measure.intervals import Interval
    from dash_export.runtime import DashRuntime

_Command = TypeVar("_Command", bound=Callable[..., Any])
TARGET = click.option("--target", help="The build to use, by the target that it was built for; by default cpu, or "
                      "the only build of the bundle.")  # fmt: skip
TRUSTED = click.option("--trusted-key", type=click.Path(path_type=Path), metavar="PEM", help="The public key that must "
                       "have signed the bundle; by default DASH_EXPORT_TRUSTED_KEY, if set.")  # fmt: skip


class Parsed(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """Type of an option that `parse` turns into a tuple. A PolicyError of `parse` becomes a usage error."""

    def __init__(self, name: str, parse: Callable[[str], tuple[Any, ...]]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        try:
            return value if isinstance(value, tuple) else self._parse(str(value))
        except PolicyError as error:
            self.fail(str(error), param, ctx)


LAYERS = Parsed("layers", parse_layers)
"""`2-5,9` -> (2, 3, 4, 5, 9)."""
UNITS = Parsed("units", lambda text: () if text == "none" else parse_units(text))
"""`5-7,8-10,13` -> three units; `none` -> ()."""


class PolicyKind(click.ParamType):  # type: ignore[type-arg]
    """Type of a policy kind, or of a class of the user's: `module:Class`."""

    name = "kind"

    def get_metavar(self, *_: Any, **__: Any) -> str:  # click 8.2 passes more arguments than 8.1
        return f"[{'|'.join(POLICY_KINDS)}|MODULE:CLASS]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if ":" in str(value) else click.Choice([*POLICY_KINDS]).convert(value, param, ctx)


def comma_separated(item: Any) -> Parsed:
    """Return the type of a comma-separated list of items without repeats: `0.9,0.85` -> (0.9, 0.85)."""
    return Parsed(f"{item.name}s", lambda text: tuple(dict.fromkeys(item(part) for part in text.split(","))))


BUDGETS = comma_separated(click.FloatRange(0, 1, min_open=True))
AMOUNTS = comma_separated(click.FloatRange(0, min_open=True))
KINDS = comma_separated(PolicyKind())


def is_given(ctx: click.Context, name: str) -> bool:
    """Return whether the user gave a parameter, though it be its default."""
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


def with_options(command: _Command, *options: Callable[[Any], Any]) -> _Command:
    """Add options to a command; the help lists them in this order."""
    for option in reversed(options):
        command = option(command)
    return command


def setting_options(command: _Command) -> _Command:
    """Add the options that say how a session decides. The command receives them as one argument, `setting`."""

    @wraps(command)
    def packed(*args: Any, **given: Any) -> Any:
        names = [item.name for item in fields(Setting)]
        return command(*args, setting=Setting(**{name: given.pop(name) for name in names}), **given)

    return cast(_Command, with_options(
        packed,
        click.option("--policy", type=PolicyKind(), help="Who decides; by default what the next options imply. A class "
                     "of your own: docs/own-policy.md."),
        click.option("--skip", type=LAYERS, metavar="LAYERS", help="static: skip these layers for every token, whole "
                     "units of them, like 8-10,15-18."),
        click.option("--trade-off", type=float, help="token: skip a unit where damage < trade-off * cost; 0: dense."),
        click.option("--budget", type=float, help="Mean decode time wanted, as a fraction of dense, like 0.85."),
        click.option("--skipped", type=float, help="Mean number of layers skipped per token, like 4.5."),
        click.option("--max-kl", type=float, help="token: mean KL from dense allowed, nats per token, like 0.1."),
        click.option("--at-most", type=float, help="token: the largest saving at which at most this share of answers "
                     "differs from dense, like 0.01."),
        click.option("--confidence", type=float, default=Setting.confidence, show_default=True,
                     help="Probability with which --at-most holds on data like the calibration's."),
        click.option("--max-layers", type=int, help="No token runs more layers than this; token: may stand beside "
                     "another."),
        click.option("--draft", type=click.Choice(["auto", "off", "lookup", "layer"]), default=Setting.draft,
                     show_default=True, help="dense: what guesses tokens, which are then checked several at a time: "
                     "the text's repetitions, a trained drafter, both. The text stays the same."),
        click.option("--hold/--no-hold", default=True, help="token: hold the mean time at the --budget on any text, or "
                     "not."),
    ))  # fmt: skip


def load_runtime(folder: Path, target: str | None, **options: Any) -> DashRuntime:
    """Call `DashRuntime.load`, which is imported only when it is needed."""
    from dash_export.runtime import DashRuntime

    return DashRuntime.load(folder, target, **options)


Load = Callable[[], tuple[list["Candidate"], list[dict[str, Any]]]]


def load_candidates(
    bundle: Path, target: str | None, kinds: tuple[str, ...] | None, also: tuple[str, ...], dial: str,
    values: tuple[float, ...],
) -> tuple[list[Candidate], list[dict[str, Any]]]:  # fmt: skip
    """Load the candidates, dense first: each of `kinds` (None: all that the bundle has) at each of `values` of `dial`,
    then the builds `also`. Return them and the settings that this bundle cannot give. Raises UsageError for two builds
    of one name.
    """
    from dash_export.measure.candidates import candidates, settings_at

    runtime = load_runtime(bundle, target)
    others = []
    for given in also:
        folder, colon, named = given.rpartition(":")
        by_name = colon and not Path(given).exists()
        other = load_runtime(Path(folder if by_name else given), named if by_name else None)
        others.append((f"{other.bundle.name}:{other.build.target}", other))
        if len(dict(others)) < len(others):
            raise click.UsageError(f"Two builds are called {others[-1][0]}: give one once, or rename a bundle.")
    settings, refused = settings_at(runtime, kinds, dial, values)
    return candidates(runtime, settings, others), refused


def print_refused(refused: list[dict[str, Any]]) -> None:
    """Print on stderr which settings were not measured, and why."""
    for told in refused:
        click.echo(f"Not measured: {told['label']}. {told['reason']}", err=True)


def comparison_options(budgets: Sequence[float]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add BUNDLE, --target, --kinds, --also, and --budget (by default `budgets`) or --skipped. The command receives
    them as one argument `load`, which calls `load_candidates`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def packed(*args: Any, **options: Any) -> Any:
            budget, skipped = options.pop("budget"), options.pop("skipped")
            if budget and skipped:
                raise click.UsageError("Give one of --budget and --skipped: kinds are compared at equal settings.")
            own = {name: options.pop(name) for name in ("bundle", "target", "kinds", "also")}
            dial, values = ("skipped", skipped) if skipped else ("budget", budget or tuple(budgets))
            return command(*args, load=partial(load_candidates, **own, dial=dial, values=values), **options)

        return with_options(
            packed,
            click.argument("bundle", type=click.Path(path_type=Path)),
            TARGET,
            click.option("--kinds", type=KINDS,
                         help="Policy kinds, like dense,static,token,mine.py:Mine; by default all of the bundle's."),
            click.option("--budget", type=BUDGETS,
                         help="Compare at these decode times, as fractions of dense."),
            click.option("--skipped", type=AMOUNTS,
                         help="Compare at these mean numbers of skipped layers."),
            click.option("--also", multiple=True, metavar="BUNDLE[:TARGET]",
                         help="Another build, run dense beside: another precision, pruned, smaller; repeatable."),
        )  # fmt: skip

    return decorate


def count_option(name: str, default: int, text: str, least: int = 1) -> Callable[[Any], Any]:
    """Return an option that takes a whole number of at least `least`."""
    return click.option(name, type=click.IntRange(min=least), default=default, show_default=True, help=text)


def window_options(command: Any) -> Any:
    """Add --limit, --window and --prefix, which say what part of a text is scored."""
    return with_options(
        command,
        count_option("--limit", LIMIT, "Windows of a text, items of a task, or pictures."),
        count_option("--window", WINDOW, "Tokens of a window.", least=4),
        count_option("--prefix", PREFIX, "How many of them are dense.", least=2),
    )


def with_bounds(figure: Interval, digits: int) -> str:
    """Format a figure as `0.123 (0.101 to 0.140)`, or its value alone where it has no interval."""
    bounds = f" ({figure.low:.{digits}f} to {figure.high:.{digits}f})" if figure.low < figure.high else ""
    return f"{figure.value:.{digits}f}{bounds}"
