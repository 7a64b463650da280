"""A profile as tables."""

from __future__ import annotations

import click

from dash_export.commands.common import plain_table, print_table, result_console, size
from dash_export.profiling.results import PARTS, Profile
from dash_export.profiling.statistics import Spread
from dash_export.profiling.wording import believable, conditions, course_line, lane_names, title


def print_profile(found: Profile) -> None:
    click.echo(title(found))
    for line in conditions(found):
        click.echo(line)
    click.echo(course_line(found.course) + "\n")
    _print_lanes(found)
    _print_parts(found)
    _print_segments(found)
    for name, lane in zip(lane_names(found), found.lanes, strict=True):
        click.echo(f"{name}: {believable(lane.check)}")


def _print_lanes(found: Profile) -> None:
    numbers = ("layers", "p50", "p90", "p99", "of dense", "1st token", "moved", "of stream", "peak RSS")
    table = plain_table(
        "Milliseconds per token and to the first one (median); bytes per token, and their share of memory bandwidth",
        "setting",
        *numbers,
        right=numbers,
    )
    for name, lane in zip(lane_names(found), found.lanes, strict=True):
        times, traffic = lane.token_ms, lane.traffic
        table.add_row(
            name,
            f"{lane.layers.mean:.2f}",
            f"{times.p50:.3f}",
            f"{times.p90:.3f}",
            f"{times.p99:.3f}",
            f"{lane.ratio.value:.3f}",
            f"{lane.first_ms.p50:.1f}",
            size(traffic.engines + traffic.cache),
            f"{traffic.utilisation:.0%}",
            "" if lane.peak_memory is None else size(lane.peak_memory),
        )
    print_table(result_console(), table)


_SHORT = {"always": "always run", "run": "units, run", "bypass": "bypasses", "host": "host gaps"}


def _print_parts(found: Profile) -> None:
    columns = [_SHORT.get(part, part) for part in PARTS]
    table = plain_table("Where it goes: microseconds per token (mean) and share", "setting", *columns, right=columns)
    for name, lane in zip(lane_names(found), found.lanes, strict=True):
        whole = sum(times.mean for times in lane.parts.values())
        table.add_row(name, *(f"{lane.parts[part].mean:.0f} {lane.parts[part].mean / whole:6.1%}" for part in PARTS))
    print_table(result_console(), table)


def _print_segments(found: Profile) -> None:
    """One table a lane: its segments have their own percentiles. Owed: what a bypass takes of its unit's time."""
    for name, lane in zip(lane_names(found), found.lanes, strict=True):
        columns = ("run p50", "p90", "p99", "bypass p50", "p90", "p99", "owed", "skipped")
        table = plain_table(f"{name}: microseconds per segment", "segment", *columns, right=columns)
        for row in lane.segments:
            owed = "" if row.owed is None else f"{row.owed:.0%}"
            skipped = f"{row.skipped:.0%}" if row.unit else ""
            table.add_row(row.name, *_percentiles(row.run), *_percentiles(row.bypass), owed, skipped)
        print_table(result_console(), table)


def _percentiles(times: Spread | None) -> tuple[str, str, str]:
    return ("", "", "") if times is None else (f"{times.p50:.0f}", f"{times.p90:.0f}", f"{times.p99:.0f}")
