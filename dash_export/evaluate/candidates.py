"""Candidates of a comparison: policy kinds, each at a setting, and other builds; and how many layers each took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dash_export.decision import POLICY_KINDS, Actions, Setting, spans, unit_skips
from dash_export.errors import PolicyError, RequestError
from dash_export.runtime import DashRuntime, Session


def amount(setting: Setting) -> str:
    """`budget 0.9`; empty for dense."""

    def shown(value: Any) -> str:
        return spans(value) if isinstance(value, tuple) else f"{value:g}"

    return ", ".join(f"{name.replace('_', ' ')} {shown(getattr(setting, name))}" for name in setting.given)


def label(setting: Setting, build: str = "") -> str:
    """`token, budget 0.9`; of another build its name."""
    return build or (f"{setting.kind}, {amount(setting)}" if setting.given else setting.kind)


def record(item: Any) -> dict[str, Any]:
    """A dataclass with a `setting` somewhere in it -> what its JSON says; of a setting only what was given."""

    def tidy(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [tidy(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if {"policy", "trade_off", "hold"} <= set(value):
            setting = Setting(**value)
            return {"kind": setting.kind, **{name: value[name] for name in setting.given}}
        return {name: tidy(entry) for name, entry in value.items()}

    return {name: tidy(value) for name, value in asdict(item).items()}


@dataclass(frozen=True)
class Refusal:
    """A setting that this bundle's policy cannot give, and why."""

    setting: Setting
    reason: str


def settings_at(
    runtime: DashRuntime, kinds: Iterable[str] | None, dial: str, values: Sequence[float]
) -> tuple[list[Setting], list[Refusal]]:
    """Dense first, then every kind at every value of `dial`; and those this bundle cannot give. `kinds` None: all it
    has an order or a network for.

    Raises PolicyError for an unknown kind or when nothing but dense is left.
    """
    policy = runtime.bundle.manifest.policy
    wanted = [kind for kind in policy.kinds if kind != "static" or policy.static_order] if kinds is None else [*kinds]
    unknown = [kind for kind in wanted if kind not in POLICY_KINDS]
    if unknown:
        raise PolicyError(f"There is no policy kind {unknown[0]!r}. Known: {', '.join(POLICY_KINDS)}.")
    settings, refused = [Setting("dense")], []
    for kind in POLICY_KINDS:
        for value in values if kind in wanted and kind != "dense" else ():
            setting = Setting(kind, **{dial: value})  # type: ignore[arg-type]
            try:
                runtime.session_with(setting)
            except PolicyError as error:
                refused.append(Refusal(setting, str(error)))
            else:
                settings.append(setting)
    if len(settings) == 1 and refused:
        raise PolicyError(f"This bundle gives none of the settings asked for. {refused[0].reason}")
    return settings, refused


class Candidate:
    """One setting in a measurement, and the actions it took at positions where skipping was allowed. `build`: the name
    of another build than the one that is measured; empty for that.
    """

    def __init__(self, runtime: DashRuntime, setting: Setting, build: str = "") -> None:
        self.runtime, self.setting, self.build = runtime, setting, build
        self.tokens = 0
        self._skipped = 0
        self._times = 0.0

    def session(self) -> Session:
        """A new one: its memory goes with it."""
        return self.runtime.session_with(self.setting)

    def took(self, actions: Actions) -> None:
        """Count the actions [tokens, layers] of some tokens, or of none."""
        if len(actions) == 0:
            return
        self.tokens += len(actions)
        self._skipped += int(actions.sum())
        skips = unit_skips(actions, self.runtime.bundle.manifest.policy.units)
        self._times += float(self.runtime.cost.token_time(skips).sum())

    @property
    def layers(self) -> float:
        """Mean layers run per token."""
        return self.runtime.engines.model.num_layers - self._skipped / max(self.tokens, 1)

    @property
    def time(self) -> float:
        """Mean decode time as a fraction of dense, predicted from the build's cost table."""
        return self._times / self.tokens if self.tokens else 1.0

    def taken(self) -> tuple[str, Setting, int, float, float]:
        """What a `Result` begins with: build, setting, tokens, layers, predicted time."""
        return self.build, self.setting, self.tokens, self.layers, self.time


def candidates(
    runtime: DashRuntime, settings: Iterable[Setting], others: Sequence[tuple[str, DashRuntime]] = ()
) -> list[Candidate]:
    """The settings of one build, dense first, then other builds by their names, dense each. Raises RequestError for a
    build that has other tokens.
    """
    check_same_tokens(runtime, [other for _, other in others])
    own = [Candidate(runtime, setting) for setting in settings]
    return own + [Candidate(other, Setting("dense"), name) for name, other in others]


@dataclass(frozen=True)
class Result:
    """A measurement of one candidate over one file. `build`: the name of another build than the measured one; `layers`:
    mean layers run; `time`: decode time as a fraction of that build's dense, predicted from its cost table. Both over
    the `tokens` at which skipping was allowed. `items` are windows, prompts or questions.
    """

    build: str
    setting: Setting
    tokens: int
    layers: float
    time: float
    items: int


def check_same_tokens(first: DashRuntime, others: Iterable[DashRuntime]) -> None:
    """Raises RequestError where two builds have other tokens: what they predict does not compare."""
    for other in others:
        same = other.engines.model.vocab_size == first.engines.model.vocab_size
        if not (same and other.text.encode(SAMPLE) == first.text.encode(SAMPLE)):
            raise RequestError(
                f"{first.bundle.root} and {other.bundle.root} have other tokens: only builds of one model, or of its "
                "family, are compared."
            )


SAMPLE = "Skipping 4 of 30 layers costs 3.5 %: naïve, or worth it?\n\tdef f(x): return {x: 'yes'}  # 漢字"
"""Text of many kinds."""
