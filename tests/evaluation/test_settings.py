"""What is compared, and how many layers and how much time it took."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import POLICY_KINDS, Setting
from dash_export.errors import PolicyError
from dash_export.evaluation.settings import Entrant, Tally, asked, kinds_of, label, plan, record
from dash_export.stretches import TokenTime
from tests.tiny import random_ids


def test_plan(runtime: DashRuntime) -> None:
    settings, refused = plan(runtime, ("token", "static", "dense"), "skipped", (1.0, 2.0, 99.0))
    assert [label(setting) for setting in settings] == [
        "dense",
        "static, skipped 1",
        "static, skipped 2",
        "token, skipped 1",
        "token, skipped 2",
    ]
    assert [label(item.setting) for item in refused] == ["static, skipped 99", "token, skipped 99"]
    assert all("99" in item.reason for item in refused)
    with pytest.raises(PolicyError, match="none of the settings"):
        plan(runtime, ("token",), "skipped", (99.0,))
    with pytest.raises(PolicyError, match="no policy kind 'magic'"):
        plan(runtime, ("magic",), "skipped", (1.0,))


def test_kinds_of(runtime: DashRuntime) -> None:
    policy = runtime.bundle.manifest.policy
    assert kinds_of(policy) == POLICY_KINDS
    bare = replace(policy, static_order=(), cosine_order=(), has_network=False)
    assert kinds_of(bare) == ("dense", "random")


def test_tally_is_the_mean_of_what_was_taken(runtime: DashRuntime) -> None:
    cost = replace(runtime.cost, cost={2: 0.1, 3: 0.5, 4: 0.2})
    tally = Tally(6, TokenTime(replace(runtime.build, cost=cost)))
    actions = np.zeros((4, 6), np.int8)
    actions[0, 2] = actions[1, 2] = actions[1, 4] = 1
    tally.add(actions[:1])
    tally.add(actions[1:])
    assert tally.tokens == 4
    assert tally.executed == 6 - 3 / 4
    assert tally.time == pytest.approx(1 - (2 * 0.1 + 0.2) / 4)


def test_a_seed_may_be_the_last_there_is(runtime: DashRuntime) -> None:
    entrant = Entrant(runtime, Setting("random", skipped=1.5, seed=(1 << 63) - 1))
    assert entrant.session(1).score(random_ids(20)).actions.shape == (20, 6)


def test_random_draws_anew_for_every_unit(runtime: DashRuntime) -> None:
    entrant = Entrant(runtime, Setting("random", skipped=1.5, seed=3))
    ids = random_ids(80)
    first, second, again = (entrant.session(unit).score(ids).actions for unit in (0, 1, 0))
    assert (first != second).any()
    np.testing.assert_array_equal(first, again)


@dataclass(frozen=True)
class Holder:
    setting: Setting
    more: tuple[Setting, ...]


def test_record_says_only_what_was_given() -> None:
    assert record(Holder(Setting("token", budget=0.9), (Setting("random", skipped=2.0, seed=4),))) == {
        "setting": {"kind": "token", "budget": 0.9},
        "more": [{"kind": "random", "skipped": 2.0, "seed": 4}],
    }
    assert asked(Setting(skip=(3, 4, 7))) == "skip 3-4,7"
