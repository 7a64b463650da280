"""What a profile says, as plain figures."""

from __future__ import annotations

from dataclasses import dataclass

from dash_export.decision import Setting
from dash_export.profiling.bandwidth import Bandwidth
from dash_export.profiling.machine import Machine
from dash_export.profiling.statistics import Middle, Spread

PARTS = {
    "always": "layers that always run, embedding, head",
    "run": "units that ran",
    "bypass": "bypasses of skipped units",
    "deciding": "decisions on the host",
    "sampling": "sampling and text",
    "host": "other host gaps",
}
"""The parts of a token's time. The policy's damage is one more output of the first engine: its time is inside that."""


@dataclass(frozen=True)
class SegmentTimes:
    """One segment. `unit`: as it is written, or empty for what always runs; `run` and `bypass` in microseconds;
    `skipped` the share of tokens that skipped it; `owed` the bypass's median time as a share of the run's in a token
    that skips nothing: what a skip still takes.
    """

    name: str
    unit: str
    run: Spread | None
    bypass: Spread | None
    skipped: float
    owed: float | None


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
    """One setting, or another build by its name (`build`). `token_ms` are tokens without a probe; `ratio` their time
    as a fraction of the first lane's, median and quartiles of rounds; `parts` in microseconds per token of probed
    tokens, their means add up; `layers` run and `launches` per token.
    """

    build: str
    setting: Setting
    target: str
    token_ms: Spread
    first_ms: Spread
    ratio: Middle
    layers: Spread
    launches: Spread
    parts: dict[str, Spread]
    segments: list[SegmentTimes]
    traffic: Traffic
    peak_memory: int | None
    check: Check
    samples_ms: list[float]


@dataclass(frozen=True)
class Course:
    """What was decoded: `windows` of text, each a context of `context` tokens and `tokens` timed ones, `rounds` in
    all.
    """

    text: str
    context: int
    tokens: int
    windows: int
    rounds: int


@dataclass(frozen=True)
class Profile:
    """Everything. Dense is the first lane. `after_mhz`: clocks when it was over."""

    model: str
    machine: Machine
    after_mhz: tuple[float, ...]
    bandwidth: Bandwidth
    course: Course
    lanes: list[LaneProfile]
