"""Engines of 16 bits: what a device gives is, bit by bit, what its engines give one after another on plain arrays."""

from typing import Any

import numpy as np
import pytest

from dash_export.backends.cuda.engines import DeviceEngines
from dash_export.bundle.layout import new_names, past_names, present_names
from dash_export.core.rule import DENSE, DecisionRule, Rule
from dash_export.runtime.rows import Rows
from tests.backends.cuda.conftest import DISPATCH, HALVES, IDS, ORDERS, MakeOnCard, decoded


class Walk:
    """One sequence through the engines, in numpy; the cache is arrays of the engines' own type."""

    def __init__(self, engines: Any, capacity: int = 96) -> None:
        assert isinstance(engines, DeviceEngines)
        self.engines, self.length = engines, 0
        self.cache: dict[str, np.ndarray] = {}
        for part in engines.segments:
            for layer in part.segment.layers:
                for past in past_names(layer):
                    shape = (1, engines.model.num_kv_heads, capacity, engines.model.head_dim)
                    self.cache[past] = np.zeros(shape, self.engine(part.run).types[past])

    def engine(self, loaded: Any) -> Any:
        return loaded._engine

    def step(self, ids: np.ndarray, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the last token, and the units that all tokens skip."""
        positions = np.arange(self.length, self.length + len(ids))[None]
        known = {"input_ids": ids[None], "position_ids": positions, "write_indices": positions[:, 0]}
        skipped = np.zeros(len(self.engines.units), np.bool_)
        for place, part in enumerate(self.engines.segments):
            if place == self.engines.first - 1 and rule.asks:
                (damage,) = self.engine(self.engines.policy).run({"hidden": known["hidden"]})
                skipped = rule.skips(damage[0].T)[:, 0]
            engine = self.engine(part.bypass if part.unit is not None and skipped[part.unit] else part.run)
            found = engine.run({name: (known | self.cache)[name] for name in engine.inputs})
            given = dict(zip(engine.outputs, found, strict=True))
            for layer in part.segment.layers:
                for names in zip(past_names(layer), present_names(layer), new_names(layer), strict=True):
                    past, present, new = names
                    if new in given:
                        self.cache[past][:, :, self.length : self.length + len(ids)] = given[new]
                    else:
                        self.cache[past] = given[present]
            known["hidden"] = given.get("hidden_out")
        self.length += len(ids)
        return given["logits"][0, 0], skipped


def walked(engines: Any, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """What `decoded` asks for."""
    walk, units = Walk(engines), engines.units
    walk.step(IDS[:16], DENSE)
    walk.step(IDS[16:20], DENSE)
    steps = [walk.step(IDS[at : at + 1], rule) for at in range(20, 45)]
    actions = np.zeros((25, 6), np.int8)
    for token, (_, skipped) in enumerate(steps):
        for unit in np.flatnonzero(skipped):
            actions[token, units[unit].layers] = 1
    return np.array([logits for logits, _ in steps]), actions


def some(engines: Any) -> DecisionRule:
    """Skips about half of what may be skipped."""
    damage = []
    walk = Walk(engines)
    walk.step(IDS[:16], DENSE)

    class Noted(DecisionRule):
        def skips(self, found: np.ndarray) -> np.ndarray:
            damage.append(found)
            return super().skips(found)

    for at in range(16, 40):
        walk.step(IDS[at : at + 1], Noted((0.0, 0.0)))
    return DecisionRule(tuple(np.median(damage, axis=0)[:, 0].tolist()))


@pytest.mark.parametrize("first", ORDERS)
@pytest.mark.parametrize("dispatch", DISPATCH)
@pytest.mark.parametrize("target", HALVES)
def test_decode(target: str, dispatch: str, first: str | int, on_card: MakeOnCard) -> None:
    runtime = on_card(target, dispatch, first).runtime
    rule = some(runtime.engines)
    (expected, actions), (found, taken) = walked(runtime.engines, rule), decoded(runtime, rule)
    assert 0.2 < actions[:, 2:5].mean() < 0.8
    np.testing.assert_array_equal(taken, actions)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dispatch", ["overlapped", "device"])
@pytest.mark.parametrize("target", HALVES)
def test_rows(target: str, dispatch: str, on_card: MakeOnCard) -> None:
    """Taken from the cache of prompts to their places in a larger one, and decoded together."""
    runtime, lengths = on_card(target, dispatch, 1).runtime, (9, 16, 5)
    rows, prompt = Rows(runtime.engines, 4, 96), runtime.session()
    rows.cache.reserve(96)
    expected = []
    for slot, length in enumerate(lengths):
        prompt.restart(IDS[slot : slot + length])
        rows.cache.take(slot, prompt.fork().cache)
        walk = Walk(runtime.engines)
        walk.step(IDS[slot : slot + length], DENSE)
        expected.append([walk.step(IDS[at : at + 1], DENSE)[0] for at in (20, 30)])
    for number, at in enumerate((20, 30)):
        step = rows._bound(3)
        step.decode_batch([int(IDS[at])] * 3, [DENSE] * 3)
        found, wanted = step.logits[:, 0], np.array([each[number] for each in expected])
        assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
