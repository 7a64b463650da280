"""Chained drafts on the host: where their K and V go, how they are chained, and whose cache they read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.backends.host.cache import KVCache
from dash_export.backends.host.decode import EngineSet
from dash_export.backends.host.drafting import BoundDrafter
from dash_export.building import build, pipeline
from dash_export.building.exporting import export
from tests.conftest import as_drafted
from tests.tiny import drafter_only, random_ids, tiny_checkpoint

IDS = random_ids(12)


@pytest.fixture(scope="module", params=["cpu-fp32", "portable"])
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineSet:
    folder: Path = tmp_path_factory.mktemp("drafting")
    checkpoint = tiny_checkpoint(folder / "model")
    bundle = export(checkpoint, folder / "tiny.dash", drafter_only(checkpoint))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_with_measurements", as_drafted)
        build(bundle, request.param.partition("-")[0], weights="fp32" if request.param == "cpu-fp32" else None)
    found = DashRuntime.load(bundle.root, request.param).engines
    assert isinstance(found, EngineSet)
    return found


def filled(engines: EngineSet, sequences: int = 1, row: int = 0) -> tuple[KVCache, np.ndarray]:
    """A cache with all IDS but the last in sequence `row`, and the final state of the last of these."""
    cache, alone = engines.cache(32, sequences), engines.cache(32)
    for each in (cache, alone):
        each.reserve(24)
    step = engines.step(alone, len(IDS) - 1, teacher_forced=True, mixes=False)
    step.prefill(IDS[:-1])
    cache.take(row, alone)
    return cache, step.final_state[0, -1]


def drafted(engines: EngineSet, cache: KVCache, state: np.ndarray, count: int, row: int = 0) -> list[tuple[int, float]]:
    return chained(BoundDrafter(engines, cache, row), state, count)


def chained(drafter: BoundDrafter, state: np.ndarray, count: int) -> list[tuple[int, float]]:
    ask, token, found = drafter.asked(state, len(IDS) - 1), int(IDS[-1]), list[tuple[int, float]]()
    for _ in range(count):
        found.append(ask(token))
        token = found[-1][0]
    return found


def test_writes_the_last_layers_free_rows_alone(engines: EngineSet) -> None:
    cache, state = filled(engines)
    cache.keys[..., 11:, :] = cache.values[..., 11:, :] = 1e9  # what nobody may read
    before = cache.keys.copy(), cache.values.copy()
    drafted(engines, cache, state, 3)
    for old, new in zip(before, (cache.keys, cache.values), strict=True):
        changed = (old != new).any(axis=(1, 2, 4))
        assert {tuple(place) for place in np.argwhere(changed).tolist()} == {(5, 11), (5, 12), (5, 13)}
    assert cache.length == 11


def test_the_model_writes_over_drafts(engines: EngineSet) -> None:
    cache, state = filled(engines)
    step = engines.step(cache, 3, teacher_forced=True, mixes=False)
    step.prefill(IDS[:3])
    expected = step.logits.copy()
    cache.length = len(IDS) - 1
    drafted(engines, cache, state, 4)
    step.prefill(IDS[:3])
    np.testing.assert_array_equal(step.logits, expected)


def test_a_chain_begins_anew(engines: EngineSet) -> None:
    """What is bound is used again, from the state that is given, whatever was drafted before."""
    cache, state = filled(engines)
    bound, expected = BoundDrafter(engines, cache), drafted(engines, cache, state, 4)
    for length in (3, 4, 1):
        assert chained(bound, state, length) == expected[:length]
    assert chained(bound, -state, 1) != expected[:1]


def test_each_sequence_of_a_batch_has_its_own_cache(engines: EngineSet) -> None:
    alone, state = filled(engines)
    many, _ = filled(engines, 3, 1)
    expected = drafted(engines, alone, state, 3)
    assert drafted(engines, many, state, 3, row=1) == expected
    assert drafted(engines, many, state, 3, row=2) != expected
    assert not many.keys[:, 0].any()


def test_a_step_of_many_rows_without_the_mixed_engines(tiny_root: Path) -> None:
    """All rows get logits and states, as one by one."""
    engines = DashRuntime.load(tiny_root, "cpu-fp32").engines
    assert isinstance(engines, EngineSet)
    assert engines.drafter is None
    cache = engines.cache(32)
    cache.reserve(32)
    step = engines.step(cache, 5, teacher_forced=True, mixes=False)
    step.prefill(IDS[:5])
    assert "mixed" not in vars(engines)
    cache.length, one = 0, engines.step(cache, 1)
    for row, token in enumerate(IDS[:5]):
        one.prefill(np.array([token]))
        np.testing.assert_allclose(step.final_state[0, row], one.final_state[0, 0], atol=1e-5)
        np.testing.assert_allclose(step.logits[0, row], one.logits[0, 0], atol=1e-5)
