"""A setting -> the rules of a session, one function per policy kind."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import numpy as np

from dash_export.build_record import Build
from dash_export.decision import DecisionRule, Setting, decision_rule, spans, trade_off_for
from dash_export.errors import PolicyError
from dash_export.manifest import ModelFacts, PolicyFacts
from dash_export.runtime.rules import FixedRule, HeldRules, RandomRules, SequenceRules, SessionRules
from dash_export.stretches import TokenTime, breaking

DRAWS, HALVINGS = 200, 12
"""Where a random policy's probability follows from a budget."""


def session_rules(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> SessionRules:
    """What a new session decides by. Raises PolicyError for a setting unsound or more than the policy can give."""
    setting.check()
    kind = setting.kind
    if kind == "dense":
        return SessionRules()
    if kind == "random":
        return RandomRules(model.num_layers, policy.gated, _probability(setting, policy, build), setting.seed)
    if kind in ("static", "cosine"):
        return SessionRules(FixedRule(_fixed_set(setting, model, policy, build)))
    rule = _decision(setting, model, policy, build)
    if kind == "sequence":
        return SequenceRules(rule)
    if setting.hold:
        assert setting.budget is not None
        return HeldRules(rule, TokenTime(build), setting.budget)
    return SessionRules(rule)


def _decision(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> DecisionRule:
    trade_off = setting.trade_off
    if trade_off is None and setting.given != ("max_layers",):
        dial = build.dial.get(setting.kind, ())
        trade_off = trade_off_for(dial, budget=setting.budget, skipped=setting.skipped, max_kl=setting.max_kl)
    return decision_rule(
        model.num_layers, policy.gated, build.cost.cost, trade_off or 0.0, setting.max_layers, breaking(build)
    )


def _fixed_set(setting: Setting, model: ModelFacts, policy: PolicyFacts, build: Build) -> tuple[int, ...]:
    """The layers a static policy skips: those listed, or as many of its order as are needed."""
    if setting.skip is not None:
        wrong = sorted(set(setting.skip) - set(policy.gated))
        if wrong:
            raise PolicyError(f"Layers {wrong} have no skip graph in this bundle. Gated layers: {spans(policy.gated)}.")
        return setting.skip
    order = policy.static_order if setting.kind == "static" else policy.cosine_order
    if not order:
        raise PolicyError(
            f"The policy in this bundle has no order in which {setting.kind!r} skips layers: it was not trained. "
            "List the layers to skip (static), or export with a trained policy."
        )
    return order[: _count(setting, model, order, build)]


def _count(setting: Setting, model: ModelFacts, order: Sequence[int], build: Build) -> int:
    if setting.budget is not None:
        token_time = TokenTime(build)
        times = [token_time.of(order[:count]) for count in range(len(order) + 1)]
        enough = [count for count, time in enumerate(times) if time <= setting.budget + 1e-9]
        if not enough:
            raise PolicyError(
                f"A budget of {setting.budget:g} is more than the policy {setting.kind!r} can give: with all of its "
                f"{len(order)} layers skipped a token takes {min(times):.3f} of the dense time."
            )
        return enough[0]
    if setting.skipped is not None:
        count, asked = setting.skipped, f"{setting.skipped:g} skipped layers"
        if count != int(count):
            raise PolicyError(f"The policy {setting.kind!r} skips whole layers: give {int(count)} or {int(count) + 1}.")
    else:
        assert setting.max_layers is not None
        count, asked = model.num_layers - setting.max_layers, f"max_layers = {setting.max_layers}"
    if not 0 <= count <= len(order):
        raise PolicyError(
            f"The policy {setting.kind!r} cannot give {asked}: it skips from 0 to {len(order)} "
            f"of the model's {model.num_layers} layers."
        )
    return int(count)


def _probability(setting: Setting, policy: PolicyFacts, build: Build) -> float:
    """How likely each gated layer is skipped, so that the mean is the one asked for."""
    count = len(policy.gated)
    if setting.skipped is not None:
        if setting.skipped > count:
            raise PolicyError(f"That is more than skipping every gated layer gives: {count} layers. Ask for less.")
        return setting.skipped / count if count else 0.0
    assert setting.budget is not None
    token_time = TokenTime(build)
    least = token_time.of(policy.gated)
    if setting.budget < least:
        raise PolicyError(f"That is more than skipping every gated layer gives: a budget of {least:.3f}. Ask for less.")
    saved = sum(build.cost.cost.values())
    # How many launches a token takes depends on which layers are skipped: the mean over some draws.
    draws = np.random.Generator(np.random.Philox(key=0)).random((DRAWS, count))
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        sets = (np.array(policy.gated)[row < middle].tolist() for row in draws)
        time = 1 - middle * saved + mean(map(token_time.launching, sets))
        low, high = (middle, high) if time > setting.budget else (low, middle)
    return high
