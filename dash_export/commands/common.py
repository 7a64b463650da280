"""Shared by several commands: options, lists of layers and units, sizes, which target, which model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import wraps
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from dash_export.artifacts import open_regular, write_atomic
from dash_export.bundle import MANIFEST, Bundle
from dash_export.decision import POLICY_KINDS, Setting, Unit, parse_layers, parse_units
from dash_export.errors import BundleError, PolicyError, RequestError
from dash_export.manifest import Build
from dash_export.names import DEFAULT_TARGET, REPORT
from dash_export.outputs import MARK

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_BEGINNING = 8192


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """A list that `parse` reads of the option's text."""

    parse: Callable[[str], tuple[Any, ...]]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return self.parse(str(value))
        except PolicyError as error:
            self.fail(str(error), param, ctx)


class LayerList(_Parsed):
    """`2-5,9` -> (2, 3, 4, 5, 9)."""

    name = "layers"
    parse = staticmethod(parse_layers)


class UnitList(_Parsed):
    """`5-7,8-10,13` -> three units; `none` -> ()."""

    name = "units"
    parse = staticmethod(lambda text: () if text == "none" else parse_units(text))


_Command = TypeVar("_Command", bound=Callable[..., Any])


def setting_options(command: _Command) -> _Command:
    """Add the options that say how a session decides; they arrive as one argument `setting`."""

    @wraps(command)
    def packed(*args: Any, **given: Any) -> Any:
        names = [item.name for item in fields(Setting)]
        return command(*args, setting=Setting(**{name: given.pop(name) for name in names}), **given)

    kinds, skip = click.Choice(POLICY_KINDS), {"type": LayerList(), "metavar": "LAYERS"}
    options: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("--policy", {"type": kinds}, "Who decides; by default what the next options imply."),
        ("--skip", skip, "static: skip these layers for every token, whole units of them, like 8-10,15-18."),
        ("--trade-off", {"type": float}, "token: skip a unit where damage < trade-off * cost (0 is dense)."),
        ("--budget", {"type": float}, "Mean decode time wanted, as a fraction of dense, like 0.85."),
        ("--skipped", {"type": float}, "Mean number of layers skipped per token, like 4.5."),
        ("--max-kl", {"type": float}, "token: mean KL from dense allowed, nats per token, like 0.1."),
        ("--max-layers", {"type": int}, "No token runs more layers than this; token: may stand beside another."),
        ("--hold", {"is_flag": True}, "token: hold the running mean time at the --budget on any text."),
    )
    for name, how, words in reversed(options):
        packed = click.option(name, **how, help=words)(packed)
    return cast(_Command, packed)


def units_table(build: Build, units: Sequence[Unit]) -> Table:
    """The time of each unit and what skipping it saves, by the build's cost table."""
    numbers = ("layers", "run µs", "bypass µs", "of run", "saved")
    table = plain_table(f"Units: skipping one saves so much of a token at {build.cost.context} cached tokens", "unit",
                        *numbers, right=numbers)  # fmt: skip
    runs = [build.cost.segment_us.get(segment.name) for segment in build.segments if segment.gated]
    for unit, run, cost in zip(units, runs, build.cost.cost, strict=True):
        bypass = build.cost.bypass_us.get(unit.bypass)
        times = ("", "", "")
        if run and bypass is not None:
            times = (f"{run:.0f}", f"{bypass:.0f}", f"{bypass / run:.0%}")
        table.add_row(str(unit), str(len(unit.layers)), *times, f"{100 * cost:.2f} %")
    return table


def size(count: float) -> str:
    """Bytes for people, in powers of ten like disks and `ls -h --si`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def check_reports(*outputs: Path) -> None:
    """Before anything is measured: raises RequestError for a file that is not ours to write over, or lies in a bundle
    or a work folder.
    """
    for path in outputs:
        beginning = b""
        try:
            if os.path.lexists(path):
                with open_regular(path) as file:
                    beginning = file.read(_BEGINNING) or REPORT.encode()  # nothing is lost with an empty file
            ours = not os.path.lexists(path) or (REPORT.encode() in beginning and not path.is_symlink())
        except OSError:
            ours = False
        if not ours:
            raise RequestError(f"{path} exists and is no report of ours: it will not be overwritten. Choose another.")
        for folder in path.absolute().resolve().parents:
            inside = (folder / MANIFEST).is_file() and any((folder / name).is_dir() for name in ("onnx", "engines"))
            if inside or (folder / MARK).is_file():
                raise RequestError(f"{path} would lie inside the bundle {folder}: choose a place outside it.")


def save_report(path: Path, content: str | bytes) -> Path:
    """Write what took minutes to measure, and return where: under a free name beside `path` where something has come
    there meanwhile that is no report of ours.
    """
    free = path
    try:
        check_reports(path)
    except RequestError:
        names = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
        free = next(name for name in names if not os.path.lexists(name))
        check_reports(free)
        click.echo(f"{path} is no report of ours any more: it is kept, and {free} is written.", err=True)
    write_atomic(free, content)
    return free


def is_bundle(path: str) -> bool:
    """Whether a BUNDLE|MODEL argument means a bundle: it has a manifest, or is called one."""
    return (Path(path) / MANIFEST).is_file() or Path(path).suffix == ".dash"


def choose_target(bundle: Bundle, target: str | None) -> str:
    """The target asked for, else `cpu`, else the only one built. Raises BundleError that lists what is built."""
    if target is not None:
        return target
    built = bundle.targets()
    if DEFAULT_TARGET in built or len(built) == 0:
        return DEFAULT_TARGET
    if len(built) == 1:
        return built[0]
    raise BundleError(
        f"{bundle.root} has several builds and none is {DEFAULT_TARGET!r}: give --target, one of {', '.join(built)}."
    )


def bundle_bytes(bundle: Bundle) -> int:
    """The portable part: graphs, weights, tokenizer."""
    return sum(record.bytes for record in bundle.manifest.files)


def build_bytes(build: Build) -> int:
    """The bytes of one target's engines on disk (none of their own for `portable`)."""
    return sum(record.bytes for record in build.files)


def result_console(width: int = 120) -> Console:
    """stdout, without colours guessed into numbers and paths; `width` columns or more where it is no terminal."""
    from rich.console import Console

    # What is printed has names from a model in it: none of it is markup.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, width)
    return console


def plain_table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """The one look of our tables; columns in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    numbers = set(right)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def print_table(console: Console, table: Table) -> None:
    """The title on a line of its own: rich would fold it to the table's width."""
    from rich.text import Text

    console.print(Text(str(table.title), "bold"), soft_wrap=True)
    table.title = None
    console.print(table)
