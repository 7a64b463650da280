"""One token at a time equals one pass over all: prefilled in one piece, in chunks, and after the cache has grown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from dash_export import DashRuntime
from dash_export.decision import unit_skips
from dash_export.runtime import Session, engine_set, huge_pages
from dash_export.runtime.cache import KVCache
from dash_export.runtime.decode import BoundStep
from dash_export.runtime.rules import ForcedRule
from tests.runtime.prompts import prompts
from tests.tiny import TINY_UNITS, random_actions, random_ids

LoadRuntime = Callable[..., DashRuntime]
PREFILLS = {"one-piece": (256, 512), "chunks": (256, 7), "growing": (16, 512), "both": (16, 5)}


class Case(NamedTuple):
    """A runtime with token ids, how many of them are the prompt, and the logit difference allowed."""

    runtime: DashRuntime
    ids: np.ndarray
    prompt: int
    tolerance: float


@pytest.fixture(params=["tiny", "tiny-portable", pytest.param("smollm2", marks=pytest.mark.model)])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "smollm2":
        runtime = request.getfixturevalue("smollm2_runtime")("cpu-fp32")
        ids = prompts(runtime)[1]
        tail = runtime.text.encode(
            " and then she told him what had happened at the house on the hill, long ago, in 1815."
        )
        return Case(runtime, np.concatenate([ids, tail]), len(ids), 1e-3)
    target = "portable" if request.param.endswith("portable") else "cpu-fp32"
    return Case(request.getfixturevalue("tiny_runtime")(target), random_ids(70), 41, 2e-5)


def session(runtime: DashRuntime, kv_step: int, prefill_chunk: int, **policy: object) -> Session:
    made = runtime.session(**policy)  # type: ignore[arg-type]
    made.kv_step, made.prefill_chunk = kv_step, prefill_chunk
    made.__post_init__()
    return made


def forced_decode(live: Session, ids: np.ndarray, prompt: int, actions: np.ndarray) -> np.ndarray:
    """Logits [tokens from the prompt's last on, vocab]: prefill, then each known token with its actions."""
    rows = [live.prefill(ids[:prompt])]
    skipped = unit_skips(actions, live.engines.units)
    for position in range(prompt, len(ids)):
        logits, taken = live.decode_one(int(ids[position]), ForcedRule(skipped[:, position : position + 1]))
        np.testing.assert_array_equal(taken, actions[position])
        rows.append(logits)
    return np.stack(rows)


def actions_of(case: Case) -> np.ndarray:
    engines = case.runtime.engines
    actions = random_actions(len(case.ids), engines.model.num_layers, engines.units)
    actions[: case.prompt] = 0
    return actions


@pytest.mark.parametrize("how", PREFILLS)
def test_decode_equals_one_pass(case: Case, how: str) -> None:
    actions = actions_of(case)
    whole = case.runtime.session().logits(case.ids, actions=actions)
    live = session(case.runtime, *PREFILLS[how])
    stepwise = forced_decode(live, case.ids, case.prompt, actions)
    assert np.abs(stepwise - whole[case.prompt - 1 :]).max() < case.tolerance
    if how in ("growing", "both"):
        assert live.counters.cache_growths > 1


def test_one_pass_in_chunks_equals_one_piece(case: Case) -> None:
    actions = actions_of(case)
    whole = case.runtime.session().logits(case.ids, actions=actions)
    chunked = session(case.runtime, 16, 9).logits(case.ids, actions=actions)
    assert np.abs(chunked - whole).max() < case.tolerance


@pytest.mark.parametrize("kind", ["static", "token", "bounded"])
def test_score_equals_decode_under_a_policy(kind: str, case: Case) -> None:
    num_layers, units = case.runtime.engines.model.num_layers, case.runtime.engines.units
    dial = case.runtime.build.dial
    setting: dict[str, Any] = {
        "static": {"skip": tuple(units[0].layers)},
        "token": {"trade_off": dial[len(dial) // 2].trade_off},
        "bounded": {"trade_off": dial[1].trade_off, "max_layers": num_layers - 1},
    }[kind]
    score = case.runtime.session(**setting).score(case.ids, prefix=case.prompt)
    live = case.runtime.session(**setting)
    logits, likelihoods, taken = live.prefill(case.ids[: case.prompt]), [], []
    for token in case.ids[case.prompt :]:
        likelihoods.append(float(logits[token] - np.logaddexp.reduce(logits.astype(np.float64))))
        logits, actions = live.decode_one(int(token))
        taken.append(actions)
    assert 0 < np.sum(taken) < np.size(taken)
    np.testing.assert_array_equal(score.actions[case.prompt :], taken)
    np.testing.assert_allclose(score.log_likelihoods[case.prompt - 1 :], likelihoods, atol=case.tolerance)


def test_cache_step_of_one_position_is_not_read_ahead(tiny_runtime: LoadRuntime) -> None:
    """Stale rows after a rewind are never attended to."""
    live = tiny_runtime().session()
    ids = random_ids(50)
    live.prefill(ids)
    live.reset()
    np.testing.assert_array_equal(live.prefill(ids[:20]), tiny_runtime().session().prefill(ids[:20]))
    expected = tiny_runtime().session().logits(ids[:21])[-1]
    np.testing.assert_allclose(live.decode_one(int(ids[20]))[0], expected, atol=2e-5)


def test_over_long_caches_passes_are_shorter(tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the attention scores of one stay small."""
    runtime, ids, sizes = tiny_runtime(), random_ids(40), []
    expected = runtime.session().prefill(ids)
    sound = BoundStep.prefill

    def prefill(step: BoundStep, tokens: np.ndarray) -> None:
        sizes.append(len(tokens))
        sound(step, tokens)

    monkeypatch.setattr(BoundStep, "prefill", prefill)
    monkeypatch.setattr(engine_set, "SCORES", 4 * runtime.engines.model.num_heads * 48 * 15)
    np.testing.assert_allclose(session(runtime, 48, 512).prefill(ids), expected, atol=2e-5)
    assert sizes == [15, 15, 10]


def test_keys_and_values_are_one_block_that_grows(tiny_runtime: LoadRuntime) -> None:
    cache = KVCache(tiny_runtime().engines.model, 8, 2)
    cache.reserve(5)
    cache.lengths = [3, 5]
    cache.keys[:] = np.arange(8)[:, None]
    cache.values[:] = -1
    twin = cache.copy()
    assert cache.reserve(9)
    assert cache.keys.base is cache.values.base
    for arrays in zip((cache.keys, cache.values), (twin.keys, twin.values), strict=True):
        for index, length in enumerate(cache.lengths):
            now, before = (array[:, index, :, :length] for array in arrays)
            np.testing.assert_array_equal(now, before)
    assert not cache.keys[:, 0, :, 3:].any()


@pytest.mark.skipif(not huge_pages._available(), reason="this system has no huge pages of this size")
def test_a_cache_begins_with_a_huge_page(tiny_runtime: LoadRuntime) -> None:
    cache = KVCache(tiny_runtime().engines.model, 1 << 13)
    cache.reserve(1)
    assert cache.nbytes >= huge_pages.HUGE
    assert cache.keys.ctypes.data % huge_pages.HUGE == 0


class TestBrokenOnPurpose:
    """What the tests above are for: each of these slips must show as a difference."""

    @staticmethod
    def difference(runtime: DashRuntime) -> float:
        ids, actions = random_ids(60), random_actions(60, 6, TINY_UNITS)
        actions[:30] = 0
        whole = runtime.session().logits(ids, actions=actions)
        return float(np.abs(forced_decode(runtime.session(), ids, 30, actions) - whole[29:]).max())

    def test_sound(self, tiny_runtime: LoadRuntime) -> None:
        assert self.difference(tiny_runtime()) < 2e-5

    def test_position_off_by_one(self, tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        sound = BoundStep.place

        def place(step: BoundStep) -> None:
            sound(step)
            if step.sequence == 1:
                step._seqlens_k += 1
                step._total += 1

        monkeypatch.setattr(BoundStep, "place", place)
        assert self.difference(tiny_runtime()) > 1e-2

    def test_cache_lost_when_growing(self, tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        sound = KVCache.reserve

        def reserve(cache: KVCache, rows: int) -> bool:
            moved = sound(cache, rows)
            if moved:
                cache.keys[:] = cache.values[:] = 0
            return moved

        monkeypatch.setattr(KVCache, "reserve", reserve)
        ids = random_ids(40)
        expected = tiny_runtime().session().logits(ids)[-1]
        live = session(tiny_runtime(), 16, 512)
        live.prefill(ids[:30])
        rows = [live.decode_one(int(token))[0] for token in ids[30:]]
        assert np.abs(rows[-1] - expected).max() > 1e-2

    def test_skipped_token_leaves_a_hole(self, tiny_runtime: LoadRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        sound = BoundStep.decode

        def decode(step: BoundStep, token: int, rule: ForcedRule) -> None:
            sound(step, token, rule)
            for unit, skipped in zip(TINY_UNITS, step.skipped[:, 0], strict=True):
                if skipped:
                    step._cache.keys[unit.last][:, :, step._cache.length - 1] = 0
                    step._cache.values[unit.last][:, :, step._cache.length - 1] = 0

        monkeypatch.setattr(BoundStep, "decode", decode)
        assert self.difference(tiny_runtime()) > 1e-2
