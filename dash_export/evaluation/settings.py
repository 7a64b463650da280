"""What is compared: policy kinds, each at a setting; and how many layers and how much time a setting really took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.decision import POLICY_KINDS, Action, Setting, spans
from dash_export.errors import PolicyError
from dash_export.manifest import PolicyFacts
from dash_export.runtime import DashRuntime, Session
from dash_export.stretches import TokenTime


def asked(setting: Setting) -> str:
    """`budget 0.9`; empty for dense."""

    def shown(amount: Any) -> str:
        return spans(amount) if isinstance(amount, tuple) else f"{amount:g}"

    return ", ".join(f"{name.replace('_', ' ')} {shown(getattr(setting, name))}" for name in setting.given)


def label(setting: Setting) -> str:
    """`token, budget 0.9`."""
    return f"{setting.kind}, {asked(setting)}" if setting.given else setting.kind


def record(item: Any) -> dict[str, Any]:
    """A dataclass with a `setting` somewhere in it -> what its JSON says; of a setting only what was given."""

    def tidy(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [tidy(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        if {"policy", "trade_off", "seed"} <= set(value):
            setting = Setting(**value)
            seed = {"seed": setting.seed} if setting.kind == "random" else {}
            return {"kind": setting.kind, **{name: value[name] for name in setting.given}, **seed}
        return {name: tidy(entry) for name, entry in value.items()}

    return {name: tidy(value) for name, value in asdict(item).items()}


@dataclass(frozen=True)
class Refusal:
    """A setting that this bundle's policy cannot give, and why."""

    setting: Setting
    reason: str


def kinds_of(policy: PolicyFacts) -> tuple[str, ...]:
    """The kinds a bundle can serve at an amount: static needs an order for that."""
    return tuple(kind for kind in policy.kinds if kind != "static" or policy.static_order)


def plan(
    runtime: DashRuntime, kinds: Iterable[str], dial: str, values: Sequence[float], seed: int = 0
) -> tuple[list[Setting], list[Refusal]]:
    """Dense first, then every kind at every value of `dial`; and those this bundle cannot give.

    Raises PolicyError for an unknown kind or when nothing but dense is left.
    """
    wanted = tuple(kinds)
    unknown = [kind for kind in wanted if kind not in POLICY_KINDS]
    if unknown:
        raise PolicyError(f"There is no policy kind {unknown[0]!r}. Known: {', '.join(POLICY_KINDS)}.")
    settings, refused = [Setting("dense")], []
    for kind in POLICY_KINDS:
        if kind not in wanted or kind == "dense":
            continue
        for value in values:
            setting = Setting(kind, **{dial: value}, seed=seed)  # type: ignore[arg-type]
            try:
                runtime.session_with(setting)
            except PolicyError as error:
                refused.append(Refusal(setting, str(error)))
            else:
                settings.append(setting)
    if len(settings) == 1 and refused:
        raise PolicyError(f"This bundle gives none of the settings asked for. {refused[0].reason}")
    return settings, refused


@dataclass
class Tally:
    """The actions of many tokens at positions where skipping was allowed."""

    layers: int
    token_time: TokenTime
    tokens: int = 0
    skips: int = 0
    times: float = 0.0

    def add(self, actions: npt.NDArray[np.int8]) -> None:
        """actions int8 [tokens, layers]."""
        self.tokens += len(actions)
        self.skips += int((actions == Action.SKIP).sum())
        self.times += self.token_time.total(actions)

    @property
    def executed(self) -> float:
        """Mean layers run per token."""
        return self.layers - self.skips / max(self.tokens, 1)

    @property
    def time(self) -> float:
        """Mean decode time as a fraction of dense, predicted from the build's cost table."""
        return self.times / self.tokens if self.tokens else 1.0


class Entrant:
    """One setting in a measurement: its session, and the actions it took."""

    def __init__(self, runtime: DashRuntime, setting: Setting) -> None:
        self.setting = setting
        self.tally = Tally(runtime.engines.model.num_layers, TokenTime(runtime.build))
        self._runtime = runtime
        self._session = runtime.session_with(setting)

    def session(self, unit: int) -> Session:
        """An empty session for this window, prompt or item. `random` draws anew for each: its draws follow from seed
        and position, and the same masks in every window would not average out.
        """
        if self.setting.kind == "random":
            seed = (self.setting.seed + unit) % (1 << 63)
            self._session = self._runtime.session_with(replace(self.setting, seed=seed))
        self._session.reset()
        return self._session

    def figures(self) -> tuple[Setting, int, float, float]:
        """What a `Result` begins with, but for its units: setting, tokens, layers, predicted time."""
        return self.setting, self.tally.tokens, self.tally.executed, self.tally.time
