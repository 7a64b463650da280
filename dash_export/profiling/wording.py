"""The sentences of a profile, the same in the terminal and in the report."""

from __future__ import annotations

from dash_export.evaluation.settings import label
from dash_export.profiling.results import Check, Course, Profile
from dash_export.profiling.statistics import Middle


def lane_names(found: Profile) -> list[str]:
    """What each lane is called."""
    return [label(lane.setting, lane.build) for lane in found.lanes]


def title(found: Profile) -> str:
    targets = ", ".join(dict.fromkeys(lane.target for lane in found.lanes))
    return f"{found.model}, {targets}, {found.machine.cpu}, {found.machine.cores} cores"


def conditions(found: Profile) -> list[str]:
    """The machine's state, and a warning where it disturbs."""
    machine, memory = found.machine, found.bandwidth
    told = [f"power governor: {machine.governor or 'not told'}"]
    if machine.clock_mhz:
        pairs = zip(machine.clock_mhz, found.after_mhz or machine.clock_mhz, strict=False)
        told.append("clock before and after: " + ", ".join(f"{a:.0f}/{b:.0f} MHz" for a, b in pairs))
    if machine.load is not None:
        told.append(f"load before: {machine.load:g}")
    lines = [
        "; ".join(told),
        f"memory, best of passes over {memory.bytes / 1e6:.0f} MB on {memory.cores} cores: "
        f"read {memory.read / 1e9:.1f} GB/s (median {memory.read_median / 1e9:.1f}), "
        f"copy {memory.copy / 1e9:.1f} GB/s (median {memory.copy_median / 1e9:.1f})",
    ]
    if machine.busy:
        lines.append("WARNING: other work ran just before. Its share of the processor is in every figure below.")
    return lines


def course_line(course: Course) -> str:
    return (
        f"{course.text}: {course.rounds} rounds, settings in turn (windows of text: {course.windows}); each "
        f"{course.context} tokens of prompt, then {course.tokens} known tokens decoded one by one, every other one "
        "with timed launches"
    )


def believable(check: Check) -> str:
    """How far the profile may be trusted."""
    said = f"the parts sum to {check.parts:.2%} of the wall time of their tokens"
    if check.bare is not None and check.overhead is not None:
        said += (
            f", {_interval(check.bare, '.1%')} of that of the same tokens without timed launches: profiling adds "
            f"{_interval(check.overhead, '+.2%')}"
        )
    return f"{said}; by the cost of its stamps alone {check.stamps:.2%}."


def _interval(found: Middle, form: str) -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"
