"""What a profile says, as plain figures."""

from __future__ import annotations

from dataclasses import dataclass

from dash_export.decision import Setting
from dash_export.profiling.bandwidth import Bandwidth
from dash_export.profiling.machine import Machine
from dash_export.profiling.statistics import Middle, Spread

PARTS = {
    "always": "layers that always run, embedding, head",
    "run": "gated layers that ran",
    "skip": "skip engines: compensation, K and V",
    "policy": "policy engines",
    "sampling": "sampling and text",
    "host": "host gaps, decisions included",
}
"""The parts of a token's time. Where the policy is fused into engines, its time is inside theirs."""


@dataclass(frozen=True)
class SegmentTimes:
    """One segment. Times of its engines in microseconds; `layer` is the gated layer or -1; `skipped` the share of
    tokens that skipped it.
    """

    name: str
    layer: int
    run: Spread | None
    skip: Spread | None
    policy: Spread | None
    skipped: float


@dataclass(frozen=True)
class PolicyCost:
    """What deciding takes per token, in microseconds. `how`: `none` (nobody is asked), `launches` (engines of their
    own, timed) or `difference` (fused: not separable per launch; against engines without a policy that repeat the same
    actions; the bounds are over the copies of the engines too).
    """

    how: str
    us: Middle


@dataclass(frozen=True)
class Traffic:
    """Mean bytes per token, and what share of the machine's stream bandwidth that is at the measured speed."""

    engines: float
    cache: float
    per_second: float
    utilisation: float


@dataclass(frozen=True)
class Check:
    """Whether the profile may be believed. `parts`: the parts' sum over the wall time of the same (probed) tokens, and
    `bare`: over that of the same tokens without a probe. `overhead`: what the probe adds to a token, from pairs;
    `stamps`: the same from the cost of a stamp alone, without the noise of a pair.
    """

    parts: float
    bare: Middle | None
    overhead: Middle | None
    stamps: float


@dataclass(frozen=True)
class LaneProfile:
    """One bundle at one setting. `token_ms` are tokens without a probe; `ratio` their time as a fraction of dense,
    median and quartiles of rounds; `parts` in microseconds per token of probed tokens, their means add up; `decision`
    is the part of the host gaps in which the rule was asked, of the traced tokens; `layers` run and `launches`
    of them per token.
    """

    bundle: str
    setting: Setting
    target: str
    dispatch: str
    token_ms: Spread
    first_ms: Spread
    ratio: Middle
    layers: Spread
    launches: Spread
    parts: dict[str, Spread]
    decision: Spread | None
    segments: list[SegmentTimes]
    policy: PolicyCost
    traffic: Traffic
    peak_memory: int | None
    check: Check
    samples_ms: list[float]


@dataclass(frozen=True)
class Course:
    """What was decoded: `windows` of text, each a context of `context` tokens and `tokens` timed ones, `rounds` in all,
    over `copies` of the engines.
    """

    text: str
    context: int
    tokens: int
    windows: int
    rounds: int
    copies: int


@dataclass(frozen=True)
class Profile:
    """Everything. Dense is the first lane of each bundle. `after_mhz`: clocks when it was over."""

    model: str
    machine: Machine
    after_mhz: tuple[float, ...]
    bandwidth: Bandwidth
    course: Course
    lanes: list[LaneProfile]
