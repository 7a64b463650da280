"""Engines of 16 bits: every dispatch and order of streams gives the same, bit by bit, and rows together what each gets
alone. Single engines and a whole token are right in 16 bits: test_alone.py, tests/building/test_references.py.
"""

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.core.rule import DENSE, DecisionRule
from dash_export.runtime.rows import Rows
from tests.backends.cuda.conftest import DISPATCH, HALVES, IDS, ORDERS, MakeOnCard, decoded


def some(runtime: DashRuntime) -> DecisionRule:
    session, damage = runtime.session_under(DecisionRule((0.0, 0.0))), []
    session.prefill(IDS[:16])
    for token in IDS[16:40].tolist():
        session.decode_one(token)
        damage.append(session.bound(1).damage[:, 0].copy())
    return DecisionRule(tuple(np.median(damage, axis=0).tolist()))


@pytest.mark.parametrize("first", ORDERS[1:])
@pytest.mark.parametrize("target", HALVES)
def test_decode(target: str, first: str | int, on_card: MakeOnCard) -> None:
    rule = some(on_card(target, "sync").runtime)
    expected, actions = decoded(on_card(target, "sync").runtime, rule)
    assert 0.2 < actions[:, 2:5].mean() < 0.8
    for dispatch in DISPATCH[1:]:
        found, taken = decoded(on_card(target, dispatch, first).runtime, rule)
        np.testing.assert_array_equal(taken, actions)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("target", "dispatch"), zip(HALVES, ("overlapped", "device"), strict=True))
def test_rows(target: str, dispatch: str, on_card: MakeOnCard) -> None:
    """Taken from the cache of prompts to their places in a larger one, and decoded together."""
    runtime, lengths, expected = on_card(target, dispatch, 1).runtime, (9, 16, 5), []
    rows, prompt = Rows(runtime.engines, 4, 96), runtime.session()
    rows.cache.reserve(96)
    for slot, length in enumerate(lengths):
        prompt.restart(IDS[slot : slot + length])
        rows.cache.take(slot, prompt.fork().cache)
        expected.append([prompt.decode_one(int(IDS[at]), DENSE)[0] for at in (20, 30)])
    for number, at in enumerate((20, 30)):
        step = rows.steps.bound(1, batch=3)
        step.decode_batch([int(IDS[at])] * 3, [DENSE] * 3)
        found, wanted = step.logits[:, 0], np.array([each[number] for each in expected])
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
