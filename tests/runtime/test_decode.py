"""Units of every shape and place are what the oracle says, in every engine form; and what is launched for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.building import build
from dash_export.decision import Unit, decision_rule
from dash_export.exporting import export
from dash_export.reference import Oracle
from dash_export.runtime.decode import BoundSegment, BoundStep
from dash_export.runtime.rules import DENSE, FixedRule, ForcedRule
from tests.tiny import random_actions, random_ids, tiny_checkpoint, tiny_policy

LoadRuntime = Callable[..., DashRuntime]
UNITS = {
    "none": (),
    "all but the first layer": (Unit(1, 5),),
    "read before any layer, with one between": (Unit(1, 2), Unit(4, 5)),
    "the last layer": (Unit(5, 5),),
}


@pytest.mark.parametrize("name", UNITS)
def test_units_wherever_they_lie(name: str, tmp_path: Path) -> None:
    """Dense and decided, in one pass, token by token, beside other rows and in portable graphs."""
    units, ids = UNITS[name], random_ids(40)
    checkpoint = tiny_checkpoint(tmp_path / "model")
    policy = tiny_policy(checkpoint, "linear" if units else "none", units=units)
    oracle, bundle = Oracle(checkpoint, policy), export(checkpoint, tmp_path / "a.dash", policy)
    for target in ("cpu", "portable"):
        build(bundle, target, weights="fp32" if target == "cpu" else None)
    damage = oracle.forward(ids).damage
    rule = decision_rule(units, [0.1] * len(units), 10 * float(np.median(damage))) if units else DENSE
    expected = oracle.forward(ids, rule, prefix=8)
    mean = expected.actions[8:].mean(axis=0)
    assert all(0.1 < mean[unit.first] < 0.9 for unit in units)
    for target in ("cpu-fp32", "portable"):
        runtime = DashRuntime.load(bundle.root, target)
        found = runtime.session_under(rule).score(ids, prefix=8, keep_logits=True)
        live = runtime.session_under(rule)
        steps = [(live.prefill(ids[:8]), None), *(live.decode_one(token) for token in ids[8:].tolist())]
        np.testing.assert_array_equal(found.actions, expected.actions)
        np.testing.assert_allclose(found.logits, expected.logits, atol=2e-4)
        np.testing.assert_array_equal([actions for _, actions in steps[1:]], expected.actions[8:])
        np.testing.assert_allclose([logits for logits, _ in steps], expected.logits[7:], atol=2e-4)
        if units:
            np.testing.assert_allclose(found.damage, expected.damage, atol=2e-4)


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


def test_one_row_runs_or_is_bypassed(tiny_runtime: LoadRuntime) -> None:
    step, launched = step_of(tiny_runtime(), 1)
    for skipped, expected in (
        ([], ["run 0", "run 1", "run 2", "run 3"]),
        ([0], ["run 0", "bypass 1", "run 2", "run 3"]),
        ([0, 1], ["run 0", "bypass 1", "bypass 2", "run 3"]),
    ):
        launched.clear()
        step.decode(1, FixedRule(skipped))
        assert launched == expected


@pytest.mark.parametrize("how", ["teacher-forced", "batch"])
def test_rows_that_agree_are_launched_as_one(how: str, tiny_runtime: LoadRuntime) -> None:
    step, launched = step_of(tiny_runtime(), *((3, 1) if how == "teacher-forced" else (1, 3)))
    skipped = np.array([[True, True, True], [True, False, True]])
    if how == "batch":
        step.decode_batch([1, 2, 3], [ForcedRule(skipped[:, row : row + 1]) for row in range(3)])
    else:
        step.teacher_force(np.array([1, 2, 3]), ForcedRule(skipped), np.zeros(3, np.bool_))
    assert launched == ["run 0", "bypass 1", "mixed 2", "run 3"]
    assert step._row_skips.ravel().tolist() == skipped[1].tolist()
    launched.clear()
    if how == "batch":
        step.decode_batch([1, 2, 3], [DENSE] * 3)
    else:
        step.teacher_force(np.array([1, 2, 3]), ForcedRule(skipped), np.ones(3, np.bool_))
    assert launched == ["run 0", "run 1", "run 2", "run 3"]


def test_rows_take_their_own_caches(tiny_runtime: LoadRuntime) -> None:
    """K and V of a row that is skipped beside one that runs are its bypass's, of the unit's every layer."""
    runtime, ids = tiny_runtime(), random_ids(24)
    actions = random_actions(24, 6, runtime.engines.units, 2)
    whole, one = runtime.session(), runtime.session()
    whole.score(ids, actions=actions)
    for token, row in zip(ids.tolist(), actions, strict=True):
        one.decode_one(token, ForcedRule(np.array([[bool(row[unit.first])] for unit in runtime.engines.units])))
    for found, expected in zip(
        (whole.cache.keys, whole.cache.values),
        (one.cache.keys, one.cache.values),
        strict=True,
    ):
        np.testing.assert_allclose(found[..., :24, :], expected[..., :24, :], atol=2e-5)
        assert np.abs(found[:, 0, :, :24]).max(axis=(1, 3)).min() > 0, "every row of every layer is written"
