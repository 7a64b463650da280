"""The sentences of a profile, the same in the terminal and in the report."""

from __future__ import annotations

from dash_export.decision import spans
from dash_export.evaluation.settings import label
from dash_export.profiling.results import Check, Course, LaneProfile, Profile
from dash_export.profiling.statistics import Middle

RARELY = 0.1
"""On a CPU an engine of its own and its decision cost a tenth or so of what one skip saves: 10 us and 3 of 100, of
SmolLM2-135M in int4.
"""


def lane_names(found: Profile) -> list[str]:
    """What each lane is called: its setting, with the bundle where there are several."""
    several = len({lane.bundle for lane in found.lanes}) > 1
    return [f"{lane.bundle}: {label(lane.setting)}" if several else label(lane.setting) for lane in found.lanes]


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
        f"{course.text}: {course.rounds} rounds, settings in turn (windows of text: {course.windows}, copies of the "
        f"engines: {course.copies}); each {course.context} tokens of prompt, then {course.tokens} known tokens decoded "
        "one by one, every other one with timed launches"
    )


def policy_line(lane: LaneProfile) -> str:
    """What deciding costs, and how that is known; empty where nobody is asked."""
    cost, whole = lane.policy, sum(times.mean for times in lane.parts.values())
    if cost.how == "none":
        return ""
    time = f"{_interval(cost.us, '.0f')} µs per token ({cost.us.value / whole:+.1%})"
    if cost.how == "launches":
        return f"policy: {time}, timed launches; none of it hidden, for engines run one after another on a CPU."
    return (
        f"policy: {time}. fused: not separable per launch; measured by difference from engines without it that repeat "
        "the same actions."
    )


def stretches_line(lane: LaneProfile) -> str:
    """What rows of single layers mean where several are one launch; empty where none are."""
    if lane.launches.mean >= len(lane.segments):
        return ""
    return (
        f"{lane.launches.mean:.1f} launches per token: layers that take the same action are one, and its time is "
        "divided evenly among them."
    )


def rarely_line(lane: LaneProfile) -> str:
    """Which layers a policy skips too seldom for its own good; empty where there are none."""
    # Where policies are engines, neighbours are merged otherwise, or not at all; in stretches a layer costs next to
    # nothing while it runs.
    if lane.policy.how != "difference" or stretches_line(lane):
        return ""
    gated = {row.layer: row.skipped for row in lane.segments if row.layer >= 0}
    rarely = {layer for layer, skipped in gated.items() if skipped < RARELY}
    if not rarely or len(rarely) == len(gated):
        return ""
    return (
        f"skipped for under {RARELY:.0%} of the tokens: {spans(rarely)}. That hardly pays for engines of their own: "
        f"for this setting try a bundle exported with --gated {spans(set(gated) - rarely)}."
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
