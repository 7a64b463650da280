"""Policies of the user's own: what they are told, what they may answer, and that nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dash_export import DashRuntime, State
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.kinds import Setting
from dash_export.core.own_policy import load_policy
from dash_export.core.rule import DecisionRule
from dash_export.errors import PolicyError
from dash_export.models import open_checkpoint
from tests.tiny import TINY_UNITS, random_ids, save_model, tiny_policy


class Same:
    """The token policy, written down as an own one; it notes what it sees."""

    def __init__(self, rule: DecisionRule) -> None:
        self.rule, self.begun, self.seen = rule, 0, list[State]()

    def begin(self, model: Any, units: Any, cost: Any) -> None:
        assert model.num_layers == 6
        assert tuple(units) == TINY_UNITS
        assert len(cost.cost) == len(units)
        self.begun += 1

    def skips(self, state: State) -> np.ndarray:
        copies = (np.array(getattr(state, name)) for name in ("hidden", "damage", "positions", "tokens"))
        self.seen.append(State(*copies))
        return self.rule.skips(state.damage)


@pytest.fixture
def rule(runtime: DashRuntime, setting_of: Callable[[str], dict[str, Any]]) -> DecisionRule:
    found = runtime.rules(Setting(**setting_of("token"))).calibrated
    assert isinstance(found, DecisionRule)
    return found


def test_the_token_policy_as_an_own_one(runtime: DashRuntime, rule: DecisionRule) -> None:
    """Decoded, scored, forked: tokens and actions are those of the token policy."""
    own, token = runtime.session_under(Same(rule)), runtime.session_under(rule)
    ids = random_ids(30)
    one, other = own.generate(ids, 20), token.generate(ids, 20)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.actions, other.actions)
    assert 0 < one.actions.mean() < 0.6
    twin = own.fork()
    np.testing.assert_array_equal(twin.generate(ids[:3], 5).tokens, own.generate(ids[:3], 5).tokens)
    assert twin.rules.calibrated is not own.rules.calibrated
    scores = own.score(ids), token.score(ids)
    np.testing.assert_array_equal(scores[0].actions, scores[1].actions)
    assert own.rules.calibrated.policy.begun == 3  # type: ignore[attr-defined]  # the session, the score, and after it


def test_what_it_is_told(tmp_path: Path) -> None:
    """The state that enters the first unit, as transformers has it; positions and tokens; one token or many."""
    model = save_model(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    bundle = export(checkpoint, tmp_path / "a.dash", tiny_policy(checkpoint))
    build(bundle, "cpu", weights="fp32")
    ids = random_ids(12)
    policy = Same(DecisionRule((0.0, 0.0), (2, 1)))
    session = DashRuntime.load(bundle.root, "cpu-fp32").session_under(policy)
    session.score(ids)
    session.prefill(ids[:4])
    for token in ids[4:].tolist():
        session.decode_one(token)
    whole, *steps = policy.seen
    with torch.no_grad():
        expected = model(torch.tensor(ids)[None], output_hidden_states=True).hidden_states[TINY_UNITS[0].first][0]
    np.testing.assert_allclose(whole.hidden, expected.numpy(), atol=1e-4)
    np.testing.assert_array_equal(whole.positions, np.arange(12))
    np.testing.assert_array_equal(whole.tokens, ids)
    assert [int(step.positions[0]) for step in steps] == list(range(4, 12))
    for place, step in enumerate(steps, 4):
        np.testing.assert_allclose(step.hidden[0], whole.hidden[place], atol=1e-4)
        np.testing.assert_allclose(step.damage[:, 0], whole.damage[:, place], atol=1e-4)
        assert step.tokens.tolist() == [ids[place]]


OWN = """
import threading
from dataclasses import dataclass
import numpy as np

@dataclass
class ByPosition:
    every: int = 3
    def begin(self, model, units, cost):
        self.units = len(units)
    def skips(self, state):
        tokens = len(state.tokens)
        assert state.damage.shape == (self.units, tokens) and len(state.hidden) == len(state.positions) == tokens
        return np.tile(state.positions % self.every == 0, (self.units, 1))

class Wrong(ByPosition):
    def skips(self, state):
        return super().skips(state)[:1]

class Floats(ByPosition):
    def skips(self, state):
        return state.damage

class Fails(ByPosition):
    def __init__(self):
        raise ValueError("not today")

class Begins(ByPosition):
    def begin(self, model, units, cost):
        raise ValueError("not today")

class Writes(ByPosition):
    def skips(self, state):
        state.hidden[:] -= state.hidden.mean()

class Ragged(ByPosition):
    def skips(self, state):
        return [[True], [True, False]]

class Exits(ByPosition):
    def skips(self, state):
        raise SystemExit(0)

class Locks(ByPosition):
    def __init__(self):
        self.lock = threading.Lock()

class NoPolicy:
    pass

thing = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "own.py.ends.py").write_text("import sys\nsys.exit(0)\n")
    return str(tmp_path / "own.py")


def test_in_a_batch(runtime: DashRuntime, own: str) -> None:
    policy = f"{own}:ByPosition"
    prompts = [random_ids(length, seed=length) for length in (5, 9, 4, 12)]
    together = runtime.generate_batch(prompts, 12, size=3, policy=policy)
    for prompt, found in zip(prompts, together, strict=True):
        alone = runtime.generate(prompt, 12, policy=policy)
        np.testing.assert_array_equal(found.tokens, alone.tokens)
        np.testing.assert_array_equal(found.actions, alone.actions)
        places = len(prompt) + np.arange(len(alone.actions) - 1)
        np.testing.assert_array_equal(alone.actions[1:].any(axis=1), places % 3 == 0)


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        ("{own}:Wrong", r"Wrong.skips must return bool \[2, 1\], units and tokens; got bool \[1, 1\]"),
        ("{own}:Floats", r"Floats.skips must return bool .*; got float32 \[2, 1\]"),
        ("{own}:Fails", "cannot be made without arguments: ValueError: not today"),
        ("{own}:Begins", "Begins.begin: ValueError: not today"),
        ("{own}:Exits", "Exits.skips: SystemExit: 0"),
        ("{own}:Writes", "Writes.skips: ValueError: output array is read-only"),
        ("{own}:Ragged", "Ragged.skips: ValueError"),
        ("{own}:NoPolicy", r"is no policy: it needs the methods begin\(model, units, cost\) and skips\(state\)"),
        ("{own}:thing", "has no class 'thing'"),
        ("{own}.py:ByPosition", "cannot be imported: FileNotFoundError"),
        ("{own}.ends.py:ByPosition", "cannot be imported: SystemExit"),
        ("no.such.module:ByPosition", "no.such.module cannot be imported: ModuleNotFoundError"),
        (":", "':' is no policy of your own. Write --policy module:Class"),
        ("own.py:", "Write --policy module:Class"),
    ],
)
def test_what_is_none(policy: str, wrong: str, own: str, runtime: DashRuntime) -> None:
    with pytest.raises(PolicyError, match=wrong):
        runtime.session(policy.format(own=own)).generate(random_ids(4), 3)


@pytest.mark.parametrize("rule", ["token", None, object(), Same])
def test_what_is_no_rule(rule: Any, runtime: DashRuntime) -> None:
    with pytest.raises(PolicyError, match=r"is no policy: it needs|begin: TypeError"):
        runtime.session_under(rule)


def test_what_it_does_not_take(own: str, runtime: DashRuntime) -> None:
    with pytest.raises(PolicyError, match="Locks cannot be copied, as forks and batches need it"):
        runtime.session(f"{own}:Locks").fork()
    with pytest.raises(PolicyError, match="decides by itself: budget means nothing"):
        runtime.session(f"{own}:ByPosition", budget=0.9)


def test_the_current_folder_is_not_searched(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(own).parent)
    with pytest.raises(PolicyError, match="ModuleNotFoundError"):
        load_policy("own:ByPosition")
    assert load_policy("own.py:ByPosition")
