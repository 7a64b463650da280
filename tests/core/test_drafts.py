"""How far drafts go: by their chances and by what rows cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dash_export.core.drafts import HOPELESS, MOST, PROBE, Drafts
from dash_export.core.passes import PassCosts

CHEAP = PassCosts((1, 2, 8, 16), (256,), ((1.0, 1.05, 1.35, 2.0),), 0.05)
DEAR = PassCosts((1, 2, 8, 16), (256,), ((1.0, 1.5, 4.5, 9.0),), 0.05)
SURE, UNSURE = np.array([9.0, 0.0, 0.0, 0.0], np.float32), np.array([0.0, 9.0, 9.0, 9.0], np.float32)


class Asked:
    """A drafter with a fixed chance, that counts up from the token before."""

    def __init__(self, chance: float) -> None:
        self.chance, self.tokens = chance, list[int]()

    def __call__(self, token: int) -> tuple[int, float]:
        self.tokens.append(token)
        return token + 1, self.chance


def begun(costs: PassCosts, **given: bool) -> Drafts:
    drafts = Drafts(costs, trained=True, **given)
    drafts.read([100, 200, 300, 400])
    return drafts


@pytest.mark.parametrize(("costs", "chance", "wanted"), [
    (CHEAP, 0.95, 7), (CHEAP, 0.5, 3), (CHEAP, 0.05, 1), (DEAR, 0.95, 1), (DEAR, 0.4, 1),
])  # fmt: skip
def test_drafts_go_on_while_one_more_pays(costs: PassCosts, chance: float, wanted: int) -> None:
    ask = Asked(chance)
    found = begun(costs).guesses(ask, 256, 20)
    assert found == [*range(401, 401 + len(found))], "each from the one before"
    assert abs(len(found) - wanted) <= (wanted not in (1, MOST))
    assert ask.tokens[:1] == [400]


def test_room_is_kept() -> None:
    for most in (1, 2, 5):
        assert len(begun(CHEAP).guesses(Asked(0.99), 256, most)) == most


def test_a_drafter_that_is_wrong_is_asked_less_and_less() -> None:
    """Then now and then: where it is right again, it is asked again."""
    drafts, asked = begun(CHEAP, looks=False), 0

    def passes(count: int, right: Callable[[int], int]) -> int:
        runs = 0
        for _ in range(count):
            ask = Asked(0.6)
            found = drafts.guesses(ask, 256, 20)
            drafts.judge(right(len(found)), len(found))
            runs += len(ask.tokens)
        return runs

    passes(60, lambda _: 0)
    asked = passes(4 * PROBE, lambda _: 0)
    assert 3 <= asked <= 8
    assert passes(200, lambda drafted: drafted) > 300


def test_a_match_is_trusted_before_the_drafter_is_asked() -> None:
    drafts = Drafts(CHEAP, trained=True)
    drafts.read([*range(30), 5, 6, 7, 8, 9])
    for token in range(10, 16):
        drafts.add(token, np.ones(400, np.float32))
    ask = Asked(0.9)
    found = drafts.guesses(ask, 256, 20)
    assert found[:8] == [*range(16, 24)]
    assert len(found) > MOST, "a match that holds goes further"
    assert not ask.tokens


def test_the_drafter_leads_away_from_a_weak_match() -> None:
    drafts = Drafts(CHEAP, trained=True)
    drafts.read([1, 50, 2, 60, 3, 1])
    assert drafts.guesses(Asked(0.9), 256, 20)[:2] == [2, 3], "not 50"
    lone = Drafts(CHEAP)
    lone.read([1, 50, 2, 60, 3, 1])
    assert lone.guesses(None, 256, 20)[0] == 50


def test_a_text_that_the_model_would_not_write() -> None:
    """One row, until the text is the model's own again. All follows from text and logits."""
    drafts = begun(CHEAP)
    assert drafts.several(256)
    for _ in range(40):
        drafts.add(0, UNSURE)
    assert drafts._surprise > HOPELESS
    drafts.add(3, SURE)
    assert not drafts.several(256)
    for token in range(30, 130):
        drafts.add(0 if token % 2 else token, np.where(np.arange(200) == (0 if token % 2 else token), 30.0, 0.0))
    assert drafts.several(256)


def test_without_a_drafter_a_match_must_be_worth_a_row() -> None:
    for costs, wanted in ((CHEAP, True), (DEAR, False)):
        drafts = Drafts(costs)
        assert not drafts.several(256)
        drafts.read([7, 8, 9, 4, 7, 8])
        assert drafts.several(256) is wanted
        drafts.add(5, SURE)
        assert not drafts.several(256)


def test_costs_between_those_that_were_measured() -> None:
    costs = PassCosts((1, 2, 8, 16), (256, 4096), ((1.0, 1.1, 1.7, 3.3), (1.0, 1.3, 2.9, 5.3)))
    assert costs.of_rows(0)[1:4] == pytest.approx([1.0, 1.1, 1.2])
    assert costs.of_rows(256)[12] == pytest.approx(2.5)
    assert costs.of_rows(2176)[2] == pytest.approx(1.2)
    assert costs.of_rows(1 << 20)[16] == pytest.approx(5.3)
