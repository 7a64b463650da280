"""What is compared, and how many layers and how much time it took."""

from collections.abc import Callable
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.kinds import KINDS, Setting
from dash_export.errors import PolicyError, RequestError
from dash_export.measure.candidates import Candidate, amount, candidates, label, setting_record, settings_at


def test_settings_at(runtime: DashRuntime) -> None:
    settings, refused = settings_at(runtime, ("token", "static", "dense"), "skipped", (1.0, 2.0, 99.0))
    assert [label(setting) for setting in settings] == [
        "dense",
        "static, skipped 1",
        "static, skipped 2",
        "token, skipped 1",
        "token, skipped 2",
    ]
    assert [told["label"] for told in refused] == ["static, skipped 99", "token, skipped 99"]
    assert "Skipping 99 layers of a token is above the 3 that this policy reaches" in refused[1]["reason"]
    assert refused[1]["setting"] == {"kind": "token", "skipped": 99.0}
    with pytest.raises(PolicyError, match="none of the settings"):
        settings_at(runtime, ("token",), "skipped", (99.0,))


def test_all_kinds_are_those_of_the_bundle(runtime: DashRuntime) -> None:
    settings, _ = settings_at(runtime, None, "skipped", (1.0,))
    assert tuple(setting.kind for setting in settings) == tuple(KINDS)
    policy = replace(runtime.bundle.manifest.policy, static_order=(), has_network=False)
    bare = Mock(bundle=Mock(manifest=replace(runtime.bundle.manifest, policy=policy)))
    settings, refused = settings_at(bare, None, "skipped", (1.0,))
    assert settings == [Setting("dense")]
    assert [told["label"] for told in refused] == ["token"]
    assert "dash-export train MODEL" in refused[0]["reason"]
    assert settings_at(bare, ("dense",), "skipped", (1.0,))[1] == [], "of what nobody asked for nothing is told"


def test_what_a_skip_map_took(runtime: DashRuntime) -> None:
    """Units 2-3 and 4: a unit's cost is that of all its layers."""
    actions = np.zeros((4, 6), np.int8)
    actions[0, 2:4] = actions[1, 2:5] = 1
    first, second = runtime.cost.cost
    candidate = Candidate(runtime, Setting("dense"))
    assert candidate.taken(actions) == (4, 6 - 5 / 4, pytest.approx(1 - (2 * first + second) / 4))
    assert candidate.taken(actions[:0]) == (0, 6.0, 1.0)


def test_builds_of_other_tokens_are_not_compared(
    runtime: DashRuntime, tiny_runtime: Callable[..., DashRuntime]
) -> None:
    assert len(candidates(runtime, [Setting("dense")], [("other", tiny_runtime("portable"))])) == 2
    for other in (
        Mock(text=Mock(encode=lambda _: [1, 2]), engines=runtime.engines),
        Mock(text=runtime.text, engines=Mock(model=replace(runtime.engines.model, vocab_size=301))),
    ):
        with pytest.raises(RequestError, match="other tokens"):
            candidates(runtime, [Setting("dense")], [("other", other)])


def test_only_what_was_given_is_told() -> None:
    assert setting_record(Setting("token", budget=0.9)) == {"kind": "token", "budget": 0.9}
    assert setting_record(Setting(skip=(3, 4))) == {"kind": "static", "skip": (3, 4)}
    assert amount(Setting(skip=(3, 4, 7))) == "skip 3-4,7"
