"""A setting -> the rules of a session, one function per policy kind."""

from __future__ import annotations

from dash_export.decision import DecisionRule, Setting, check_max_layers, decision_rule, trade_off_for, units_of
from dash_export.errors import PolicyError
from dash_export.manifest import Build, ModelFacts, PolicyFacts
from dash_export.runtime.rules import FixedRule, HeldRules, SessionRules


def session_rules(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> SessionRules:
    """What a new session decides by. Raises PolicyError for a setting unsound or more than the policy can give."""
    setting.check()
    if setting.kind == "dense":
        return SessionRules()
    if setting.kind == "static":
        return SessionRules(FixedRule(_fixed_set(setting, model, policy, build)))
    rule = _decision(setting, model, policy, build)
    if setting.hold:
        assert setting.budget is not None
        return HeldRules(rule, build.cost, setting.budget)
    return SessionRules(rule)


def _decision(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> DecisionRule:
    trade_off = setting.trade_off
    if trade_off is None and setting.given != ("max_layers",):
        trade_off = trade_off_for(build.dial, budget=setting.budget, skipped=setting.skipped, max_kl=setting.max_kl)
    return decision_rule(policy.units, build.cost.cost, trade_off or 0.0, setting.max_layers, model.num_layers)


def _fixed_set(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> tuple[int, ...]:
    """Places of the units a static policy skips: those of the layers listed, or the first of its order, as many as it
    takes to be as fast, or to skip as much, as is wanted.
    """
    if setting.skip is not None:
        return units_of(setting.skip, policy.units)
    order = policy.static_order
    if not order:
        raise PolicyError(
            "The policy in this bundle has no order in which 'static' skips units: it was not trained. List the layers "
            "to skip, or export with a trained policy."
        )
    if setting.max_layers is not None:
        check_max_layers(setting.max_layers, policy.units, model.num_layers)
    skipped, time = 0, 1.0
    for count in range(len(order) + 1):
        if count:
            skipped += len(policy.units[order[count - 1]].layers)
            time -= build.cost.cost[order[count - 1]]
        if (
            (setting.budget is not None and time <= setting.budget + 1e-9)
            or (setting.skipped is not None and skipped >= setting.skipped)
            or (setting.max_layers is not None and model.num_layers - skipped <= setting.max_layers)
        ):
            return order[:count]
    raise PolicyError(
        f"That is more than the policy 'static' can give: with all of its units skipped a token runs "
        f"{model.num_layers - skipped} of {model.num_layers} layers and takes {time:.3f} of the dense time."
    )
