"""What is compared: policy kinds, each at a setting; and how many layers and how much time a setting really took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dash_export.bundle import CostTable, PolicyFacts
from dash_export.errors import PolicyError
from dash_export.runtime import DashRuntime, Session

KINDS = ("dense", "static", "cosine", "random", "sequence", "token")
"""In the order of tables: from what knows nothing of the text to what reads every token."""
DIALS = ("budget", "skipped", "max_kl", "trade_off")
NETWORK_KINDS = ("sequence", "token")
"""Kinds that ask the policy network."""


@dataclass(frozen=True)
class Setting:
    """One policy kind at one setting. `dial` names the setting (one of DIALS); dense has none. `seed` is random's."""

    kind: str
    dial: str | None = None
    value: float | None = None
    seed: int = 0

    @property
    def dense(self) -> bool:
        return self.kind == "dense"

    @property
    def asked(self) -> str:
        """`budget 0.9`; empty for dense."""
        return "" if self.dial is None else f"{self.dial.replace('_', ' ')} {self.value:g}"

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.asked}" if self.asked else self.kind

    def session(self, runtime: DashRuntime) -> Session:
        """A new session under this setting. Raises PolicyError for what this bundle's policy cannot give."""
        if self.dial is None:
            return runtime.session(self.kind)
        seed = {"seed": self.seed} if self.kind == "random" else {}
        return runtime.session(self.kind, **{self.dial: self.value}, **seed)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Refusal:
    """A setting that this bundle's policy cannot give, and why."""

    setting: Setting
    reason: str


def kinds_of(policy: PolicyFacts) -> tuple[str, ...]:
    """The kinds a bundle can serve."""
    served = {
        "dense": True,
        "static": bool(policy.static_order),
        "cosine": bool(policy.cosine_order),
        "random": bool(policy.gated),
        "sequence": policy.has_network,
        "token": policy.has_network,
    }
    return tuple(kind for kind in KINDS if served[kind])


def plan(
    runtime: DashRuntime, kinds: Iterable[str], dial: str, values: Sequence[float], seed: int = 0
) -> tuple[list[Setting], list[Refusal]]:
    """Dense first, then every kind at every value of `dial`; and those this bundle cannot give.

    Raises PolicyError for an unknown kind or when nothing but dense is left.
    """
    wanted = tuple(kinds)
    unknown = [kind for kind in wanted if kind not in KINDS]
    if unknown:
        raise PolicyError(f"There is no policy kind {unknown[0]!r}. Known: {', '.join(KINDS)}.")
    settings, refused = [Setting("dense")], []
    for kind in KINDS:
        if kind not in wanted or kind == "dense":
            continue
        for value in values:
            setting = Setting(kind, dial, value, seed)
            try:
                setting.session(runtime)
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
    tokens: int = 0
    skips: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.skips = np.zeros(self.layers, np.int64)

    def add(self, actions: npt.NDArray[np.int8]) -> None:
        """actions int8 [tokens, layers]."""
        self.tokens += len(actions)
        self.skips += (actions != 0).sum(axis=0)

    @property
    def executed(self) -> float:
        """Mean layers run per token."""
        return self.layers - float(self.skips.sum()) / max(self.tokens, 1)

    def time(self, cost: CostTable) -> float:
        """Mean decode time as a fraction of dense, predicted from the build's cost table."""
        return 1.0 - sum(self.skips[layer] * share for layer, share in cost.cost.items()) / max(self.tokens, 1)
