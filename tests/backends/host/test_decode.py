"""Engines are what the oracle says, for units of every shape and place, and what is launched for them. Families:
tests/graphs/test_families.py; forced actions and decisions of one bundle: tests/reference/test_oracle.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.decode import BoundSegment, BoundStep
from dash_export.building import build
from dash_export.building.exporting import export
from dash_export.core.rule import DENSE, ForcedRule, decision_rule, static_rule
from dash_export.core.units import DENSE_POSITIONS, Unit
from dash_export.errors import PolicyError
from dash_export.reference import Oracle
from tests.tiny import TINY_UNITS, random_actions, random_ids, tiny_checkpoint, tiny_policy

TOLERANCE = 2e-4
UNITS = {
    "none": (),
    "all but the first layer": (Unit(1, 5),),
    "read before any layer, with one between": (Unit(1, 2), Unit(4, 5)),
    "the last layer": (Unit(5, 5),),
}


def test_a_trade_off_of_zero_is_dense_bit_for_bit(runtime: DashRuntime) -> None:
    dense, token = runtime.session(), runtime.session("token", trade_off=0.0)
    for id_ in random_ids(20).tolist():
        np.testing.assert_array_equal(dense.decode_one(id_)[0], token.decode_one(id_)[0])


@pytest.mark.parametrize("name", UNITS)
def test_units_wherever_they_lie(name: str, tmp_path: Path) -> None:
    """Dense and decided, in one pass, token by token, beside other rows and in portable graphs."""
    units, ids = UNITS[name], random_ids(40)
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy = tiny_policy(checkpoint, "linear" if units else "none", units=units)
    oracle, bundle = Oracle(checkpoint, policy), export(checkpoint, tmp_path / "a.dash", policy)
    damage = oracle.forward(ids).damage
    rule = decision_rule(units, [0.1] * len(units), 10 * float(np.median(damage))) if units else DENSE
    expected = oracle.forward(ids, rule, prefix=8)
    mean = expected.actions[8:].mean(axis=0)
    assert all(0.1 < mean[unit.first] < 0.9 for unit in units)
    for target, weights in (("cpu-fp32", "fp32"), ("portable", None)):
        build(bundle, target.partition("-")[0], weights=weights)
        runtime = DashRuntime.load(bundle.root, target)
        found = runtime.session_under(rule).score(ids, prefix=8, keep_logits=True)
        live = runtime.session_under(rule)
        steps = [(live.prefill(ids[:8]), None), *(live.decode_one(token) for token in ids[8:].tolist())]
        np.testing.assert_array_equal(found.actions, expected.actions)
        np.testing.assert_allclose(found.logits, expected.logits, atol=TOLERANCE)
        np.testing.assert_array_equal([actions for _, actions in steps[1:]], expected.actions[8:])
        np.testing.assert_allclose([logits for logits, _ in steps], expected.logits[7:], atol=TOLERANCE)
        if units:
            np.testing.assert_allclose(found.damage, expected.damage, atol=TOLERANCE)


def test_the_first_positions_are_dense_and_units_come_whole(runtime: DashRuntime) -> None:
    session = runtime.session("static", skip=(2, 3, 4))
    actions = np.array([session.decode_one(token)[1] for token in (1, 2, 3)])
    assert not actions[:DENSE_POSITIONS].any()
    assert actions[2].tolist() == [0, 0, 1, 1, 1, 0]
    half = np.zeros((4, 6), np.int8)
    half[3, 3] = 1
    with pytest.raises(PolicyError, match="units are skipped whole"):
        runtime.session().score(random_ids(4), actions=half)


def step_of(runtime: DashRuntime, sequence: int, batch: int = 1) -> tuple[BoundStep, list[str]]:
    """A step over some cached tokens, and a list in which it notes what it launches."""
    cache = runtime.engines.cache(64, batch)  # type: ignore[call-arg]
    cache.reserve(32)
    step = BoundStep(runtime.engines, cache, sequence, sequence > 1, batch)  # type: ignore[arg-type]
    launched: list[str] = []

    def noting(part: BoundSegment, index: int) -> BoundSegment:
        def note(how: str) -> Callable[[], None]:
            return lambda: launched.append(f"{how} {index}")

        bypass, mixed = (note(how) if part.bypass else None for how in ("bypass", "mixed"))
        return replace(part, run=note("run"), bypass=bypass, mixed=mixed)

    step.segments = [noting(part, index) for index, part in enumerate(step.segments)]
    return step, launched


@pytest.mark.parametrize("how", ["one row", "teacher-forced", "batch"])
def test_rows_that_agree_are_launched_as_one(how: str, runtime: DashRuntime) -> None:
    step, launched = step_of(runtime, *{"one row": (1, 1), "teacher-forced": (3, 1), "batch": (1, 3)}[how])
    skipped = np.array([[True, True, True], [True, False, True]])
    if how == "one row":
        step.decode(1, static_rule([0]))
        assert launched == ["run 0", "run 1", "bypass 2", "run 3", "run 4"]
        return
    if how == "batch":
        step.decode_batch([1, 2, 3], [ForcedRule(skipped[:, row : row + 1]) for row in range(3)])
        step.decode_batch([1, 2, 3], [DENSE] * 3)
    else:
        step.teacher_force(np.array([1, 2, 3]), ForcedRule(skipped), np.zeros(3, np.bool_))
        step.teacher_force(np.array([1, 2, 3]), ForcedRule(skipped), np.ones(3, np.bool_))
    dense = [f"run {place}" for place in range(5)]
    assert launched == ["run 0", "run 1", "bypass 2", "mixed 3", "run 4", *dense]
    assert step._row_skips.ravel().tolist() == skipped[1].tolist()


def test_rows_take_their_own_caches(runtime: DashRuntime) -> None:
    """K and V of a row that is skipped beside one that runs are its bypass's, of the unit's every layer."""
    ids, actions = random_ids(24), random_actions(24, 6, TINY_UNITS, 2)
    whole, one = runtime.session(), runtime.session()
    whole.score(ids, actions=actions)
    for place, token in enumerate(ids.tolist()):
        skipped = np.array([[actions[place, unit.first] == 1] for unit in TINY_UNITS])
        one.decode_one(token, ForcedRule(skipped))
    for found, expected in ((whole.cache.keys, one.cache.keys), (whole.cache.values, one.cache.values)):
        np.testing.assert_allclose(found[..., :24, :], expected[..., :24, :], atol=2e-5)
        assert np.abs(found[:, 0, :, :24]).max(axis=(1, 3)).min() > 0, "every row of every layer is written"
