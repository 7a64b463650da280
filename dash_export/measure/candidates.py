"""Candidates of a comparison: policy kinds, each at a setting, and other builds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash_export.core.advice import if_without_policy
from dash_export.core.kinds import KINDS, OWN, Setting, kinds_of
from dash_export.core.units import Actions, layers_text, unit_skips
from dash_export.errors import PolicyError, RequestError
from dash_export.runtime import DashRuntime, Session

SAMPLE = "Skipping 4 of 30 layers costs 3.5 %: naïve, or worth it?\n\tdef f(x): return {x: 'yes'}  # 漢字"
"""Text of many kinds, on which two tokenizers are compared."""


@dataclass(frozen=True)
class Candidate:
    """A runtime at a setting. `build`: the name of a build to compare with, empty for the build that is measured."""

    runtime: DashRuntime
    setting: Setting
    build: str = ""

    @property
    def label(self) -> str:
        return self.build or label(self.setting)

    def session(self) -> Session:
        """Return a new session. Its memory is freed with it."""
        return self.runtime.session_with(self.setting)

    def taken(self, actions: Actions) -> tuple[int, float, float]:
        """Return from a skip map [tokens, layers]: the number of tokens, the mean number of layers that they ran, and
        their mean decode time as a fraction of dense, predicted from the build's cost table.
        """
        if not len(actions):
            return 0, float(self.runtime.engines.model.num_layers), 1.0
        skips = unit_skips(actions, self.runtime.bundle.manifest.policy.units)
        times = self.runtime.cost.token_time(skips, self.setting.kind == "token")
        return len(actions), float((actions == 0).sum(axis=1).mean()), float(times.mean())


def amount(setting: Setting) -> str:
    """Return how much a setting skips, like `budget 0.9`; empty for dense."""

    def shown(value: Any) -> str:
        return layers_text(value) if isinstance(value, tuple) else f"{value:g}"

    return ", ".join(f"{name.replace('_', ' ')} {shown(getattr(setting, name))}" for name in setting.given)


def kind_shown(setting: Setting) -> str:
    """Return the policy kind; for a policy of the user's own, its file and class."""
    return Path(setting.policy or "").name if setting.kind == OWN else setting.kind


def label(setting: Setting) -> str:
    """Return a setting's name, like `token, budget 0.9`."""
    return ", ".join(filter(None, (kind_shown(setting), amount(setting))))


def setting_record(setting: Setting) -> dict[str, Any]:
    """Return a setting for JSON: its kind, and only the values that were given."""
    kind = setting.policy if setting.kind == OWN else setting.kind
    return {"kind": kind, **{name: getattr(setting, name) for name in setting.given}}


def settings_at(
    runtime: DashRuntime, kinds: Iterable[str] | None, dial: str, values: Sequence[float]
) -> tuple[list[Setting], list[dict[str, Any]]]:
    """Return (settings, refused settings as JSON with the reason). Settings are dense first, then every kind at every
    value of `dial`, then each policy of the user's own once; refused are those that this bundle cannot give. `kinds`
    None: all kinds that the bundle has an order or a network for. Raises PolicyError when only dense is left.
    """
    policy = runtime.bundle.manifest.policy
    wanted = (
        [kind for kind in kinds_of(policy) if kind != "static" or policy.static_order] if kinds is None else [*kinds]
    )
    settings, refused = [Setting("dense")], list[dict[str, Any]]()
    for kind in KINDS:
        for value in values if kind in wanted and kind != "dense" else ():
            setting = Setting(kind, **{dial: value}, hold=False)  # type: ignore[arg-type]  # as texts are scored
            try:
                runtime.rules(setting)
                settings.append(setting)
            except PolicyError as error:
                told = {"label": label(setting), "setting": setting_record(setting), "reason": str(error)}
                refused.append(told)
    settings += [Setting(kind) for kind in wanted if ":" in kind]
    if len(settings) == 1 and refused:
        raise PolicyError(f"This bundle gives none of the settings asked for. {refused[0]['reason']}")
    if kinds is None and (advice := if_without_policy(runtime.bundle.manifest.model, policy)):
        refused.append({"label": "token", "setting": {"kind": "token"}, "reason": advice})
    return settings, refused


def candidates(
    runtime: DashRuntime, settings: Iterable[Setting], others: Sequence[tuple[str, DashRuntime]] = ()
) -> list[Candidate]:
    """Return a candidate per setting of one build, dense first, then one per other build, by its name and dense. Raises
    RequestError for a build with other tokens: its predictions cannot be compared.
    """
    for _, other in others:
        same = other.text.tokenizer.get_vocab() == runtime.text.tokenizer.get_vocab()
        same &= other.engines.model.vocab_size == runtime.engines.model.vocab_size
        if not (same and other.text.encode(SAMPLE) == runtime.text.encode(SAMPLE)):
            raise RequestError(
                f"{runtime.bundle.root} and {other.bundle.root} have other tokens: only builds of one model, or of its "
                "family, are compared."
            )
    own = [Candidate(runtime, setting) for setting in settings]
    return own + [Candidate(other, Setting("dense"), name) for name, other in others]
