"""Tables on stdout, all of one look (rich), and sizes for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dash_export.bundle.records import Build
from dash_export.core.dial import Measure
from dash_export.core.units import Unit
from dash_export.files.artifacts import FileRecord

if TYPE_CHECKING:
    from dash_export.measure.image_quality import ImageQuality


def print_table(
    title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Iterable[Any]], width: int = 120
) -> None:
    """Print a table: the columns `left`, aligned to the left, then the columns `right` (numbers), aligned to the right.
    `width`: characters of a line, at least, where stdout is no terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Titles and cells may have names from a model in them: none of it is markup.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = max(console.width, width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any((*left, *right)))
    for columns, justify in ((left, "left"), (right, "right")):
        for column in columns:
            table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else str(cell) for cell in row))
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print(table)


def print_units(build: Build, units: Sequence[Unit], measure: Measure) -> None:
    """Print the time of each unit and what skipping it saves, by the build's cost table."""
    cost = build.cost

    def row(unit: Unit, run: float | None, saved: float) -> tuple[object, ...]:
        bypass = cost.bypass_us.get(unit.bypass)
        times = (f"{run:.0f}", f"{bypass:.0f}", f"{bypass / run:.0%}") if run and bypass is not None else ("", "", "")
        return (unit, len(unit.layers), *times, f"{100 * saved:.2f} %")

    runs = [cost.segment_us.get(segment.name) for segment in build.segments if segment.gated]
    print_table(
        f"Units: skipping one saves so much of a {measure.at(cost.context)}",
        ("unit",), ("layers", "run µs", "bypass µs", "of run", "saved"), map(row, units, runs, cost.cost),
    )  # fmt: skip


def print_images(title: str, rows: Sequence[ImageQuality], figures: Sequence[str]) -> None:
    """Print those of the `figures` that were measured, a row for each setting; of accuracy the interval, too."""
    from dash_export.measure.candidates import label

    def figure(row: ImageQuality, name: str) -> str:
        bounds = row.intervals.get(name) if name == "accuracy" else None
        return f"{getattr(row, name):.4f}" + (f" ({bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else "")

    kept = [name for name in figures if getattr(rows[0], name) is not None]
    print_table(
        title, ("setting",), tuple(name.replace("_", " ") for name in kept),
        ((label(row.setting), *(figure(row, name) for name in kept)) for row in rows),
    )  # fmt: skip


def size(count: float) -> str:
    """Format bytes for people, in powers of ten like disks and `ls -h --si`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def files_size(records: Iterable[FileRecord]) -> str:
    """Return the size of files for people: those of a manifest are the portable part (graphs, weights, tokenizer),
    those of a build a target's engines on disk (`portable` has none of its own).
    """
    return size(sum(record.bytes for record in records))
